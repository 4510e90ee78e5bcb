"""Checkpoints without a head are embedders, and those that name no architecture are read by
their model_type.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sensorium import LLM, SamplingParams
from sensorium.errors import ConfigError, UnsupportedModelError
from sensorium.models import loader
from sensorium.models.loading.weight_files import INDEX, SINGLE
from sensorium.models.registry import FAMILIES, resolve
from tests.checkpoints import NATIVE, make_text
from tests.checkpoints.hf import make_hf_text
from tests.models.harness import Harness
from tests.models.loading.test_weight_files import Hub

IDS = list(range(30, 50))
SIZES = {"num_kv_blocks": 40, "block_size": 16, "max_model_len": 256}
BARE = {
    "qwen2_vl": "Qwen2VLModel",
    "qwen2_5_vl": "Qwen2_5_VLModel",
    "qwen3_vl": "Qwen3VLModel",
    "llava": "LlavaModel",
    "llava_onevision": "LlavaOnevisionModel",
}


def edit(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def logits(folder: Path) -> torch.Tensor:
    harness = Harness(loader.load(str(folder), device="cpu"))
    return harness.prefill(harness.add(IDS))


@pytest.mark.parametrize(
    "value", [None, ..., [], [None]], ids=["null", "absent", "empty", "of null"]
)
def test_the_model_type_stands_for_architectures(tmp_path: Path, value: Any) -> None:
    folder = make_text("qwen2", tmp_path)
    expected = logits(folder)
    edit(folder, architectures=value)
    assert torch.equal(logits(folder), expected)


@pytest.mark.parametrize("family", NATIVE)
def test_the_model_type_of_every_family(tmp_path: Path, family: str) -> None:
    folder = NATIVE[family](tmp_path)
    [expected] = [f for f in FAMILIES if family in f.model_types]
    assert resolve(json.loads((folder / "config.json").read_text())) is expected
    edit(folder, architectures=None)
    loaded = loader.load(str(folder), device="cpu")
    assert loaded.family is expected
    assert loaded.embedder is None


def test_the_model_type_of_a_model_of_transformers(tmp_path: Path) -> None:
    folder = make_hf_text("gemma2", tmp_path)
    expected = logits(folder)
    edit(folder, architectures=None)
    assert torch.equal(logits(folder), expected)


@pytest.mark.parametrize("model_type", ["t5", "vit", "nobody", None, 3])
def test_a_model_type_that_does_not_run_is_named(model_type: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=f"its model_type {model_type!r} is none"):
        resolve({"model_type": model_type})


def save_bare(folder: Path, architecture: str, to: Path) -> Any:
    """Save the model inside a checkpoint as transformers saves it, with the neighbours of the
    whole.
    """
    import transformers

    whole = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    inner = whole.model
    assert type(inner).__name__ == architecture
    inner.save_pretrained(to)
    for file in folder.iterdir():
        if not (to / file.name).exists():
            (to / file.name).write_bytes(file.read_bytes())
    assert json.loads((to / "config.json").read_text())["architectures"] == [architecture]
    return inner.eval()


@pytest.mark.parametrize("family", BARE)
def test_a_bare_model_makes_vectors(tmp_path: Path, family: str) -> None:
    folder = NATIVE[family](tmp_path / "whole", layout="t5")
    inner = save_bare(folder, BARE[family], tmp_path / "bare")
    with torch.inference_mode():
        hidden = inner(input_ids=torch.tensor([IDS])).last_hidden_state[0, -1]
    with LLM(str(tmp_path / "bare"), **SIZES) as llm:
        [output] = llm.embed([IDS], use_tqdm=False)
    expected = torch.nn.functional.normalize(hidden, dim=0)
    torch.testing.assert_close(
        torch.tensor(output.outputs.embedding), expected, rtol=1e-3, atol=1e-4
    )


def headless(folder: Path, *, indexed: bool) -> Path:
    """Take the output head out of a checkpoint, which does not tie it."""
    edit(folder, tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())
    config.get("text_config", {})["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / SINGLE)
    tensors = {n: t for n, t in tensors.items() if not n.endswith("lm_head.weight")}
    (folder / SINGLE).unlink()
    file = "model-00001-of-00001.safetensors" if indexed else SINGLE
    save_file(tensors, folder / file)
    if indexed:
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors, file)}))
    return folder


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_vl", "llama"])
def test_a_checkpoint_that_stores_no_head_makes_vectors(
    tmp_path: Path, family: str, indexed: bool
) -> None:
    """As Qwen3-VL-Embedding is published: its architecture is that of the generating model."""
    folder = headless(NATIVE[family](tmp_path), indexed=indexed)
    with LLM(str(folder), **SIZES) as llm:
        [found] = llm.embed([IDS], use_tqdm=False)
    with LLM(str(folder), runner="pooling", **SIZES) as llm:
        [expected] = llm.embed([IDS], use_tqdm=False)
    assert found.outputs.embedding == expected.outputs.embedding


def test_a_missing_head_that_is_tied_generates(tmp_path: Path) -> None:
    folder = headless(NATIVE["qwen2"](tmp_path), indexed=True)
    edit(folder, tie_word_embeddings=True)
    with LLM(str(folder), **SIZES) as llm:
        [output] = llm.generate(
            [IDS], SamplingParams(max_tokens=2, ignore_eos=True), use_tqdm=False
        )
    assert len(output.outputs[0].token_ids) == 2


def test_a_missing_head_that_shows_late_is_explained(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One file on the hub: what is in it is known when it is here, after the kind of model was
    decided.
    """
    folder = headless(NATIVE["llama"](tmp_path / "repository"), indexed=False)
    Hub(monkeypatch, folder, tmp_path)
    with pytest.raises(ConfigError, match=r"no output head .*--runner pooling"):
        loader.load("some/model", device="cpu")
    assert loader.load("some/model", device="cpu", runner="pooling").embedder is not None
