"""Qwen2-VL from two GGUF files: the language model's and its vision encoder's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sensorium.errors import ConfigError, UnsupportedModelError
from sensorium.models import loader
from sensorium.models.gguf import folder as folders
from sensorium.models.loading import checkpoint
from tests.checkpoints import make_qwen2_vl, make_text
from tests.checkpoints.gguf import write_gguf, write_mmproj
from tests.models.harness import Harness, picture, text_ids

PROMPT = (
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is shown?<|im_end|>\n"
    "<|im_start|>assistant\n"
)


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of models among the test's own files."""
    monkeypatch.setattr(folders, "cache_root", lambda: tmp_path / "caches")


def answers(model: Path, mmproj: Path | None = None) -> tuple[torch.Tensor, list[int]]:
    """Logits of a prompt with a picture, and its greedy continuation."""
    own = None if mmproj is None else str(mmproj)
    loaded = loader.load(str(model), mmproj=own, device="cpu", dtype="float32")
    harness = Harness(loaded)
    ids = text_ids(Path(loaded.config.folder), PROMPT)
    media = [picture(97, 133, 1)]
    logits = harness.prefill(harness.add(ids, media, max_pixels=28 * 28 * 48))
    tokens = harness.greedy(harness.add(ids, media, max_pixels=28 * 28 * 48), 8)
    return logits, tokens


@pytest.mark.parametrize("swapped", [False, True])
def test_pictures_are_seen_as_by_the_checkpoint(tmp_path: Path, swapped: bool) -> None:
    source = make_qwen2_vl(tmp_path / "source")
    write_gguf(source, tmp_path / "model.gguf")
    write_mmproj(source, tmp_path / "mmproj.gguf", swapped=swapped)
    expected, tokens = answers(source)
    found, own = answers(tmp_path / "model.gguf", tmp_path / "mmproj.gguf")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert own == tokens


def test_quantized_towers(tmp_path: Path) -> None:
    source = make_qwen2_vl(tmp_path / "source")
    write_gguf(source, tmp_path / "model.gguf")
    write_mmproj(source, tmp_path / "mmproj.gguf", "Q8_0")
    expected, _ = answers(source)
    found, _ = answers(tmp_path / "model.gguf", tmp_path / "mmproj.gguf")
    assert (found - expected).norm() / expected.norm() < 0.05


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
    with pytest.raises(UnsupportedModelError, match="'qwen2vl_merger', for a model of"):
        checkpoint.find(str(tmp_path / "llama.gguf"), mmproj=str(tmp_path / "mmproj.gguf"))
    with pytest.raises(ConfigError, match="no encoder of images"):
        checkpoint.find(str(tmp_path / "model.gguf"), mmproj=str(tmp_path / "llama.gguf"))
    with pytest.raises(UnsupportedModelError, match="not a model: name the file"):
        checkpoint.find(str(tmp_path / "mmproj.gguf"))
    with pytest.raises(ConfigError, match="is none"):
        checkpoint.find(str(text), mmproj=str(tmp_path / "mmproj.gguf"))
    with pytest.raises(ConfigError, match="cannot be read"):
        checkpoint.find(str(tmp_path / "model.gguf"), mmproj=str(tmp_path / "absent.gguf"))
