"""Kernels with matrix tiles (AMX) beside those without.

Run by ``benchmarks.kernels --only tiles``. On CPUs without tiles the part says so and is empty.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.integer_products import quantized_weight
from sensorium.kernels import ops
from sensorium.kernels.batch import AttentionBatch
from sensorium.kernels.cpu import amx, tile_check
from sensorium.kernels.cpu.attention import paged, varlen_vectors
from sensorium.kernels.cpu.attention.route import VECTORS, Route
from sensorium.kernels.cpu.attention.tiles import checks, varlen
from sensorium.kernels.cpu.attention.tiles.causal import FEW_ROWS
from sensorium.kernels.cpu.linear import tiles as linear_tiles
from sensorium.kernels.cpu.linear.grouped.int4 import Int4Weight
from sensorium.kernels.cpu.linear.int8 import Int8Weight

Run = Callable[[int], Any]
Race = Callable[[list[Run], float], list[float]]

HEADS = ((14, 2, 64), (12, 2, 128), (32, 8, 128))
SPANS = ((1000, 1), (1000, 2), (1000, 8), (1000, 32), (512, 512), (2048, 512), (2048, 2048))
"""KV and query lengths of one sequence."""
ALWAYS, NEVER = 1, 1 << 30
SHAPES = ((9728, 896), (896, 4864))
"""Outputs and inputs of products."""
ROWS = (1, 8, 16, 32, 128, 512, 2048)
COPIES = 16
"""Weights that calls take in turn, so that each finds its own in memory."""


def tiles(seconds: float, race: Race, batch_of: Callable[..., AttentionBatch]) -> dict[str, Any]:
    """Measure each kernel with tiles against the others; times in microseconds.

    Of attention of decoders: "tiles" for all rows, "pairs" (the tiles' sums in vectors),
    "vectors" (the kernel of other CPUs), and torch's flash attention.
    """
    unit = amx.unit()
    if unit is None:
        print("this CPU has no matrix tiles (AMX): nothing to measure")
        return {}
    outcomes = ("other numbers", "right numbers", "the same bits")
    results: dict[str, Any] = {
        "checks": {
            "decoders": outcomes[tile_check.outcome("attention of decoders", checks.causal, unit)],
            "encoders": outcomes[
                tile_check.outcome("attention of encoders", checks.encoders, unit)
            ],
        }
    }
    for num_heads, kv_heads, dim in HEADS:
        for kv_len, query_len in SPANS:
            name = f"decoder {num_heads}/{kv_heads} of {dim}: {query_len} rows of {kv_len}"
            results[name] = _decoder(
                unit, seconds, race, batch_of, num_heads, kv_heads, dim, kv_len, query_len
            )
    for heads, dim, length, count in ((16, 80, 1564, 1), (16, 80, 64, 24), (16, 72, 729, 1)):
        q, k, v = torch.randn(length * count, 3, heads, dim).bfloat16().unbind(1)
        run = (q, k, v, list(range(0, length * count + 1, length)), dim**-0.5)
        own, plain = race(
            [
                lambda _, r=run: varlen.attention_by(unit, *r),
                lambda _, r=run: varlen_vectors.varlen_attention(*r),
            ],
            seconds,
        )
        results[f"encoder {heads} of {dim}: {count} x {length} rows"] = {
            "tiles_us": round(own * 1e6, 1),
            "vectors_us": round(plain * 1e6, 1),
        }
    return results | _integers(seconds, race)


def _integers(seconds: float, race: Race) -> dict[str, dict[str, float]]:
    """Measure products with int8 and int4 weights, of bf16 rows."""
    results: dict[str, dict[str, float]] = {}
    for name in linear_tiles.units():
        for num_outputs, num_inputs in SHAPES:
            for quantized in (quantized_weight(bits, num_outputs, num_inputs) for bits in (8, 4)):
                packed = [ops.pack_weight(quantized, torch.bfloat16) for _ in range(COPIES)]
                own = [weight for weight in packed if isinstance(weight, Int8Weight | Int4Weight)]
                by_tiles = [weight.bind_form(name) for weight in own]
                by_vectors = [weight.bind_form(weight.form) for weight in own]
                for rows in ROWS:
                    x = torch.randn(rows, num_inputs).bfloat16()
                    runs: list[Run] = [
                        lambda i, p=product, x=x: p[i % len(p)](x)
                        for product in (by_tiles, by_vectors)
                    ]
                    times = race(runs, seconds)
                    key = f"{quantized.format} {num_outputs} x {num_inputs}: {rows} rows"
                    results[key] = {
                        f"{kind}_us": round(value * 1e6, 1)
                        for kind, value in zip(("tiles", "vectors"), times, strict=True)
                    }
    return results


def _decoder(
    unit: amx.Unit,
    seconds: float,
    race: Race,
    batch_of: Callable[..., AttentionBatch],
    num_heads: int,
    kv_heads: int,
    dim: int,
    kv_len: int,
    query_len: int,
) -> dict[str, float]:
    """Measure one shape of attention of decoders."""
    qkv = torch.randn(query_len, (num_heads + 2 * kv_heads) * dim).bfloat16()
    shape = (0, num_heads, kv_heads, dim, dim**-0.5)
    routes = {
        "tiles": Route(unit, ALWAYS),
        "pairs": Route(unit, NEVER),
        "as_chosen": Route(unit, FEW_ROWS),
        "vectors": VECTORS,
    }
    runs: dict[str, Run] = {}
    for name, route in routes.items():
        batch = batch_of(kv_len, query_len, 1, torch.bfloat16, kv_heads, dim, 1)
        runs[name] = lambda _, b=batch, r=route: paged.rope_attention(qkv, b, *shape, route=r)
    if query_len > paged.SHORT_SPAN:
        free = batch_of(kv_len, query_len, 1, torch.bfloat16, kv_heads, dim, 1)
        free.invariant = False
        runs["flash"] = lambda _: paged.rope_attention(qkv, free, *shape, route=VECTORS)
    times = race(list(runs.values()), seconds)
    return {f"{name}_us": round(own * 1e6, 1) for name, own in zip(runs, times, strict=True)}
