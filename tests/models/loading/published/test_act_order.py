"""Weights of GPTQ whose inputs were quantized in the order of their size, and are in any group."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sensorium.kernels import ops
from sensorium.kernels.cpu.linear.permuted import PermutedWeight
from sensorium.models import loader
from sensorium.models.loading.quantize import WeightFormats
from sensorium.models.loading.weights_cache import CacheSettings
from tests.checkpoints import make_text
from tests.checkpoints import quantized as q
from tests.models.harness import Harness
from tests.models.loading.published.forms import FORMS, SIZES

pytestmark = pytest.mark.skipif(
    not ops.has_integer_products(), reason="this CPU has no products of quantized weights"
)
FORM = FORMS["gptq-act-order"]
KEPT = "in act-order: integers kept as they are (int4)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_text("llama", tmp_path_factory.mktemp("act-order"), **SIZES)
    q.quantize(folder, FORM.write, FORM.settings)
    return folder


def load(folder: Path, **options: Any) -> loader.LoadedModel:
    return loader.load(str(folder), device="cpu", dtype="bfloat16", **options)


def test_the_second_start_takes_what_the_first_kept(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"formats": WeightFormats(), "weights_cache": CacheSettings(tmp_path, 1 << 30)}
    logits = []
    for state in ("miss", "hit"):
        with caplog.at_level(logging.INFO):
            loaded = load(folder, **options)
        model: Any = loaded.model
        assert f"weights cache: {state}" in caplog.text
        assert isinstance(model.decoder.layers[0].mlp.down.weight, PermutedWeight)
        harness = Harness(loaded)
        logits.append(harness.prefill(harness.add(range(30, 60))))
        assert (KEPT in caplog.text) == (state == "miss")
        caplog.clear()
    assert torch.equal(*logits)


def test_replayed_steps_give_the_tokens_of_launched_ones(folder: Path) -> None:
    tokens = []
    for replay in (True, False):
        harness = Harness(load(folder, replay=replay))
        tokens.append(harness.greedy(harness.add(range(30, 60)), 12))
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("change", ["another order", "unequal groups"])
def test_parts_of_a_layer_that_do_not_go_together_are_made_int8(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: str
) -> None:
    copy = make_text("llama", tmp_path, **SIZES)
    dense = q.quantize(copy, FORM.write, FORM.settings)
    name = "model.layers.0.self_attn.k_proj"
    tensors = load_file(copy / "model.safetensors")
    order = tensors[f"{name}.g_idx"]
    other = order.flip(0).contiguous() if change == "another order" else order.clamp(max=2)
    tensors[f"{name}.g_idx"] = other
    save_file(tensors, copy / "model.safetensors")
    with caplog.at_level(logging.INFO):
        loaded = loader.load(str(copy), device="cpu", dtype="float32")
    model: Any = loaded.model
    layer = model.decoder.layers[0].attention.qkv
    assert layer.weight.format == "int8"
    assert "made int8, as they are not integers of one kind" in caplog.text
    assert KEPT in caplog.text
    codes = tensors[f"{name}.qweight"].t().contiguous().view(torch.uint8)
    codes = torch.stack((codes & 0x0F, codes >> 4), dim=-1).flatten(1).float() - 8
    expected = codes * tensors[f"{name}.scales"].t().float()[:, other.long()]
    first = dense["model.layers.0.self_attn.q_proj.weight"].shape[0]
    rows = layer.weight.rows(torch.arange(first, first + expected.shape[0]))
    assert (rows - expected).norm() < 0.006 * expected.norm()
