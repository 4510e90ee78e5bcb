"""Products with int8 and int4 weights beside float32 ones and torch's own kernels.

Run by ``benchmarks.kernels --only integers``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sensorium.kernels import ops
from sensorium.kernels.weight import QuantizedTensor

Run = Callable[[int], Any]
Race = Callable[[list[Run], float], list[float]]

SHAPES = {
    "0.5b qkv": (1152, 896),
    "0.5b gate_up": (9728, 896),
    "0.5b down": (896, 4864),
    "0.5b head": (151936, 896),
    "2b gate_up": (17920, 1536),
    "2b down": (1536, 8960),
}
ROWS = (1, 4, 8, 32, 256, 2048)
COPIES_BYTES = 192 * 1024 * 1024
"""Weights are copied up to so many bytes, so that each call finds its own in memory."""
MOST_WORK = 20e9
"""Multiply-adds above which a product is not run."""
MOST_WORK_OF_TORCH = 3e9
"""Those above which torch's own are not: they take each row at the same cost."""


def quantized_weight(bits: int, num_outputs: int, num_inputs: int) -> QuantizedTensor:
    """Return a random weight as the quantizers make them."""
    least, most, group = (-127, 127, num_inputs) if bits == 8 else (-8, 7, 32)
    values = torch.randint(least, most + 1, (num_outputs, num_inputs), dtype=torch.int8)
    scales = torch.rand(num_outputs, -(-num_inputs // group)).bfloat16().float() / most
    return QuantizedTensor(values, scales, bits, group)


def _library_uint8(values: torch.Tensor, x: torch.Tensor) -> Callable[[], Any]:
    """Return oneDNN's product of rows that are bytes already with int8 weights."""
    num_outputs = values.shape[0]
    packed = torch.ops.onednn.qlinear_prepack(values, list(x.shape))
    scales, zeros = torch.ones(num_outputs), torch.zeros(num_outputs, dtype=torch.int64)
    rows = x.float().mul(30).add(128).clamp(0, 255).to(torch.uint8)
    run = torch.ops.onednn.qlinear_pointwise
    return lambda: run(
        rows, 0.03, 128, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


def _torch_int8(values: torch.Tensor, x: torch.Tensor) -> Callable[[], Any]:
    """Return torch's product of bf16 rows with int8 weights."""
    scales = torch.ones(values.shape[0], dtype=torch.bfloat16)
    return lambda: torch.ops.aten._weight_int8pack_mm(x, values, scales)


def _torch_int4(values: torch.Tensor, x: torch.Tensor) -> Callable[[], Any]:
    """Return torch's product of bf16 rows with int4 weights in groups of 32."""
    num_outputs, num_inputs = values.shape
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.int() & 15, 1)
    scales = torch.ones(num_inputs // 32, num_outputs, 2, dtype=torch.bfloat16)
    return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 32, scales)


def _rivals(x: torch.Tensor, num_outputs: int) -> dict[str, Callable[[], Any]]:
    """Return the libraries' products that this torch has, each with one weight."""
    if x.shape[0] * x.shape[1] * num_outputs > MOST_WORK_OF_TORCH:
        return {}
    values = quantized_weight(8, num_outputs, x.shape[1]).values
    found = {}
    makers = {"onednn_u8s8": _library_uint8, "torch_int8": _torch_int8, "torch_int4": _torch_int4}
    for name, make in makers.items():
        try:
            run = make(values, x)
            run()
        except (AttributeError, RuntimeError) as error:
            print(f"{name} is not run: {str(error).splitlines()[0]}")
        else:
            found[name] = run
    return found


def integers(seconds: float, bandwidth: float, race: Race) -> dict[str, Any]:
    """Measure int8 and int4 products of bf16 rows.

    "speedup" is the time of this engine's float32 product over the kernel's, "of_limit" the
    time to read the weight at the bandwidth over the kernel's; times of the others are in
    microseconds. oneDNN's u8s8 product gets rows that are bytes already, torch's weights stay in
    the caches.
    """
    results: dict[str, Any] = {}
    for name, (num_outputs, num_inputs) in SHAPES.items():
        size = num_outputs * num_inputs
        copies = max(1, min(24, COPIES_BYTES // size))
        bound: dict[str, list[Callable[[torch.Tensor], torch.Tensor]]] = {}
        num_bytes: dict[str, int] = {}
        for bits in (8, 4):
            own = [
                ops.pack_weight(quantized_weight(bits, num_outputs, num_inputs), torch.bfloat16)
                for _ in range(copies)
            ]
            bound[f"int{bits}"] = [weight.bind() for weight in own]
            num_bytes[f"int{bits}"] = own[0].nbytes
        plain = [
            ops.pack_weight(torch.randn(num_outputs, num_inputs)).bind()
            for _ in range(max(1, copies // 4))
        ]
        for rows in ROWS:
            if rows * size > MOST_WORK:
                continue
            x = torch.randn(rows, num_inputs).to(torch.bfloat16)
            wide = x.float()
            rivals = _rivals(x, num_outputs)
            runs: list[Run] = [
                lambda i, w=wide, p=plain: p[i % len(p)](w),
                *(lambda i, x=x, p=own: p[i % len(p)](x) for own in bound.values()),
                *(lambda _, run=run: run() for run in rivals.values()),
            ]
            float_time, *times = race(runs, seconds)
            entry: dict[str, Any] = {"float32_us": round(float_time * 1e6, 1)}
            for format_name, own_time in zip(bound, times, strict=False):
                entry[format_name] = {
                    "us": round(own_time * 1e6, 1),
                    "speedup": round(float_time / own_time, 2),
                    "gmacs": round(rows * size / own_time / 1e9, 1),
                }
                if rows <= 8:
                    limit = num_bytes[format_name] / bandwidth
                    entry[format_name]["of_limit"] = round(limit / own_time, 2)
            for rival, rival_time in zip(rivals, times[len(bound) :], strict=True):
                entry[f"{rival}_us"] = round(rival_time * 1e6, 1)
            results[f"{name} {rows}"] = entry
    return results
