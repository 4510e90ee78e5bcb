"""Models from two GGUF files: the language model's and its vision encoder's."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from sensorium.errors import ConfigError, UnsupportedModelError
from sensorium.models import loader
from sensorium.models.gguf import folder as folders
from sensorium.models.loader import LoadedModel
from sensorium.models.loading import checkpoint
from sensorium.multimodal.placeholders import PlaceholderIds
from tests.checkpoints import make_llava, make_qwen2_vl, make_text
from tests.checkpoints.gguf import write_gguf
from tests.checkpoints.hf import make_hf
from tests.checkpoints.mmproj import write_mmproj
from tests.models.harness import Harness, picture, text_ids

PROMPT = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is shown?<|im_end|>\n"
    "<|im_start|>assistant\n"
)
PIXELS = 28 * 28 * 48
LLAVA = "USER: <image>\nWhat is shown? ASSISTANT:"
IDEFICS = "User:<image>What is shown?<end_of_utterance>\nAssistant:"


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of models among the test's own files."""
    monkeypatch.setattr(folders, "cache_root", lambda: tmp_path / "caches")


def ids_of(loaded: LoadedModel, prompt: str) -> list[int]:
    """Ids of a prompt, which is cut at placeholders that are no tokens."""
    folder, processor = Path(loaded.config.folder), loaded.processor
    markup = None if processor is None else processor.markup
    if processor is None or markup is None:
        return text_ids(folder, prompt)
    before, after = PlaceholderIds(processor, markup).split(prompt)[0]
    own = text_ids(folder, after)[len(text_ids(folder, "")) :]
    return [*text_ids(folder, before), *processor.placeholder("image"), *own]


def answers(
    model: Path, mmproj: Path | None = None, prompt: str = PROMPT, **options: int
) -> tuple[torch.Tensor, list[int]]:
    """Logits of a prompt with a picture, and its greedy continuation."""
    own = None if mmproj is None else str(mmproj)
    loaded = loader.load(str(model), mmproj=own, device="cpu", dtype="float32")
    harness = Harness(loaded)
    ids = ids_of(loaded, prompt)
    media = [picture(97, 133, 1)]
    logits = harness.prefill(harness.add(ids, media, **options))
    tokens = harness.greedy(harness.add(ids, media, **options), 8)
    return logits, tokens


