"""``sensorium bench kernels``: products of linear layers by weight format and number of rows."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sensorium.bench import report
from sensorium.kernels import ops
from sensorium.kernels.cpu.linear import levels, table
from sensorium.kernels.weight import PackedWeight, QuantizedTensor

CACHE_BYTES = 128 * 1024 * 1024
"""Bytes of weights that a measurement goes through in turn, more than the caches hold."""
GROUPS = {"int8": 0, "int4": 32}
"""Inputs that share a scale; 0: all."""

Multiply = Callable[[torch.Tensor], torch.Tensor]


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
        results["times"][form] = measure_format(
            form, arguments.shape, results["settings"]["rows"], arguments.seconds
        )
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
        found = race({name: [w.bind() for w in own] for name, own in packed.items()}, x, seconds)
        times[str(count)] = {name: round(value * 1e6, 1) for name, value in found.items()}
        for name, value in found.items():
            speed = packed[name][0].nbytes / value / 1e9
            rate = 2 * count * num_outputs * num_inputs / value / 1e9
            print(
                f"{form:<9} {count:>5}  {name:<10} {value * 1e6:>10.1f} {speed:>7.1f} {rate:>8.1f}",
                flush=True,
            )
    return times


def race(products: dict[str, list[Multiply]], x: torch.Tensor, seconds: float) -> dict[str, float]:
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
        return {type(own[0]).__name__: own}
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
