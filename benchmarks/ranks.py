"""Two ranks of a model beside one process: sums over gloo, and decode steps, in turn.

    python -m benchmarks.ranks [--layers N] [--rounds N] [--dtype DTYPE] [--output FILE]

Sums are those of a row and of more rows of 896 numbers between two processes of this machine. Steps
are those of a model with random weights in the shape of one of 0.5B parameters, with as many
threads in one process as in both ranks together, which replay them or launch their kernels one by
one. The tokens must be the same in float32. Memory is that of the weights of linear layers and
embeddings in one process, and in the second of two ranks.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks.harness import Report, in_turn, quickest
from benchmarks.peers.checkpoints import Shape, build
from benchmarks.steps import timed_steps

WIDTH = 896
ROWS = (1, 8, 64, 1024)
SUMS = 300
SIDES = ("one process", "two ranks", "two ranks, launched")
PROMPT_TOKENS, TOKENS, FIRST_STEPS = 16, 24, 5
ROOM: dict[str, Any] = {"num_threads": 2, "num_kv_blocks": 64, "max_model_len": 512}


def sums(rank: int, meeting: str, found: Any) -> None:
    """Sum rows of numbers over two ranks, of which this is one, and return the seconds of each."""
    import torch

    from sensorium.distributed.collectives import Collectives
    from sensorium.distributed.shard import Shard

    torch.set_num_threads(1)
    ranks = Collectives(Shard(rank, 2))
    ranks.join(Path(meeting), timedelta(seconds=60), b"benchmark")
    for rows in ROWS:
        x, seconds = torch.zeros(rows, WIDTH), []
        for _ in range(SUMS):
            began = time.perf_counter()
            ranks.all_reduce(x)
            seconds.append(time.perf_counter() - began)
        if rank == 0:
            found.put((rows, seconds))
    ranks.leave()


def measure_sums(folder: Path) -> list[dict[str, Any]]:
    """Return the time of a sum of so many rows."""
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    processes = [
        context.Process(target=sums, args=(rank, str(folder / "meeting"), found))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    rows = [found.get(timeout=120) for _ in ROWS]
    for process in processes:
        process.join()
    return [{"rows": number, **quickest(seconds)} for number, seconds in rows]


def measure_memory(model: Path, dtype: str) -> dict[str, Any]:
    """Return the bytes of weights in one process, and in the second of two ranks."""
    from sensorium.config import engine_config
    from sensorium.engine.executor import build_parts
    from sensorium.models.loading.fill import weight_bytes

    found = []
    for size in (1, 2):
        options = {"dtype": dtype, "tensor_parallel_size": size, **ROOM}
        parts = build_parts(engine_config(model=str(model), **options))
        group: Any = getattr(parts.release, "__self__", None)  # a ``RankGroup``
        whole: Any = parts.runner.model
        found.append(weight_bytes(whole) if size == 1 else group.weight_bytes[0])
        parts.release()
    return {"one process": found[0], "a rank": found[1], "ratio": found[1] / found[0]}


def measure_steps(model: Path, rounds: int, dtype: str) -> dict[str, Any]:
    """Return the time of a decode step of one sequence, of one process and of two ranks."""
    from sensorium import LLM, SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
    prompt: Any = {"prompt_token_ids": [100 + i for i in range(PROMPT_TOKENS)]}
    steps = timed_steps(threads=2)
    times: dict[str, list[float]] = defaultdict(list)
    tokens = set()
    llms = {
        side: LLM(
            str(model),
            dtype=dtype,
            tensor_parallel_size=1 if side == SIDES[0] else 2,
            enforce_eager=side == SIDES[2],
            **ROOM,
        )
        for side in SIDES
    }
    for number in range(rounds):
        for side in in_turn(SIDES, number):
            steps.clear()
            [output] = llms[side].generate([prompt], params, use_tqdm=False)
            times[side] += steps[FIRST_STEPS:]
            tokens.add(tuple(output.outputs[0].token_ids))
    for llm in llms.values():
        llm.close()
    return {side: quickest(times[side]) for side in SIDES} | {"same_tokens": len(tokens) == 1}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    settings = {name: str(value) for name, value in vars(options).items() if name != "output"}
    report = Report("ranks", settings, options.output)
    with tempfile.TemporaryDirectory() as scratch:
        found = measure_sums(Path(scratch))
        report.write(sums=found)
        for each in found:
            print(f"sum of {each['rows']} rows: {each['lower_quartile_ms']:.3f} ms", flush=True)
        build(Shape(WIDTH, options.layers, 14, 2, 4864), Path(scratch) / "model")
        memory = measure_memory(Path(scratch) / "model", options.dtype)
        print(f"weights of a rank: {memory['ratio']:.3f} of those of one process", flush=True)
        steps = measure_steps(Path(scratch) / "model", options.rounds, options.dtype)
        report.write(sums=found, memory=memory, steps=steps)
    sides = ", ".join(f"{side} {steps[side]['lower_quartile_ms']:.2f} ms" for side in SIDES)
    print(f"decode step: {sides}, same tokens: {steps['same_tokens']}")
    print(report.path)


if __name__ == "__main__":
    main()
