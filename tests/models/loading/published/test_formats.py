"""Each published format, written as its tool writes it, loads as the numbers that it stands for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sensorium.kernels import ops
from sensorium.models import loader
from tests.checkpoints import make_text
from tests.checkpoints import quantized as q
from tests.models.loading.published.forms import FORMS, SIZES

IDS = list(range(30, 62))
LAYERS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Our fused layers, and the matrices of a checkpoint that each has."""
ERROR = {"kept": 1e-6, "made": 0.006}
"""Bounds on the norm of errors beside that of the numbers: scales in 16 bits; int8."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text("llama", tmp_path_factory.mktemp("plain"), **SIZES)


def written(plain: Path, folder: Path, form: str) -> tuple[str, dict[str, torch.Tensor]]:
    """A copy of the checkpoint in a published form, and the numbers that it stands for."""
    shutil.copytree(plain, folder, dirs_exist_ok=True)
    dense = q.quantize(folder, FORMS[form].write, FORMS[form].settings)
    return str(folder), dense


def layers(model: Any, dense: dict[str, torch.Tensor]) -> list[tuple[Any, torch.Tensor]]:
    """Linear layers of the decoder, and the numbers of each."""
    found = []
    for index, own in enumerate(model.decoder.layers):
        linears = {
            "qkv": own.attention.qkv,
            "o": own.attention.o,
            "gate_up": own.mlp.gate_up,
            "down": own.mlp.down,
        }
        for name, parts in LAYERS.items():
            tensors = [dense[f"model.layers.{index}.{part}.weight"] for part in parts]
            found.append((linears[name], torch.cat(tensors)))
    return found


@pytest.mark.parametrize("form", FORMS)
def test_the_numbers_of_a_format(plain: Path, tmp_path: Path, form: str) -> None:
    folder, dense = written(plain, tmp_path, form)
    model: Any = loader.load(folder, device="cpu", dtype="float32").model
    held = FORMS[form].held
    for layer, expected in layers(model, dense):
        rows = layer.weight.rows(torch.arange(expected.shape[0]))
        error = (rows - expected).norm() / expected.norm()
        if not ops.has_integer_products():
            assert error == 0
            continue
        assert layer.weight.format == ("int8" if held == "made" else held)
        assert error < ERROR["made" if held == "made" else "kept"]
