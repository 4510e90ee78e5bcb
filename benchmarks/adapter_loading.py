"""The pause of an engine's steps while a LoRA adapter is loaded: read between two steps, or beside.

    python -m benchmarks.adapter_loading [--rank N] [--rows N] [--threads N] [--model FOLDER]

One engine with random weights in the shape of one of 0.5B parameters decodes some sequences. In
turn it reads an adapter of all linear layers between two steps, as an ``LLM`` does, and in a thread
beside them, as a server does. Figures are wall times: the longest time from the end of one step to
the end of the next, and the median step while nothing is loaded.
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

from benchmarks.adapters import make_adapter
from benchmarks.harness import Report, in_turn
from benchmarks.peers.checkpoints import build
from benchmarks.steps import SHAPE
from sensorium.config import engine_config
from sensorium.core.request import EngineRequest
from sensorium.engine import wire
from sensorium.engine.executor import build_engine
from sensorium.engine.serving.adapter_reader import AdapterReader
from sensorium.params import SamplingParams

SIDES = ("between", "beside")
STEPS = 12
"""Steps before an adapter is loaded, and after it."""


class Subject:
    """An engine that decodes, and an adapter."""

    def __init__(self, model: Path, adapter: Path, options: argparse.Namespace) -> None:
        config = engine_config(
            model=str(model),
            num_threads=options.threads,
            kv_cache_memory_bytes=1 << 29,
            enable_lora=True,
            max_lora_rank=512,
        )
        self._adapter = str(adapter)
        self._engine = build_engine(config)
        self._failed: list[Any] = []
        self._reader = AdapterReader(self._engine, lambda number, error: self._failed.append(error))
        params = SamplingParams(temperature=0.0)
        for row in range(options.rows):
            ids = tuple(100 + i + 17 * row for i in range(16))
            self._engine.add(EngineRequest(str(row), ids, params, 20_000))
        for _ in range(10):
            self._engine.step()

    def measure(self, side: str) -> dict[str, float]:
        """Load the adapter once; return the median of other steps, and the longest pause, in ms."""
        usual = self._steps(lambda number: number == STEPS)
        if side == "between":
            began = time.perf_counter()
            self._engine.load_adapter("a", self._adapter)
            self._engine.step()
            during = [time.perf_counter() - began]
        else:
            self._reader.begin(wire.LoadAdapter(0, "a", self._adapter, self._adapter))
            during = self._steps(lambda number: bool(self._engine.facts.adapters))
        during += self._steps(lambda number: number == STEPS)
        self._engine.unload_adapter("a")
        assert not any(self._failed)
        return {
            "usual_ms": 1e3 * statistics.median(usual),
            "longest_ms": 1e3 * max(during),
            "loading_ms": 1e3 * sum(during[:-STEPS]),
        }

    def _steps(self, ends: Callable[[int], bool]) -> list[float]:
        """Return the seconds of steps, until ``ends`` says so of their number."""
        seconds: list[float] = []
        last = time.perf_counter()
        while not ends(len(seconds)):
            self._reader.poll()
            self._engine.step()
            now = time.perf_counter()
            seconds.append(now - last)
            last = now
        return seconds


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", type=Path, help="a checkpoint instead of random weights")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model or Path(scratch) / "model"
        if not model.exists():
            build(SHAPE, model)
        adapter = make_adapter(Path(scratch) / "adapter", model, options.rank, 0)
        subject = Subject(model, adapter, options)
        given = {**vars(options), "model": options.model is not None and options.model.name}
        settings = {name: str(value) for name, value in given.items() if name != "output"}
        report = Report("adapter_loading", settings, options.output)
        rounds: dict[str, list[dict[str, float]]] = defaultdict(list)
        for number in range(options.rounds):
            for side in in_turn(SIDES, number):
                rounds[side].append(subject.measure(side))
        medians = {
            side: {name: statistics.median(one[name] for one in found) for name in found[0]}
            for side, found in rounds.items()
        }
        report.write(medians=medians, rounds=rounds)
        print(medians)
    print(report.path)


if __name__ == "__main__":
    main()
