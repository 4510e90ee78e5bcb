"""Each published format, written as its tool writes it, loads as the numbers that it stands for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sensorium.distributed.collectives import Collectives
from sensorium.distributed.shard import Shard
from sensorium.kernels import ops
from sensorium.models import loader
from sensorium.models.gguf import folder as folders
from tests.checkpoints import make_text
from tests.checkpoints import quantized as q
from tests.checkpoints.gguf import write_gguf
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


SPLIT = {"gptq": ("o",), "gptq-act-order": ("o", "down")}
"""Layers whose inputs begin, in one of two ranks, within a group of 128, or lie in any group."""
DIVIDED = (*SPLIT, "awq-32", "w8a8", "fp8-block", "nf4")
GGUF = "Q4_1"


@pytest.mark.parametrize("form", [*DIVIDED, GGUF, None])
def test_two_ranks_have_all_numbers(
    plain: Path, tmp_path: Path, form: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "cache_root", lambda: tmp_path / "caches")
    if form is None:
        folder, dense = str(plain), load_file(plain / "model.safetensors")
    elif form == GGUF:
        folder = str(tmp_path / "model.gguf")
        dense = write_gguf(plain, Path(folder), form)
    else:
        folder, dense = written(plain, tmp_path, form)
    ranks: list[Any] = [
        loader.load(folder, dtype="float32", collectives=Collectives(Shard(rank, 2))).model
        for rank in range(2)
    ]
    for index in range(len(ranks[0].decoder.layers)):
        attentions = [rank.decoder.layers[index].attention for rank in ranks]
        mlps = [rank.decoder.layers[index].mlp for rank in ranks]
        own = f"model.layers.{index}."
        expected = {
            name: torch.cat([dense[f"{own}{part}.weight"] for part in parts])
            for name, parts in LAYERS.items()
        }
        found = {
            "qkv": in_order([a.qkv for a in attentions], *sizes_of(attentions[0])),
            "o": torch.cat([numbers(attention.o) for attention in attentions], dim=1),
            "gate_up": in_order([mlp.gate_up for mlp in mlps], *[mlps[0].down.num_inputs] * 2),
            "down": torch.cat([numbers(mlp.down) for mlp in mlps], dim=1),
        }
        is_made = form in FORMS and FORMS[form].held == "made"
        for name, weight in found.items():
            error = (weight - expected[name]).norm() / expected[name].norm()
            split = name in SPLIT.get(form or "", ())
            assert error < ERROR["made" if is_made or split else "kept"], name


def sizes_of(attention: Any) -> tuple[int, int, int]:
    """Rows of q, k and v of one rank."""
    heads = attention.num_heads, attention.num_kv_heads, attention.num_kv_heads
    q, k, v = (number * attention.head_dim for number in heads)
    return q, k, v


def numbers(layer: Any) -> torch.Tensor:
    """The weight of a layer."""
    weight: torch.Tensor = layer.weight.rows(torch.arange(layer.num_outputs))
    return weight


def in_order(layers: list[Any], *sizes: int) -> torch.Tensor:
    """The rows of a fused layer's parts, of all ranks, as one process has them."""
    parts = [numbers(layer).split(sizes) for layer in layers]
    return torch.cat([torch.cat(own) for own in zip(*parts, strict=True)])
