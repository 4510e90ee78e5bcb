"""The CPU kernels against plain torch and against the machine's limits.

Ratios within one run, as JSON.

    python -m benchmarks.kernels [--threads N] [--seconds S] [--only PART] [--output FILE]

Both sides of a ratio are run in turn, many times, and compared at their lower quartiles, so that
other work on the machine troubles both alike. "speedup" is reference time over kernel time;
"of_limit" is the limit's time over kernel time, where the limit is the time to read the bytes at
the bandwidth measured in the same run. With one thread, time is that of its processor, so that a
busy machine does not matter much. "invariance" has what it costs that a row is the same bits in
every step: attention of long spans against torch's flash attention, whose bits depend on the step,
and products of as many rows as they are made against those of one. "prefill" and "varlen" have the
attention of prompts and of encoders beside torch's; "of_gemm" is their rate over that of a float32
product of two square matrices. "tiles" has the kernels with matrix tiles (AMX) beside those without.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sensorium.kernels.cpu import threads

threads.prepare()

import torch  # noqa: E402 - the waiting policy must be set before
import torch.nn.functional as F  # noqa: E402

from benchmarks.harness import Report, add_flags, flag, settings_of  # noqa: E402
from benchmarks.integer_products import integers  # noqa: E402
from benchmarks.tiles import tiles  # noqa: E402
from sensorium.kernels import ops, reference  # noqa: E402
from sensorium.kernels.batch import (  # noqa: E402
    AttentionBatch,
    AttentionVariant,
    KVCacheLayout,
    LayerCache,
)
from sensorium.kernels.cpu import elementwise as cpu_elementwise  # noqa: E402
from sensorium.kernels.cpu.attention import paged  # noqa: E402
from sensorium.kernels.cpu.attention.route import VECTORS  # noqa: E402
from sensorium.kernels.cpu.linear import levels, onednn  # noqa: E402

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INNER, VOCAB, BLOCK = 896, 14, 2, 64, 4864, 151936, 32
NUM_LAYERS = 24
"""Copies of every weight and cache: each call finds its data in memory, not in the processor's
caches."""
DTYPE = torch.bfloat16

Run = Callable[[int], Any]


def quartile(times: list[float]) -> float:
    """The lower quartile."""
    return sorted(times)[len(times) // 4]


def race(runs: list[Run], seconds: float) -> list[float]:
    """Seconds of each run's call, the runs taking turns over the layers; lower quartiles."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        run(0)
    end = time.perf_counter() + seconds
    layer = 0
    while time.perf_counter() < end or layer < 5:
        for run, own in zip(runs, times, strict=True):
            start = clock()
            run(layer % NUM_LAYERS)
            own.append(clock() - start)
        layer += 1
    return [quartile(own) for own in times]


def read_bandwidth(seconds: float) -> float:
    """Bytes per second of summing a large tensor."""
    numbers = torch.ones(64 * 1024 * 1024)
    return numbers.nbytes / race([lambda _: numbers.sum()], seconds)[0]


def elementwise(seconds: float) -> dict[str, Any]:
    """Norm, SiLU and argmax at 1 and 32 rows, and for a prompt of 512."""
    results = {}
    weight = torch.ones(HIDDEN, dtype=DTYPE)
    normed, added = ops.bind_norm(weight, 1e-6)
    for rows in (1, 32, 512):
        x = torch.randn(rows, HIDDEN).to(DTYPE)
        residual, both = torch.zeros_like(x), torch.randn(rows, 2 * INNER).to(DTYPE)
        pairs: dict[str, tuple[Run, Run]] = {
            "rms_norm": (
                lambda _, x=x: F.rms_norm(x, (HIDDEN,), weight, 1e-6),
                lambda _, x=x: normed(x),
            ),
            "add_rms_norm": (
                lambda _, x=x, r=residual: F.rms_norm(r.add_(x), (HIDDEN,), weight, 1e-6),
                lambda _, x=x, r=residual: added(r, x),
            ),
            "silu_mul": (
                lambda _, b=both: F.silu(b[:, :INNER]) * b[:, INNER:],
                lambda _, b=both: cpu_elementwise.silu_mul(b),
            ),
        }
        if rows <= 32:
            logits = torch.randn(rows, VOCAB).to(DTYPE)
            pairs["argmax"] = (
                lambda _, t=logits: t.argmax(-1),
                lambda _, t=logits: ops.argmax(t),
            )
        for name, pair in pairs.items():
            plain, own = race(list(pair), seconds)
            results[f"{name} {rows}"] = {
                "us": round(own * 1e6, 1),
                "speedup": round(plain / own, 2),
            }
    return results


