"""Decode steps replayed as one launch, beside the same steps launch by launch, in turn.

    python -m benchmarks.steps [--dtype DTYPE] [--quantization FORMAT] [--threads N] [--output FILE]

One engine with random weights in the shape of one of 0.5B parameters decodes; between two runs the
replay is switched off or on. Figures are the time of the model runner's steps: with one thread its
CPU time. The tokens of both must be the same.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import Report, in_turn, quickest
from benchmarks.peers.checkpoints import Shape, build

SHAPE = Shape(896, 24, 14, 2, 4864)
SIDES = ("launched", "replayed")
PROMPT_TOKENS, TOKENS, FIRST_STEPS = 16, 24, 5


class Subject:
    """The engine, which is this process, and the times of its steps."""

    def __init__(self, model: Path, options: argparse.Namespace) -> None:
        from sensorium import LLM, SamplingParams
        from sensorium.kernels.cpu import graph

        self._graph, self._most_rows = graph, graph.MOST_ROWS
        self._llm = LLM(
            str(model),
            dtype=options.dtype,
            quantization=options.quantization,
            num_threads=options.threads,
            kv_cache_memory_bytes=1 << 29,
            enable_prefix_caching=False,
        )
        self._params = SamplingParams(temperature=0.0, max_tokens=TOKENS, ignore_eos=True)
        self._steps = timed_steps(options.threads)

    def measure(self, side: str, rows: int) -> tuple[list[float], list[tuple[int, ...]]]:
        """Return the seconds of decode steps, and the tokens."""
        self._graph.MOST_ROWS = self._most_rows if side == "replayed" else 0
        prompts = [
            {"prompt_token_ids": [100 + i + 17 * row for i in range(PROMPT_TOKENS)]}
            for row in range(rows)
        ]
        self._steps.clear()
        outputs = self._llm.generate(prompts, self._params, use_tqdm=False)  # type: ignore[arg-type]
        return self._steps[FIRST_STEPS:], [tuple(out.outputs[0].token_ids) for out in outputs]


def timed_steps(threads: int) -> list[float]:
    """Return a list that gets the seconds of each step of this process from now on.

    With one thread they are those of its CPU time.
    """
    from sensorium.runtime.runner import ModelRunner

    steps: list[float] = []
    clock = time.thread_time if threads == 1 else time.perf_counter
    ModelRunner.execute = _timed(ModelRunner.execute, clock, steps)  # type: ignore[method-assign]
    return steps


def _timed(execute: Callable[..., Any], clock: Callable[[], float], steps: list[float]) -> Any:
    def run(self: Any, plan: Any) -> Any:
        began = clock()
        result = execute(self, plan)
        steps.append(clock() - began)
        return result

    return run


def compare(subject: Subject, rows: int, rounds: int) -> dict[str, Any]:
    """Measure both sides in turn for steps of so many rows."""
    times: dict[str, list[float]] = defaultdict(list)
    tokens = set()
    for number in range(rounds):
        for side in in_turn(SIDES, number):
            seconds, found = subject.measure(side, rows)
            times[side] += seconds
            tokens.add(tuple(found))
    found: dict[str, dict[str, float]] = {side: quickest(times[side]) for side in SIDES}
    saved = found["launched"]["lower_quartile_ms"] - found["replayed"]["lower_quartile_ms"]
    return {"rows": rows, **found, "saved_ms": saved, "same_tokens": len(tokens) == 1}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization")
    parser.add_argument("--model", type=Path, help="a checkpoint instead of random weights")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or Path(scratch) / "model"
        if options.model is None:
            build(SHAPE, model)
        subject = Subject(model, options)
        settings = {name: str(value) for name, value in vars(options).items() if name != "output"}
        report = Report("steps", settings, options.output)
        found = []
        for rows in options.rows:
            found.append(compare(subject, rows, options.rounds))
            report.write(steps=found)
            sides = ", ".join(
                f"{side} {found[-1][side]['lower_quartile_ms']:.2f} ms" for side in SIDES
            )
            same = "same tokens" if found[-1]["same_tokens"] else "OTHER TOKENS"
            print(f"{rows} rows: {sides}, saved {found[-1]['saved_ms']:.2f} ms, {same}", flush=True)
    print(report.path)


if __name__ == "__main__":
    main()
