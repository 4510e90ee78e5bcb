"""A stored output head that differs from the embedding counts, whatever the tie flag says.

Equal or absent is tied.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sensorium.errors import ConfigError
from sensorium.models import loader
from tests.checkpoints import NATIVE
from tests.checkpoints.hf import make_hf_text
from tests.models.harness import Harness, Reference, Running

HEAD = "lm_head.weight"
IDS = list(range(30, 50))


def with_flag(folder: Path, value: bool, nested: bool) -> None:
    """Set ``tie_word_embeddings``.

    Of the text part where ``nested`` and there is one, else of the whole, alone.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text())
    text = config.get("text_config", {})
    config.pop("tie_word_embeddings", None)
    text.pop("tie_word_embeddings", None)
    (text if nested and text else config)["tie_word_embeddings"] = value
    path.write_text(json.dumps(config))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def own_head(tensors: dict[str, torch.Tensor]) -> None:
    """Give the checkpoint an output head that is not its embedding."""
    name = next((name for name in tensors if name.endswith(HEAD)), HEAD)
    noise = torch.Generator().manual_seed(3)
    tensors[name] = torch.randn(tensors[embedding(tensors)].shape, generator=noise) / 3


def embedding(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in tensors if name.endswith("embed_tokens.weight"))


def logits(folder: Path, **options: Any) -> torch.Tensor:
    harness = Harness(loader.load(str(folder), device="cpu", **options))
    return harness.prefill(harness.add(IDS))


def reference(folder: Path) -> torch.Tensor:
    return Reference(folder).logits(Running(IDS, [], None, 0, []))[-1]


@pytest.mark.parametrize("nested", [False, True], ids=["top", "text_config"])
@pytest.mark.parametrize("family", NATIVE)
def test_a_stored_head_that_differs_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str, nested: bool
) -> None:
    folder = NATIVE[family](tmp_path)
    text = folder / "text" if family == "ultravox" else folder  # a checkpoint of its own
    edit(text, own_head)
    with_flag(text, False, nested)
    expected = logits(folder)
    assert not [r for r in caplog.records if "tied" in r.getMessage()]
    with_flag(text, True, nested)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(logits(folder), expected)
    [message] = [r.getMessage() for r in caplog.records if "tied" in r.getMessage()]
    assert "lm_head.weight" in message
    assert "tie_word_embeddings" in message


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen2_vl", "llava"])
def test_as_transformers_has_it(tmp_path: Path, family: str) -> None:
    folder = NATIVE[family](tmp_path)
    edit(folder, own_head)
    with_flag(folder, True, nested=False)
    torch.testing.assert_close(logits(folder)[-1], reference(folder), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "qwen2_vl", "llava"])
def test_an_equal_or_absent_head_is_tied(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, family: str
) -> None:
    folder = NATIVE[family](tmp_path)
    heads = lambda t: [name for name in t if name.endswith(HEAD)]  # noqa: E731
    edit(folder, lambda t: [t.pop(name) for name in heads(t)])
    with_flag(folder, True, nested=False)
    absent = logits(folder)
    edit(folder, lambda t: t.update({HEAD: t[embedding(t)].clone()}))
    assert torch.equal(logits(folder), absent)
    # Equal in the dtype that the model runs in: the copy has been stored with more bits.
    edit(folder, lambda t: t.update({embedding(t): t[embedding(t)].bfloat16()}))
    assert torch.isfinite(logits(folder, dtype="bfloat16")).all()
    assert not [r for r in caplog.records if "tied" in r.getMessage()]


def test_a_head_stored_alone_is_the_embedding_too(tmp_path: Path) -> None:
    folder = NATIVE["qwen2"](tmp_path)
    expected = logits(folder)
    edit(folder, lambda t: t.update({HEAD: t.pop(embedding(t))}))
    assert torch.equal(logits(folder), expected)
    torch.testing.assert_close(expected[-1], reference(folder), rtol=1e-3, atol=1e-3)


def test_a_stored_head_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = NATIVE["qwen2"](tmp_path)
    edit(folder, lambda t: t.update({HEAD: torch.zeros(450, 64)}))
    with pytest.raises(ConfigError, match=r"lm_head\.weight is \(450, 64\), not \(448, 64\)"):
        logits(folder)


def test_models_of_transformers_keep_a_stored_head(tmp_path: Path) -> None:
    folder = make_hf_text("gemma2", tmp_path)
    tied = logits(folder)
    edit(folder, own_head)
    assert not torch.equal(logits(folder), tied)
    torch.testing.assert_close(logits(folder)[-1], reference(folder), rtol=1e-3, atol=1e-3)