@pytest.mark.parametrize("swapped", [False, True])
def test_pictures_are_seen_as_by_the_checkpoint(tmp_path: Path, swapped: bool) -> None:
    source = make_qwen2_vl(tmp_path / "source")
    write_gguf(source, tmp_path / "model.gguf")
    write_mmproj(source, tmp_path / "mmproj.gguf", swapped=swapped)
    expected, tokens = answers(source, max_pixels=PIXELS)
    found, own = answers(tmp_path / "model.gguf", tmp_path / "mmproj.gguf", max_pixels=PIXELS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert own == tokens


def test_quantized_towers(tmp_path: Path) -> None:
    source = make_qwen2_vl(tmp_path / "source")
    write_gguf(source, tmp_path / "model.gguf")
    write_mmproj(source, tmp_path / "mmproj.gguf", "Q8_0")
    expected, _ = answers(source, max_pixels=PIXELS)
    found, _ = answers(tmp_path / "model.gguf", tmp_path / "mmproj.gguf", max_pixels=PIXELS)
    assert (found - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("named", [True, False])
def test_llava_sees_as_its_checkpoint(tmp_path: Path, named: bool) -> None:
    """Also where no token is the placeholder, as in files that were made of the original ones."""
    source = make_llava(tmp_path / "source")
    without = () if named else ("<image>", "<pad>")
    write_gguf(source, tmp_path / "model.gguf", without=without)
    early = {} if named else {"projector_type": None, "has_llava_projector": True}
    write_mmproj(source, tmp_path / "mmproj.gguf", swapped=not named, **early)
    expected, tokens = answers(source, prompt=LLAVA)
    found, own = answers(tmp_path / "model.gguf", tmp_path / "mmproj.gguf", LLAVA)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert own == tokens


@pytest.mark.parametrize("tiles", [True, False])
def test_idefics3_sees_as_its_checkpoint(tmp_path: Path, tiles: bool) -> None:
    """Through transformers; without the size of whole images there are no tiles."""
    source = make_hf("idefics3", tmp_path / "source")
    write_gguf(source, tmp_path / "model.gguf")
    early = {} if tiles else {"vision.preproc_image_size": None}
    write_mmproj(source, tmp_path / "mmproj.gguf", **early)
    if not tiles:
        path = source / "preprocessor_config.json"
        own = {"do_image_splitting": False, "size": {"longest_edge": 4 * 56}}
        path.write_text(json.dumps(json.loads(path.read_text()) | own))
    expected, tokens = answers(source, prompt=IDEFICS)
    found, greedy = answers(tmp_path / "model.gguf", tmp_path / "mmproj.gguf", IDEFICS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert greedy == tokens


def test_layers_that_an_encoder_does_not_count_are_refused(tmp_path: Path) -> None:
    """It would run without them, and see something else."""
    source = make_hf("idefics3", tmp_path / "source")
    write_gguf(source, tmp_path / "model.gguf")
    write_mmproj(source, tmp_path / "mmproj.gguf", **{"vision.block_count": 1})
    with pytest.raises(ConfigError, match=r"have no place .*layers\.1\..* GGUF file is of this"):
        loader.load(
            str(tmp_path / "model.gguf"), mmproj=str(tmp_path / "mmproj.gguf"), dtype="float32"
        )


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "llava 1.6": ({"vision.mm_patch_merge_type": "spatial_unpad"}, "LLaVA 1.6"),
    "another": ({"projector_type": "ldpv2"}, "'ldpv2'. GGUF files of Qwen2-VL"),
    "layers": ({"vision.block_count": 3}, "has no 3 layers"),
    "many layers": ({"vision.block_count": 1 << 30}, "has no 1073741824 layers"),
    "features": ({"vision.feature_layer": [2, 3]}, r"after the layers \[2, 3\], and has 2"),
    "features that are no numbers": (
        {"vision.feature_layer": [math.nan, math.inf]},
        "no list of layers",
    ),
    "image": ({"vision.image_size": 1 << 30}, "must have a tensor 'v.position_embd.weight'"),
    "heads": ({"vision.attention.head_count": 5}, "5 heads, which do not divide 32"),
    "colours": ({"vision.image_std": [0.5, 0.0, 0.5]}, "not positive as clip.vision.image_std"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_encoders_that_are_refused(tmp_path: Path, name: str) -> None:
    values, message = REFUSED[name]
    source = make_llava(tmp_path / "source")
    write_gguf(source, tmp_path / "model.gguf", "Q8_0")
    write_mmproj(source, tmp_path / "mmproj.gguf", **values)
    with pytest.raises((ConfigError, UnsupportedModelError), match=message) as caught:
        checkpoint.find(str(tmp_path / "model.gguf"), mmproj=str(tmp_path / "mmproj.gguf"))
    assert caught.value.param in ("mmproj", "model")


@pytest.mark.parametrize(
    "name", ["patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias"]
)
def test_parts_of_other_shapes(tmp_path: Path, name: str) -> None:
    """What is joined has one shape: no place in a file is believed."""
    source = make_qwen2_vl(tmp_path / "source")
    write_gguf(source, tmp_path / "model.gguf", "Q8_0")
    write_mmproj(source, tmp_path / "mmproj.gguf", cut=f"visual.{name}")
    with pytest.raises(ConfigError, match=r"must have a tensor .* of the shape"):
        answers(tmp_path / "model.gguf", tmp_path / "mmproj.gguf", max_pixels=PIXELS)


@pytest.mark.parametrize("sections", [[math.nan] * 4, [1, 1, 1, 1], [-2, 5, 5, 0], [4]])
def test_sections_that_do_not_fit_the_heads(tmp_path: Path, sections: list[float]) -> None:
    source = make_qwen2_vl(tmp_path / "source")
    write_gguf(source, tmp_path / "model.gguf", "Q8_0", rope__dimension_sections=sections)
    write_mmproj(source, tmp_path / "mmproj.gguf")
    with pytest.raises(ConfigError, match="no three sections of"):
        checkpoint.find(str(tmp_path / "model.gguf"), mmproj=str(tmp_path / "mmproj.gguf"))


def test_text_runs_without_the_encoder(tmp_path: Path) -> None:
    source = make_qwen2_vl(tmp_path / "source")
    write_gguf(source, tmp_path / "model.gguf")
    ids = list(range(20, 60))
    logits = []
    for model in (source, tmp_path / "model.gguf"):
        harness = Harness(loader.load(str(model), device="cpu", dtype="float32"))
        logits.append(harness.prefill(harness.add(ids)))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)


def test_files_that_do_not_belong_together(tmp_path: Path) -> None:
    source = make_qwen2_vl(tmp_path / "source")
    write_gguf(source, tmp_path / "model.gguf")
    write_mmproj(source, tmp_path / "mmproj.gguf")
    text = make_text("llama", tmp_path / "text")
    write_gguf(text, tmp_path / "llama.gguf")
    with pytest.raises(UnsupportedModelError, match=r"'qwen2vl_merger', and llama\.gguf"):
        checkpoint.find(str(tmp_path / "llama.gguf"), mmproj=str(tmp_path / "mmproj.gguf"))
    with pytest.raises(ConfigError, match="no encoder of images"):
        checkpoint.find(str(tmp_path / "model.gguf"), mmproj=str(tmp_path / "llama.gguf"))
    with pytest.raises(UnsupportedModelError, match="not a model: name the file"):
        checkpoint.find(str(tmp_path / "mmproj.gguf"))
    with pytest.raises(ConfigError, match="is none"):
        checkpoint.find(str(text), mmproj=str(tmp_path / "mmproj.gguf"))
    with pytest.raises(ConfigError, match="cannot be read"):
        checkpoint.find(str(tmp_path / "model.gguf"), mmproj=str(tmp_path / "absent.gguf"))
