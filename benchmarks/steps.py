"""Decode steps replayed as one launch, beside the same steps launch by launch, in turn.

    python -m benchmarks.steps [--dtype DTYPE] [--quantization FORMAT] [--threads N] [--output FILE]

One engine with random weights in the shape of one of 0.5B parameters decodes in three ways, which
take turns: kernels launched one by one, the layers replayed, whole steps replayed, from the ids to
the chosen tokens. For each there is the time of the model runner's steps (with one thread its CPU
time), and the host time of a step: CPU time of the engine's thread outside of kernels, from one
step to the next, outputs and scheduler included. The weights must be much larger than the caches:
Python that runs between two steps is slower than in a loop of its own. The tokens of all ways must
be the same.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import Report, in_turn, quickest
from benchmarks.peers.checkpoints import Shape, build

SHAPE = Shape(896, 24, 14, 2, 4864)
SIDES = ("launched", "layers", "whole")
PROMPT_TOKENS, TOKENS, FIRST_STEPS = 16, 24, 5


class Subject:
    """The engine, which is this process, and the times of its steps."""

    def __init__(self, model: Path, options: argparse.Namespace) -> None:
        from sensorium.kernels.cpu import threads

        threads.prepare()
        from sensorium import LLM, SamplingParams
        from sensorium.kernels.cpu.graph import StepGraphs
        from sensorium.models.parts.decoder import Decoder

        self._graphs, self._decoder = StepGraphs, Decoder
        self._usual = StepGraphs.takes, Decoder.decode
        self._host = HostTimes()
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
        self._host.begin_at_steps()

    def measure(self, side: str, rows: int) -> tuple[list[float], list[float], list[Any]]:
        """Return the seconds of decode steps, their host seconds, and the tokens."""
        takes, decode = self._usual
        self._graphs.takes = _no if side == "launched" else takes  # type: ignore[method-assign]
        self._decoder.decode = decode if side == "whole" else _no  # type: ignore[method-assign]
        prompts = [
            {"prompt_token_ids": [100 + i + 17 * row for i in range(PROMPT_TOKENS)]}
            for row in range(rows)
        ]
        self._steps.clear()
        self._host.clear()
        outputs = self._llm.generate(prompts, self._params, use_tqdm=False)  # type: ignore[arg-type]
        tokens = [tuple(out.outputs[0].token_ids) for out in outputs]
        return self._steps[FIRST_STEPS:], self._host.seconds[FIRST_STEPS:], tokens


def _no(*args: object) -> None:
    """Neither capture a step nor decode it at once."""


class HostTimes:
    """CPU seconds of this thread in each step but those in kernels, from one step to the next.

    Made before any kernel is loaded.
    """

    def __init__(self) -> None:
        from sensorium.kernels.cpu.launch import Launcher

        self.seconds: list[float] = []
        self._in_kernels = 0.0
        self._before: float | None = None
        usual = Launcher.__init__

        def init(launcher: Any, address: int, region: int | None) -> None:
            usual(launcher, address, region)
            for name in ("_serial", "_region", "_released"):
                call = getattr(launcher, name)
                setattr(launcher, name, None if call is None else self._counted(call))

        Launcher.__init__ = init  # type: ignore[method-assign]

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> None:
            began = time.thread_time()
            call(*args)
            self._in_kernels += time.thread_time() - began

        return run

    def begin_at_steps(self) -> None:
        """Take the beginning of the model runner's steps for that of a step."""
        from sensorium.runtime.runner import ModelRunner

        execute = ModelRunner.execute

        def run(runner: Any, plan: Any) -> Any:
            now = time.thread_time() - self._in_kernels
            if self._before is not None:
                self.seconds.append(now - self._before)
            self._before = now
            return execute(runner, plan)

        ModelRunner.execute = run  # type: ignore[method-assign]

    def clear(self) -> None:
        """Begin anew."""
        self.seconds.clear()
        self._before = None


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
    host: dict[str, list[float]] = defaultdict(list)
    tokens = set()
    for number in range(rounds):
        for side in in_turn(SIDES, number):
            seconds, outside, chosen = subject.measure(side, rows)
            times[side] += seconds
            host[side] += outside
            tokens.add(tuple(chosen))
    found: dict[str, dict[str, float]] = {
        side: quickest(times[side]) | {"host_ms": statistics.median(host[side]) * 1e3}
        for side in SIDES
    }
    saved = found["launched"]["lower_quartile_ms"] - found["whole"]["lower_quartile_ms"]
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
                f"{side} {found[-1][side]['lower_quartile_ms']:.2f} ms "
                f"(host {found[-1][side]['host_ms']:.2f})"
                for side in SIDES
            )
            same = "same tokens" if found[-1]["same_tokens"] else "OTHER TOKENS"
            print(f"{rows} rows: {sides}, saved {found[-1]['saved_ms']:.2f} ms, {same}", flush=True)
    print(report.path)


if __name__ == "__main__":
    main()
