"""Decoding with long contexts over a KV cache in int8, beside one in the model's 16 bits, in turn.

    python -m benchmarks.int8_cache [--model FOLDER] [--threads N] [--output FILE]

``attention`` is one layer's rotary, cache write and attention of a decode step, for heads of some
models; ``prefill`` the same for 512 tokens of a prompt. ``step`` is a whole decode step of a model
of FOLDER, such as the one that ``benchmarks.smollm2`` makes: embedding, layers and logits; both
caches belong to the same weights. Keys and values are random numbers in blocks in a random order.
What int8 costs in quality is measured by ``benchmarks.quality``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import Report, in_turn
from benchmarks.kernels import equal_sequences
from sensorium.kernels import ops
from sensorium.kernels.batch import AttentionBatch, KVCacheLayout, LayerCache
from sensorium.kernels.cpu import threads

BLOCK = 32
HEADS = {"SmolLM2-135M": (9, 3, 64), "Qwen2-0.5B": (14, 2, 64), "Llama-3-8B": (32, 8, 128)}
LAYERS = 8
"""Layers with a cache of their own, used in turn, so that none is in the CPU's caches."""
LENGTHS = ((3000, 8), (3000, 1), (300, 8))
"""Tokens of a sequence, and sequences, of a decode step."""
STEPS, FIRST_STEPS = 16, 6
"""Steps of a round, and those of them that prepare: captured steps are replayed from the fifth."""


def noise(layout: KVCacheLayout, num_blocks: int) -> list[LayerCache]:
    """Caches full of random keys and values."""
    caches = ops.allocate_cache(layout, num_blocks, torch.device("cpu"))
    slots = torch.arange(num_blocks * layout.block_size)
    shape = (len(slots), layout.num_kv_heads, layout.head_dim)
    k, v = torch.randn(shape), torch.randn(shape)
    for cache in caches:
        if cache.records is None:
            cache.k.normal_()
            cache.v.normal_()
        else:
            block, offset = slots // layout.block_size, slots % layout.block_size
            cache.records.write(k, v, cache.k, cache.v, block, offset)
    return caches


def batch_of(
    caches: list[LayerCache], kv_len: int, query_len: int, count: int, rotary: int
) -> AttentionBatch:
    """``count`` sequences of ``kv_len`` tokens, their last ``query_len`` in this step."""
    per = -(-kv_len // BLOCK)
    order = torch.randperm(per * count, generator=torch.Generator().manual_seed(0))
    table = order.to(torch.int32).view(count, per)
    return equal_sequences(caches, table, kv_len, query_len, rotary)


def race(runs: dict[str, Callable[[], None]], seconds: float) -> dict[str, list[float]]:
    """Times of the runs, in turn, each at least five times."""
    times: dict[str, list[float]] = {side: [] for side in runs}
    for run in runs.values():
        run()
    end, number = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or number < 5:
        for side in in_turn(list(runs), number):
            began = time.perf_counter()
            runs[side]()
            times[side].append(time.perf_counter() - began)
        number += 1
    return times


def compared(times: dict[str, list[float]], bytes_read: dict[str, int]) -> dict[str, Any]:
    """Lower quartiles, their ratio, and the rate at which keys and values are read."""
    quartile = {side: statistics.quantiles(own, n=4)[0] for side, own in times.items()}
    half, own = quartile
    return {
        "us": {side: round(value * 1e6, 1) for side, value in quartile.items()},
        "gigabytes_per_second": {
            side: round(bytes_read[side] / value / 1e9, 1) for side, value in quartile.items()
        },
        "speedup": round(quartile[half] / quartile[own], 3),
        "rounds": len(times[own]),
    }


def attention(
    name: str, dtype: torch.dtype, kv_len: int, query_len: int, count: int, seconds: float
) -> dict[str, Any]:
    """One layer's attention over both caches."""
    heads, kv_heads, dim = HEADS[name]
    blocks = count * -(-kv_len // BLOCK)
    qkv = torch.randn(count * query_len, (heads + 2 * kv_heads) * dim).to(dtype)
    runs: dict[str, Callable[[], None]] = {}
    read = {}
    for kept in (dtype, torch.int8):
        layout = KVCacheLayout(LAYERS, kv_heads, dim, BLOCK, kept)
        batch = batch_of(noise(layout, blocks), kv_len, query_len, count, dim)
        side = str(kept).removeprefix("torch.")
        read[side] = layout.bytes_per_block * blocks // LAYERS

        def run(batch: AttentionBatch = batch, turn: list[int] = [0]) -> None:  # noqa: B006
            turn[0] += 1
            ops.rope_attention(qkv, batch, turn[0] % LAYERS, heads, kv_heads, dim, dim**-0.5)

        runs[side] = run
    return compared(race(runs, seconds), read)


def step(folder: str, dtype: str, kv_len: int, count: int, rounds: int) -> dict[str, Any]:
    """Whole decode steps of a model over both caches."""
    from sensorium.models import loader

    model: Any = loader.load(folder, dtype=dtype, device="cpu").model
    shape = model.shape
    blocks = count * -(-kv_len // BLOCK)
    ids = torch.arange(count) + 100
    positions = torch.full((count,), kv_len - 1)
    sides, read = {}, {}
    for kept in (model.dtype, torch.int8):
        layout = KVCacheLayout(shape.num_layers, shape.num_kv_heads, shape.head_dim, BLOCK, kept)
        side = str(kept).removeprefix("torch.")
        sides[side] = noise(layout, blocks)
        read[side] = layout.bytes_per_block * blocks
    times: dict[str, list[float]] = {side: [] for side in sides}

    def one(caches: list[LayerCache]) -> float:
        batch = batch_of(caches, kv_len, 1, count, shape.head_dim)
        batch.cos, batch.sin = model.rotary(positions, ())
        began = time.perf_counter()
        model.logits(model.forward(model.embed(ids), batch))
        return time.perf_counter() - began

    with torch.inference_mode():
        for number in range(rounds):
            for side in in_turn(list(sides), number):
                steps = [one(sides[side]) for _ in range(STEPS)]
                times[side] += steps[FIRST_STEPS:]
    return {**compared(times, read), "cache_bytes": read}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="checkpoint whose decode steps are measured")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each case")
    parser.add_argument("--rounds", type=int, default=4, help="of whole steps")
    parser.add_argument("--heads", nargs="+", choices=list(HEADS), default=list(HEADS))
    parser.add_argument("--only", choices=("attention", "prefill", "step"))
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    threads.configure(options.threads)
    settings = {name: str(value) for name, value in vars(options).items() if name != "output"}
    settings["model"] = options.model.name if options.model else ""
    report = Report("int8-cache", settings, options.output)
    dtype = getattr(torch, options.dtype)
    cases = {
        "attention": [(kv_len, 1, count) for kv_len, count in LENGTHS],
        "prefill": [(512, 512, 1), (2048, 512, 1)],
    }
    for section, own in cases.items():
        if options.only not in (None, section):
            continue
        found = {}
        for name in options.heads:
            for case in own:
                label = f"{name}, {case[2]} x {case[0]} tokens, {case[1]} in the step"
                found[label] = attention(name, dtype, *case, options.seconds)
                print(label, found[label], flush=True)
        report.write(**{section: found})
    if options.model and options.only in (None, "step"):
        found = {}
        for kv_len, count in LENGTHS[:2]:
            label = f"{count} x {kv_len} tokens"
            found[label] = step(str(options.model), options.dtype, kv_len, count, options.rounds)
            print("step", label, found[label], flush=True)
        report.write(step=found)
    print(report.path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
