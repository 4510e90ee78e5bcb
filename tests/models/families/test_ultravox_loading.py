"""Sources of Ultravox's parts, precedence of their weights, and refusals with reasons."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sensorium.errors import ConfigError
from sensorium.models import loader
from sensorium.models.configs import WhisperConfig
from sensorium.models.families.ultravox.config import UltravoxConfig
from sensorium.models.families.ultravox.model import UltravoxModel
from sensorium.models.registry import resolve
from tests.checkpoints import make_text, make_ultravox
from tests.models.families.test_ultravox import sound
from tests.models.harness import Harness
from tests.models.plain_ultravox import PlainUltravox


def load(folder: Path, **options: Any) -> loader.LoadedModel:
    return loader.load(str(folder), device="cpu", **options)


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def embeds_of(folder: Path, **options: Any) -> torch.Tensor:
    harness = Harness(load(folder, **options))
    with torch.inference_mode():
        found: torch.Tensor = harness.model.encode(harness.process([sound(5000)]))[0]
    return found


def test_counts_of_the_published_sizes() -> None:
    encoder = WhisperConfig(1280, 5120, 32, 20, 128, 1500, "gelu")
    config = UltravoxConfig(None, encoder, 8, 4096, "swiglu", True)  # type: ignore[arg-type]
    for frames, num_embeds in ((100, 7), (501, 32), (3000, 188), (3100, 195), (60_000, 3760)):
        assert config.num_embeds(frames) == num_embeds
    assert config.chunks(6001) == [3000, 3000, 1]
    assert config.chunks(3000) == [3000]


def test_backbones_lie_beside_or_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named relative to the checkpoint, by an absolute folder, by hf_overrides, or by an id of
    the hub.
    """
    folder = make_ultravox(tmp_path / "model", layout="ids")
    expected = embeds_of(folder)
    elsewhere = tmp_path / "elsewhere"
    shutil.move(folder / "text", elsewhere)
    with pytest.raises(
        ConfigError, match=r"second checkpoint.*text_model_id.*'text'.*hf_overrides"
    ):
        load(folder)
    overrides = {"text_model_id": str(elsewhere)}
    torch.testing.assert_close(embeds_of(folder, hf_overrides=overrides), expected)
    change_config(folder, text_model_id="some/decoder")
    calls: list[tuple[str, bool]] = []

    def download(name: str, **options: Any) -> str:
        if not options.get("local_files_only"):
            calls.append((name, "model.safetensors" in options["allow_patterns"]))
        return str(elsewhere)

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    torch.testing.assert_close(embeds_of(folder), expected)
    assert calls == [("some/decoder", False), ("some/decoder", True)]
    read = loader.read_config(str(folder))
    assert calls[2:] == [("some/decoder", False)]
    assert resolve(read.config).shape(read).vocab_size == 448


def test_the_encoders_weights_are_not_fetched_without_sounds(tmp_path: Path) -> None:
    folder = make_ultravox(tmp_path, layout="ids")
    (folder / "whisper" / "model.safetensors").unlink()
    loaded = load(folder, skip_modalities=("audio",))
    assert not loaded.model.has_encoder
    with pytest.raises(ConfigError, match="no safetensors files"):
        load(folder)
    with pytest.raises(ValueError, match="no encoder"):
        loaded.model.encode(Harness(load(folder, load_format="dummy")).process([sound(5000)]))


def test_weights_of_the_file_itself_count(tmp_path: Path) -> None:
    """v0.5 comes with an encoder that was trained further.

    Were it also named, its own weights count.
    """
    folder = make_ultravox(tmp_path, layout="hub")
    expected = embeds_of(folder)
    change_config(folder, audio_model_id="whisper")
    path = folder / "whisper" / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(path).items()}, path)
    torch.testing.assert_close(embeds_of(folder), expected)
    kept = {
        name: value
        for name, value in load_file(folder / "model.safetensors").items()
        if not name.startswith("audio_tower.")
    }
    save_file(kept, folder / "model.safetensors")
    assert not torch.allclose(embeds_of(folder), expected, atol=1e-2)


def test_an_encoder_saved_alone(tmp_path: Path) -> None:
    """Without the decoder, its names have no prefix."""
    folder = make_ultravox(tmp_path, layout="ids")
    path = folder / "whisper" / "model.safetensors"
    own = {n.removeprefix("model.encoder."): v for n, v in load_file(path).items()}
    save_file({n: v for n, v in own.items() if not n.startswith("model.")}, path)
    torch.testing.assert_close(
        embeds_of(folder),
        PlainUltravox(make_ultravox(tmp_path / "whole", layout="ids")).embeds(sound(5000).samples),
        atol=1e-4,
        rtol=1e-4,
    )


