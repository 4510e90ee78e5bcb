"""Sensorium beside other engines, in one run: medians, and ours divided by theirs.

    python -m benchmarks.peers.compare --engine sensorium=PYTHON --engine vllm=PYTHON \\
        --checkpoint FOLDER [--checkpoint FOLDER …]

Engines are long-lived processes that load once. In each round every measurement is made by each engine in turn, and the
order of the engines changes from round to round; while one measures, all processes of the others are stopped. Starts
are measured in fresh processes: first with empty caches of compiled code, then with filled ones. Weights are in the
page cache from the beginning.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.harness import Figures, Report, figures_table, in_turn
from benchmarks.peers.measurements import MEASUREMENTS, PICTURE_MEASUREMENTS, TEXT_MEASUREMENTS
from benchmarks.peers.processes import HERE, EngineFailure, EngineKind, EngineProcess

OURS = "sensorium"
UNITS = {"start_cold": ("s", "lower"), "start_warm": ("s", "lower")}


class Comparison:
    """One checkpoint's measurements."""

    def __init__(self, checkpoint: Path, options: argparse.Namespace, scratch: Path) -> None:
        self.checkpoint = checkpoint
        self.versions: dict[str, str] = {}
        self.failures: list[str] = []
        self._options = options
        self._scratch = scratch
        self._caches = Path(tempfile.mkdtemp(prefix="caches-", dir=scratch))
        self._figures = Figures()
        self._has_vision = "vision_config" in json.loads((checkpoint / "config.json").read_text())

    def run(self) -> Iterator[dict[str, Any]]:
        """Measure; yields what is known so far after each round."""
        _read_all(self.checkpoint)
        with ExitStack() as running:
            engines = self._start_all(running)
            yield self.results()
            for engine in engines:
                with engine.only():
                    engine.ask(do="warm_up", pictures=self._has_vision)
            for round_ in range(self._options.rounds):
                for name in self._measurements():
                    for engine in in_turn(engines, round_):
                        self._measure(engine, name, round_)
                yield self.results()

    def results(self) -> dict[str, Any]:
        """What is known by now."""
        return {
            "figures": self._figures.summary(OURS),
            "failures": self.failures,
        }

    def _start_all(self, running: ExitStack) -> list[EngineProcess]:
        """Measure the starts; the processes of the last ones stay, frozen."""
        for kind in self._options.engine:
            self._timed_start(kind, "start_cold").close()
        for round_ in range(self._options.start_rounds - 1):
            for kind in in_turn(self._options.engine, round_):
                self._timed_start(kind, "start_warm").close()
        engines = []
        for kind in self._options.engine:
            engine = self._timed_start(kind, "start_warm")
            running.callback(engine.close)
            engine.freeze()
            engines.append(engine)
        return engines

    def _timed_start(self, kind: EngineKind, figure: str) -> EngineProcess:
        options = self._options
        arguments = [str(self.checkpoint), "--num-threads", str(options.num_threads)]
        arguments += ["--kv-cache-gib", str(options.kv_cache_gib)]
        environment = kind.environment(
            options.num_threads, options.kv_cache_gib, self._caches / kind.name
        )
        log = self._scratch / f"{self.checkpoint.name}-{kind.name}.log"
        engine = EngineProcess(kind, arguments, environment, log)
        self.versions[kind.name] = engine.version
        self._note(figure, kind.name, engine.start_seconds, *UNITS[figure])
        return engine

    def _measure(self, engine: EngineProcess, name: str, round_: int) -> None:
        with engine.only():
            try:
                figures = engine.ask(do="measure", name=name, round=round_)
            except EngineFailure as failure:
                self.failures.append(f"round {round_}, {name}: {failure}")
                print(f"  failed: {failure}", file=sys.stderr)
                return
        for figure in figures:
            self._note(
                figure["name"], engine.kind.name, figure["value"], figure["unit"], figure["better"]
            )

    def _note(self, figure: str, engine: str, value: float, unit: str, better: str) -> None:
        self._figures.note(figure, engine, round(value, 5), unit, better)
        print(f"  {figure:<26}{engine:<14}{value:>12.4g} {unit}", file=sys.stderr, flush=True)

    def _measurements(self) -> list[str]:
        known = {**TEXT_MEASUREMENTS, **(PICTURE_MEASUREMENTS if self._has_vision else {})}
        return [name for name in self._options.measure or known if name in known]


def _read_all(folder: Path) -> None:
    """Bring the weights into the page cache, so that no engine pays for the disk."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def _engine(text: str) -> EngineKind:
    name, _, python = text.partition("=")
    if not (HERE / f"run_{name}.py").is_file() or not Path(python).is_file():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME=PYTHON with a run_NAME.py here and an existing Python"
        )
    return EngineKind(name, Path(python).absolute())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", type=_engine, action="append", required=True)
    parser.add_argument("--checkpoint", type=Path, action="append", required=True)
    parser.add_argument("--measure", action="append", choices=MEASUREMENTS, help="default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--start-rounds", type=int, default=2, help="starts with filled caches")
    parser.add_argument("--num-threads", type=int, default=2)
    parser.add_argument("--kv-cache-gib", type=int, default=2)
    parser.add_argument(
        "--scratch", type=Path, help="folder for logs and caches; default: temporary"
    )
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def main() -> None:
    """The command line."""
    options = _arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.num_threads])
    settings = ("num_threads", "rounds", "start_rounds", "kv_cache_gib")
    report = Report(
        "peers",
        {},
        options.output,
    )
    report.content |= {"dtype": "bfloat16", **{name: getattr(options, name) for name in settings}}
    load = os.getloadavg()[0]
    if load > 0.5:
        print("warning: something else is running on this machine", file=sys.stderr)
    scratch = options.scratch or Path(tempfile.mkdtemp(prefix="peers-"))
    scratch.mkdir(parents=True, exist_ok=True)
    print(f"logs and caches: {scratch}", file=sys.stderr)
    engines: dict[str, str] = {}
    checkpoints: dict[str, Any] = {}
    for checkpoint in options.checkpoint:
        print(checkpoint.name, file=sys.stderr)
        comparison = Comparison(checkpoint.absolute(), options, scratch)
        for results in comparison.run():
            engines |= comparison.versions
            checkpoints[checkpoint.name] = results
            report.write(load_average_before=load, engines=engines, checkpoints=checkpoints)
    names = [kind.name for kind in options.engine]
    for name, results in checkpoints.items():
        print(f"\n{name}\n{figures_table(results['figures'], names, OURS)}")


if __name__ == "__main__":
    main()
