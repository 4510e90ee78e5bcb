"""Blocks are taken apart as the package of the format dequantizes them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from sensorium.models.gguf.blocks import GRIDS, SIZES
from sensorium.models.gguf.kinds import KINDS
from tests.checkpoints.gguf import K_KINDS, QUANTIZED, blocks


@pytest.mark.parametrize("kind", [*QUANTIZED, *K_KINDS])
def test_numbers_are_those_of_the_package(kind: str) -> None:
    rng = np.random.default_rng(0)
    own = GGMLQuantizationType[kind]
    if kind in QUANTIZED:
        raw = gguf.quants.quantize(rng.normal(size=(6, 512)).astype(np.float32), own)
    else:
        raw = blocks(kind, (6, 512), rng)
    expected = gguf.quants.dequantize(raw, own).reshape(6, 512)
    codes = GRIDS[kind].take_apart(torch.from_numpy(raw).reshape(-1, SIZES[kind]))
    found = codes.floats().view(6, 512).numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-7)
    group = codes.values.shape[1] // codes.scales.shape[1]
    assert group == GRIDS[kind].group
    assert (codes.minimums is not None) == GRIDS[kind].has_minimums
    if GRIDS[kind].bits == 4:
        least = 0 if GRIDS[kind].has_minimums else -8
        assert least <= int(codes.values.min()) <= int(codes.values.max()) <= least + 15


def test_sizes_are_those_of_the_package() -> None:
    for number, kind in KINDS.items():
        values, num_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType(number)]
        assert (kind.name, kind.values) == (GGMLQuantizationType(number).name, values)
        assert kind.num_bytes == num_bytes
    assert GRIDS.keys() == {kind.name for kind in KINDS.values() if not kind.is_plain}