def linears(seconds: float, bandwidth: float) -> dict[str, Any]:
    """Packed linear layers of a decoder and its head against ``F.linear``."""
    results = {}
    shapes = {"qkv": (1152, HIDDEN), "gate_up": (2 * INNER, HIDDEN), "down": (HIDDEN, INNER)}
    for name, (outputs, inputs) in {**shapes, "head": (VOCAB, HIDDEN)}.items():
        copies = 1 if name == "head" else NUM_LAYERS
        plain = [torch.randn(outputs, inputs).to(DTYPE) for _ in range(copies)]
        packed = [ops.bind_linear(ops.pack_weight(weight), None) for weight in plain]
        for rows in (1, 8, 32, 512):
            if name == "head" and rows == 512:
                continue
            x = torch.randn(rows, inputs).to(DTYPE)
            runs: list[Run] = [
                lambda i, x=x, w=plain: F.linear(x, w[i % len(w)]),
                lambda i, x=x, p=packed: p[i % len(p)](x),
            ]
            slow, own = race(runs, seconds)
            limit = 2 * outputs * inputs / bandwidth
            results[f"{name} {rows}"] = {
                "us": round(own * 1e6, 1),
                "speedup": round(slow / own, 2),
                "tflops": round(2 * rows * outputs * inputs / own / 1e12, 3),
                **({"of_limit": round(limit / own, 2)} if rows <= 8 else {}),
            }
    return results


