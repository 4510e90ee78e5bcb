"""``sensorium bench kernels``: products of linear layers by weight format and number of rows."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sensorium.bench import report
from sensorium.kernels import ops
from sensorium.kernels.batch import AttentionBatch
from sensorium.kernels.cpu import amx
from sensorium.kernels.cpu.attention import paged, route
from sensorium.kernels.cpu.attention.tiles import checks
from sensorium.kernels.cpu.linear import levels, table, tiles
from sensorium.kernels.cpu.linear.grouped.int4 import Int4Weight
from sensorium.kernels.cpu.linear.int8 import Int8Weight
from sensorium.kernels.weight import PackedWeight, QuantizedTensor

CACHE_BYTES = 128 * 1024 * 1024
"""Bytes of weights that a measurement goes through in turn, more than the caches hold."""
GROUPS = {"int8": 0, "int4": 32}
"""Inputs that share a scale; 0: all."""

CONTEXT = 1024
"""Tokens that rows of attention attend to at least."""

Multiply = Callable[[torch.Tensor], torch.Tensor]
Shape = tuple[int, int, int, int, float]
"""Layer, heads, KV heads, their size, scale."""


def run(arguments: argparse.Namespace) -> int:
    """Measure, print a table, and write what was asked for."""
    results = report.header(
        "kernels",
        {
            "threads": torch.get_num_threads(),
            "shape": list(arguments.shape),
            "rows": sorted(set(arguments.rows)),
            "seconds": arguments.seconds,
        },
    )
    results["level"] = levels.level()
    results["read_gb_per_second"] = round(reading_speed(), 1)
    results["times"] = {}
    print(f"CPU level {levels.level()}, reading {results['read_gb_per_second']} GB/s")
    print(f"{'format':<9} {'rows':>5}  {'product':<10} {'us':>10} {'GB/s':>7} {'GFLOP/s':>8}")
    for form in dict.fromkeys(arguments.formats):
        rows = results["settings"]["rows"]
        if form == route.FORMAT:
            times = measure_attention(rows, arguments.seconds)
        else:
            times = measure_format(form, arguments.shape, rows, arguments.seconds)
        results["times"][form] = times
    if arguments.output is not None:
        report.write_json(results, arguments.output)
    if arguments.write:
        kept = {name: results[name] for name in ("machine", "settings", "level", "times")}
        report.write_json(kept, table.own_file())
        table.choose_again()
        print(f"written to {table.own_file()}")
    print(ops.products())
    return 0


def reading_speed() -> float:
    """Return the GB/s at which all threads read memory, the best of some tries."""
    data = torch.zeros(CACHE_BYTES, dtype=torch.float32)
    best = min(_seconds(data.sum) for _ in range(5))
    return data.nbytes / best / 1e9


def measure_format(
    form: str, shape: tuple[int, int], rows: Sequence[int], seconds: float
) -> dict[str, dict[str, float]]:
    """Return microseconds by number of rows and product, for weights of (N, K) in a format."""
    num_outputs, num_inputs = shape
    packed = _packed(form, shape)
    dtype = torch.float32 if form in GROUPS else table.dtype_of(form)
    times: dict[str, dict[str, float]] = {}
    for count in rows:
        x = torch.randn(count, num_inputs).to(dtype)
        bound = {name: [_bound(name, weight) for weight in own] for name, own in packed.items()}
        found = race(bound, x, seconds)
        times[str(count)] = {name: round(value * 1e6, 1) for name, value in found.items()}
        for name, value in found.items():
            speed = packed[name][0].nbytes / value / 1e9
            rate = 2 * count * num_outputs * num_inputs / value / 1e9
            print(
                f"{form:<9} {count:>5}  {name:<10} {value * 1e6:>10.1f} {speed:>7.1f} {rate:>8.1f}",
                flush=True,
            )
    return times


def measure_attention(rows: Sequence[int], seconds: float) -> dict[str, dict[str, float]]:
    """Return microseconds of attention of a decoder in bf16, by query rows and kernel.

    Rows of one sequence, the last of CONTEXT tokens or as many as there are rows, in the shape of
    Qwen2-0.5B.
    """
    unit = amx.unit()
    routes = {route.NO_TILES: route.VECTORS}
    if unit is not None:
        routes[route.TILES] = route.Route(unit)
    heads, kv_heads, dim = 14, 2, 64
    times: dict[str, dict[str, float]] = {}
    for count in rows:
        generator = torch.Generator().manual_seed(0)
        step = checks.make_step([(max(count, CONTEXT), count)], kv_heads, dim, generator)
        shape = (0, heads, kv_heads, dim, dim**-0.5)
        bound = {
            name: [functools.partial(_attend, step, shape, own)] for name, own in routes.items()
        }
        x = torch.randn(count, (heads + 2 * kv_heads) * dim).bfloat16()
        found = race(bound, x, seconds)
        times[str(count)] = {name: round(value * 1e6, 1) for name, value in found.items()}
        for name, value in found.items():
            print(f"{route.FORMAT:<9} {count:>5}  {name:<10} {value * 1e6:>10.1f}", flush=True)
    return times


def _attend(step: AttentionBatch, shape: Shape, own: route.Route, x: torch.Tensor) -> torch.Tensor:
    """Return the attention of a step's rows by one kernel."""
    return paged.rope_attention(x, step, *shape, route=own)


def _bound(name: str, weight: PackedWeight) -> Multiply:
    """Return a weight's product: by matrix tiles, or without them where a weight has both."""
    if isinstance(weight, Int8Weight | Int4Weight):
        return weight.bind_form(next(iter(tiles.units())) if name == tiles.NAME else weight.form)
    return weight.bind()


def race(
    products: Mapping[str, Sequence[Multiply]], x: torch.Tensor, seconds: float
) -> dict[str, float]:
    """Return seconds per product, the least of runs in turn, each with another weight.

    Other processes make runs longer, never shorter.
    """
    runs: dict[str, list[float]] = {name: [] for name in products}
    for own in products.values():
        own[0](x)
    end, turn = time.perf_counter() + seconds * len(products), 0
    while time.perf_counter() < end or turn < 4:
        for name, own in products.items():
            weight = own[turn % len(own)]
            runs[name].append(_seconds(lambda: weight(x)))  # noqa: B023 - called at once
        turn += 1
    return {name: min(own) for name, own in runs.items()}


def _packed(form: str, shape: tuple[int, int]) -> dict[str, list[PackedWeight]]:
    """Return weights of one format, packed for each product that this CPU has for it."""
    num_outputs, num_inputs = shape
    size = num_outputs * num_inputs
    if form in GROUPS:
        bits, group = (8 if form == "int8" else 4), GROUPS[form] or num_inputs
        values = torch.randint(-7, 8, shape, dtype=torch.int8)
        scales = torch.rand(num_outputs, -(-num_inputs // group)) / 8
        quantized = QuantizedTensor(values, scales, bits, group)
        count = max(1, CACHE_BYTES // (size * bits // 8))
        own = [ops.pack_weight(quantized, torch.float32) for _ in range(count)]
        products = {type(own[0]).__name__: own}
        return products | ({tiles.NAME: own} if tiles.units() else {})
    dtype = table.dtype_of(form)
    count = max(1, CACHE_BYTES // (size * dtype.itemsize))
    weights = [(torch.randn(shape) * num_inputs**-0.5).to(dtype) for _ in range(count)]
    return {
        name: [product.pack(weight) for weight in weights]
        for name, product in table.PRODUCTS.items()
        if product.available(form)
    }


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