def test_another_activation(tmp_path: Path) -> None:
    """Without a gate the second linear layer is as wide as the first."""
    folder = make_ultravox(tmp_path, projector_act="gelu", newer=False)
    model = load(folder).model
    assert isinstance(model, UltravoxModel)
    assert model.projector is not None
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    plain = PlainUltravox(folder)
    inner = torch.nn.functional.gelu(plain.norm(x, "ln_pre") @ plain.projector["linear_1"].T)
    expected = plain.norm(inner @ plain.projector["linear_2"].T, "ln_post")
    with torch.inference_mode():
        torch.testing.assert_close(model.projector(x), expected, atol=1e-5, rtol=1e-5)


def test_unknown_weights_are_refused(tmp_path: Path) -> None:
    folder = make_ultravox(tmp_path)
    path = folder / "model.safetensors"
    save_file({**load_file(path), "multi_modal_projector.more.weight": torch.ones(2)}, path)
    with pytest.raises(ConfigError, match=r"multi_modal_projector\.more\.weight"):
        load(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text_model_id": 7}, "text_model_id must be a Hugging Face id or a folder"),
        ({"text_model_id": None}, "text_config must be a mapping"),
        ({"audio_config": {"model_type": "wav2vec2"}}, "'wav2vec2' is not supported"),
        ({"audio_config": {"d_model": 33}}, "33 is not a multiple"),
        ({"hidden_size": 47}, "hidden_size 47 must be even"),
        ({"stack_factor": 0}, "stack_factor must be at least 1, got 0"),
        ({"projector_act": "tanhshrink"}, "unknown activation 'tanhshrink'"),
        ({"audio_latency_block_size": 100}, "audio_latency_block_size is not supported"),
        ({"num_projector_layers": 2}, "num_projector_layers is not supported"),
        ({"text_model_lora_config": {"r": 8}}, "rank 8: merge the adapter"),
        ({"projector_ln_mid": False}, r"ln_post\.weight"),
    ],
)
def test_configurations_that_cannot_be(
    tmp_path: Path, values: dict[str, Any], message: str
) -> None:
    folder = make_ultravox(tmp_path)
    change_config(folder, **values)
    with pytest.raises(ConfigError, match=message):
        load(folder)


def test_a_text_backbone_that_is_not_one(tmp_path: Path) -> None:
    folder = make_ultravox(tmp_path)
    change_config(folder / "text", model_type="gpt2")
    with pytest.raises(ConfigError, match="no decoder for model_type 'gpt2'"):
        load(folder)
    change_config(folder / "text", model_type="llama", quantization_config={"quant_method": "aqlm"})
    with pytest.raises(ConfigError, match="aqlm"):
        load(folder)
    shutil.rmtree(folder / "text")
    make_text("llama", folder / "text", hidden_size=32)
    with pytest.raises(ConfigError, match="have other shapes"):
        load(folder)


def test_what_stands_for_embeddings_when_the_tokenizer_does_not_say(tmp_path: Path) -> None:
    folder = make_ultravox(tmp_path)

    def filler() -> int:
        read = loader.read_config(str(folder))
        processor = resolve(read.config).build_processor(read)
        return processor.filler_id  # type: ignore[union-attr, attr-defined]

    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert filler() == ends[1]
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|eot_id|>"}))
    assert filler() == ends[0]
    (folder / "generation_config.json").unlink()
    change_config(folder, eos_token_id=[9999, 5])
    assert filler() == 5


def test_the_frontend_needs_no_torch(tmp_path: Path) -> None:
    """Configuration, processor and decoding of sounds are what an HTTP process runs."""
    import subprocess

    folder = make_ultravox(tmp_path)
    code = (
        "import sys\n"
        "from sensorium.models import loader\n"
        "from sensorium.models.registry import resolve\n"
        "from sensorium.config import MediaConfig\n"
        "from sensorium.multimodal.decode.loaders import LOADERS, DecodeJob, prepare\n"
        f"read = loader.read_config({str(folder)!r})\n"
        "processor = resolve(read.config).build_processor(read)\n"
        "pair = ([0.1] * 4000, 8000)\n"
        "options = LOADERS['audio'].options.parse({}, '')\n"
        "job = DecodeJob('audio', options, {}, 1)\n"
        "made = prepare(job, pair, MediaConfig(), processor)\n"
        "print(made.features.num_embeds, 'torch' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.split() == ["4", "False"]