def batch_of(
    kv_len: int,
    query_len: int,
    count: int,
    dtype: torch.dtype = DTYPE,
    kv_heads: int = KV_HEADS,
    head_dim: int = HEAD_DIM,
    num_layers: int = NUM_LAYERS,
) -> AttentionBatch:
    """``count`` equal sequences with blocks in order."""
    per = -(-kv_len // BLOCK)
    layout = KVCacheLayout(num_layers, kv_heads, head_dim, BLOCK, dtype)
    caches = ops.allocate_cache(layout, per * count, torch.device("cpu"))
    for cache in caches:
        cache.k.normal_()
        cache.v.normal_()
    table = torch.arange(per * count, dtype=torch.int32).view(count, per)
    return equal_sequences(caches, table, kv_len, query_len, head_dim)


def equal_sequences(
    caches: list[LayerCache], table: torch.Tensor, kv_len: int, query_len: int, rotary: int
) -> AttentionBatch:
    """Sequences of ``kv_len`` tokens, one for each row of ``table``, the block table.

    Their last ``query_len`` tokens are in this step.
    """
    count = len(table)
    angle = torch.rand(count * query_len, rotary // 2)
    return AttentionBatch(
        query_start=torch.arange(count + 1, dtype=torch.int32) * query_len,
        kv_len=torch.full((count,), kv_len, dtype=torch.int32),
        block_table=table,
        num_decodes=count if query_len == 1 else 0,
        max_query_len=query_len,
        max_kv_len=kv_len,
        cos=angle.cos(),
        sin=angle.sin(),
        caches=caches,
        query_lens=[query_len] * count,
        kv_lens=[kv_len] * count,
    )


def attention(seconds: float, bandwidth: float) -> dict[str, Any]:
    """Rotary, cache write and attention of one layer against the reference."""
    results = {}
    cases = [(100, 1, 1), (3000, 1, 1), (100, 1, 8), (3000, 1, 8), (100, 1, 32)]
    for kv_len, query_len, count in [*cases, (1016, 16, 1), (512, 512, 1), (2048, 512, 1)]:
        batch = batch_of(kv_len, query_len, count)
        qkv = torch.randn(count * query_len, (HEADS + 2 * KV_HEADS) * HEAD_DIM).to(DTYPE)
        shape = (HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM**-0.5)
        runs: list[Run] = [
            lambda i, b=batch, q=qkv, s=shape: reference.rope_attention(q, b, i, *s),
            lambda i, b=batch, q=qkv, s=shape: ops.rope_attention(q, b, i, *s),
        ]
        plain, own = race(runs, seconds)
        seen = count * query_len * (kv_len - (query_len - 1) / 2)
        entry = {
            "us": round(own * 1e6, 1),
            "speedup": round(plain / own, 2),
            "gflops": round(4 * seen * HEADS * HEAD_DIM / own / 1e9, 1),
        }
        if query_len == 1:
            read = count * kv_len * KV_HEADS * HEAD_DIM * 2 * DTYPE.itemsize
            entry["of_limit"] = round(read / bandwidth / own, 2)
        results[f"{count} x {query_len} of {kv_len}"] = entry
    return results


def invariance(seconds: float) -> dict[str, Any]:
    """Attention of spans by the paged kernel against flash attention, and small products against
    those of one row.
    """
    results: dict[str, Any] = {}
    heads = {"14/2 of 64": (14, 2, 64), "32/32 of 96": (32, 32, 96)}
    spans = ((128, 128), (512, 512), (1024, 1024), (2048, 512))
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for shape, (num_heads, kv_heads, dim) in heads.items():
            for kv_len, query_len in spans:
                fixed, free = (
                    batch_of(kv_len, query_len, 1, dtype, kv_heads, dim, 1) for _ in range(2)
                )
                free.invariant = False
                qkv = torch.randn(query_len, (num_heads + 2 * kv_heads) * dim).to(dtype)
                run = (0, num_heads, kv_heads, dim, dim**-0.5)
                flash, own = race(
                    [
                        lambda _, b=free, q=qkv, r=run: paged.rope_attention(
                            q, b, *r, route=VECTORS
                        ),
                        lambda _, b=fixed, q=qkv, r=run: ops.rope_attention(q, b, *r),
                    ],
                    seconds,
                )
                assert next(iter(free.scratch.values())).spans, "flash attention was not used"
                results[f"attention {name} {shape}: {query_len} rows of {kv_len}"] = {
                    "us": round(own * 1e6, 1),
                    "speedup": round(flash / own, 2),
                }
        for outputs, inputs in ((1152, HIDDEN), (2 * INNER, HIDDEN), (HIDDEN, INNER)):
            plain = [torch.randn(outputs, inputs).to(dtype) for _ in range(NUM_LAYERS)]
            packed = [onednn.pack_weight(weight) for weight in plain]
            direct = [onednn._product(w.data, None, w.packed, "none", "") for w in packed]
            bound = [ops.bind_linear(weight, None) for weight in packed]
            x = torch.randn(1, inputs).to(dtype)
            one, own = race(
                [
                    lambda i, d=direct, x=x: d[i](x),
                    # Another weight, as that one is in the processor's caches now.
                    lambda i, b=bound, x=x: b[i - NUM_LAYERS // 2](x),
                ],
                seconds,
            )
            results[f"product {name} 1 row {outputs} x {inputs}"] = {
                "rows": packed[0].row_multiple,
                "us": round(own * 1e6, 1),
                "speedup": round(one / own, 2),
            }
    return results


def gemm_rate(seconds: float) -> float:
    """Multiply-adds a second, times two, of a float32 product of two matrices of 1024 x 1024."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    return 2 * 1024**3 / race([lambda _: a @ b], seconds)[0]


def rates(flops: float, gemm: float, own: float, torchs: float | None = None) -> dict[str, float]:
    """Figures of one shape: time and rate of the kernel, beside torch's and that of a product."""
    return {
        "us": round(own * 1e6, 1),
        "gflops": round(flops / own / 1e9, 1),
        "of_gemm": round(flops / own / gemm, 2),
        **({} if torchs is None else {"speedup": round(torchs / own, 2)}),
    }


def has_torch_attention(dtype: torch.dtype) -> bool:
    """Without units for it, torch's attention in 16 bits takes minutes: there it is not measured."""
    return dtype == torch.float32 or levels.has_bf16_units()


def prefill(seconds: float) -> dict[str, Any]:
    """Causal attention of whole prompts against torch's, which reads no cache and rotates nothing.

    With a window, too: there torch gets none, and so computes more.
    """
    results: dict[str, Any] = {}
    gemm = gemm_rate(seconds)
    for dtype in (torch.float32, torch.bfloat16):
        for num_heads, kv_heads, dim in ((14, 2, 64), (12, 2, 128)):
            for length, window in ((256, None), (512, None), (2048, None), (2048, 512)):
                batch = batch_of(length, length, 1, dtype, kv_heads, dim, 1)
                batch.invariant = True
                qkv = torch.randn(length, (num_heads + 2 * kv_heads) * dim).to(dtype)
                heads = [torch.randn(1, n, length, dim) for n in (num_heads, kv_heads, kv_heads)]
                q, k, v = (own.to(dtype) for own in heads)
                run = (0, num_heads, kv_heads, dim, dim**-0.5)
                variant = AttentionVariant(window)
                runs: list[Run] = [
                    lambda _, b=batch, x=qkv, r=run, a=variant: ops.rope_attention(
                        x, b, *r, variant=a
                    ),
                    lambda _, q=q, k=k, v=v: F.scaled_dot_product_attention(
                        q, k, v, is_causal=True, enable_gqa=True
                    ),
                ]
                times = race(runs[: 1 + has_torch_attention(dtype)], seconds)
                seen = sum(min(n, window or n) for n in range(1, length + 1))
                name = str(dtype).removeprefix("torch.")
                shape = f"{name} {num_heads}/{kv_heads} of {dim}: {length}"
                results[shape + (f", window {window}" if window else "")] = rates(
                    4 * num_heads * dim * seen, gemm, *times
                )
    return results


TOWERS = {
    "qwen2_vl, an image of 640 x 480": (16, 80, 1564, 1),
    "qwen2_vl, one of 1120 x 840": (4, 80, 4800, 1),
    "qwen2_5_vl, windows": (16, 80, 64, 24),
    "siglip so400m 384": (16, 72, 729, 1),
    "clip large 336": (16, 64, 577, 1),
    "whisper small": (12, 64, 1500, 1),
}
"""Heads, their size, rows of a segment and segments. Of the largest a quarter of the heads."""


def varlen(seconds: float) -> dict[str, Any]:
    """Attention of towers against torch's, one segment or batch."""
    results: dict[str, Any] = {}
    gemm = gemm_rate(seconds)
    for dtype in (torch.float32, torch.bfloat16):
        for tower, (heads, dim, length, count) in TOWERS.items():
            q, k, v = torch.randn(length * count, 3, heads, dim).to(dtype).unbind(1)
            starts = list(range(0, length * count + 1, length))
            run = (q, k, v, starts, dim**-0.5)
            runs: list[Run] = [
                lambda _, r=run: ops.varlen_attention(*r),
                lambda _, r=run: reference.varlen_attention(*r),
            ]
            times = race(runs[: 1 + has_torch_attention(dtype)], seconds)
            name = f"{str(dtype).removeprefix('torch.')} {tower}: {heads} of {dim}, {length} rows"
            flops = 4 * heads * dim * length**2 * count
            results[name] = rates(flops, gemm, *times)
    return results


def instruction_sets() -> list[str]:
    """The instruction sets that kernels are compiled for, of those that matter."""
    from numba.core.registry import cpu_target

    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    known = ("avx2", "avx512f", "avx512bf16", "amx-bf16", "amx-int8")
    return [feature for feature in known if f"+{feature}" in features.split(",")]


PARTS = (
    *("elementwise", "linear", "attention", "prefill", "varlen", "integers", "invariance"),
    "tiles",
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Threads, the time of each comparison, and which parts."""

    threads: int | None = flag(None, "all cores when not given", type=int)
    seconds: float = flag(1.0, "of each comparison", quick=0.01)
    only: str | None = flag(None, choices=PARTS)


def measure(settings: Settings) -> dict[str, Any]:
    """Run the parts."""
    num_threads = threads.configure(settings.threads).number
    # Matrix tiles are not needed for flash attention, only for its being chosen.
    paged.flash_pays = lambda dtype: True
    with torch.inference_mode():
        warm_up = ops.warm_up(DTYPE)
        bandwidth = read_bandwidth(settings.seconds)
        parts: dict[str, Callable[[], dict[str, Any]]] = {
            "elementwise": lambda: elementwise(settings.seconds),
            "linear": lambda: linears(settings.seconds, bandwidth),
            "attention": lambda: attention(settings.seconds, bandwidth),
            "prefill": lambda: prefill(settings.seconds),
            "varlen": lambda: varlen(settings.seconds),
            "integers": lambda: integers(settings.seconds, bandwidth, race),
            "invariance": lambda: invariance(settings.seconds),
            "tiles": lambda: tiles(settings.seconds, race, batch_of),
        }
        return {
            "instruction_sets": instruction_sets(),
            "threads": num_threads,
            "warm_up_s": round(warm_up, 2),
            "read_gb_per_s": round(bandwidth / 1e9, 1),
            **{name: part() for name, part in parts.items() if settings.only in (None, name)},
        }


def main() -> None:
    """Measure, write the JSON and print it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a trial, whose figures mean nothing")
    parser.add_argument("--output", type=Path, help="default: none, it is only printed")
    add_flags(parser, [Settings])
    options = parser.parse_args()
    settings = settings_of(Settings, options, quick=options.quick)
    found = measure(settings)
    report = Report("kernels", dataclasses.asdict(settings), options.output)
    if options.output is not None:
        report.write(**found)
    print(json.dumps({**report.content, **found}, indent=2))


if __name__ == "__main__":
    main()
