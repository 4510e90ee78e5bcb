"""Checkpoints that the formats' own tools wrote answer as these tools' own loading does.

``record.py`` has made them; it names the tools, and the metadata of the logits their versions.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sensorium.kernels import ops
from sensorium.models import loader
from sensorium.models.loading.quantize import WeightFormats
from tests.models.harness import Harness
from tests.models.loading.published.record import IDS, RECIPES, RECORDED

KEPT = {"compressed-w4a16": "int4", "gptq": "int4", "awq": "int4", "mlx-4": "int4"} | {
    "gptq-act-order": "int4",
    "mlx-3": "int4",
    "mlx-6": "int8",
    "compressed-w8a8": "int8",
    "bitsandbytes-int8": "int8",
}
"""Formats of the weights whose integers stay as they are; the others are made int8."""
ROUNDED = {"bitsandbytes-nf4", "bitsandbytes-fp4", "gptq", "gptq-act-order", "awq"}
"""Tools that round the numbers of a weight to float16."""
PRODUCTS = 0.03
"""Bound on the norm of differences beside that of the logits for products of integers, which round
activations to 8 bits; plain numbers have bounds of their own."""


def logits(folder: Path, formats: WeightFormats | None) -> tuple[torch.Tensor, str]:
    loaded = loader.load(str(folder), device="cpu", dtype="float32", formats=formats)
    harness = Harness(loaded)
    weight = harness.model.decoder.layers[0].mlp.down.weight
    return harness.prefill(harness.add(IDS)), weight.format


@pytest.mark.parametrize("name", RECIPES)
def test_logits_of_the_tool(name: str) -> None:
    folder = RECORDED / name
    expected = load_file(folder / "expected.safetensors")["logits"]
    plain, form = logits(folder, WeightFormats(dequantize=True))
    assert form == "float32"
    bound = 1e-3 if name in ROUNDED else 1e-5
    assert (plain - expected).norm() < bound * expected.norm()
    found, form = logits(folder, None)
    if ops.has_integer_products():
        assert form == KEPT.get(name, "int8")
    assert (found - expected).norm() < PRODUCTS * expected.norm()
