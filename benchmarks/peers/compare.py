"""Sensorium beside other engines, in one run: medians, and ours divided by the best of theirs.

    python -m benchmarks.peers.compare --home FOLDER --checkpoint NAME [--cpu avx2] [--engine NAME …]

Engines are long-lived processes that load once. In each round every measurement is made by each engine in turn, and the
order of the engines changes from round to round; while one measures, all processes of the others are stopped. Where the
memory does not hold all of them, they are measured in groups. A start with an empty folder of compiled code is a cold
one, any other a warm one. The result is written after every value; ``--resume`` goes on where an earlier run ended.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import Figures, Report, in_turn
from benchmarks.peers.engines import FORMATS, HOME, LEVELS, EngineKind, engine_kind, in_groups
from benchmarks.peers.measurements import MEASUREMENTS, PICTURE_MEASUREMENTS, TEXT_MEASUREMENTS
from benchmarks.peers.processes import ANSWER_TIMEOUT, EngineFailure, EngineProcess
from benchmarks.peers.ranking import beside_best, comparison_table

GIB = 2**30
FREE_GIB = 2.0
"""Memory that groups of engines leave to the system."""


class OutOfTime(Exception):
    """The budget is spent."""


@dataclass(slots=True)
class Budget:
    """Seconds that a run may take; None for no bound."""

    seconds: float | None
    begin: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        if self.seconds is None:
            return float("inf")
        return self.seconds - (time.monotonic() - self.begin)

    def check(self) -> None:
        """Raise OutOfTime when nothing is left."""
        if self.left <= 0:
            raise OutOfTime


class Comparison:
    """One checkpoint's measurements; ``before`` is what an earlier run found, to go on from."""

    def __init__(
        self,
        checkpoint: Path,
        options: argparse.Namespace,
        scratch: Path,
        budget: Budget,
        before: dict[str, Any],
        save: Callable[[dict[str, Any], dict[str, str]], None],
    ) -> None:
        self.checkpoint = checkpoint
        self.versions: dict[str, str] = {}
        self._failures: list[str] = list(before.get("failures", ()))
        self._options = options
        self._scratch = scratch
        self._budget = budget
        self._save = save
        self._done = {tuple(each) for each in before.get("done", ())}
        self._figures = Figures()
        for name, series in before.get("figures", {}).items():
            for engine, values in series["values"].items():
                for value in values:
                    self._figures.note(name, engine, value, series["unit"], series["better"])
        self._running: dict[str, EngineProcess] = {}
        self._broken: set[str] = set()
        self._has_vision = "vision_config" in json.loads((checkpoint / "config.json").read_text())
        size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
        self._groups = in_groups(options.engine, size, options.memory_gib)

    def run(self) -> None:
        """Measure until all is done or the time is spent."""
        try:
            self._first_starts()
            for round_ in range(self._options.rounds):
                for group in in_turn(self._groups, round_):
                    self._round(group, round_)
        except OutOfTime:
            print("the time is spent", file=sys.stderr)
        finally:
            self._end(list(self._running))

    def results(self) -> dict[str, Any]:
        """What is known by now."""
        figures = self._figures.summary("")
        for figure in figures.values():
            del figure["ours_over"], figure["range"]
            figure["beside_best"] = beside_best(figure)
        groups = [[kind.name for kind in group] for group in self._groups]
        done = sorted(self._done, key=str)
        return {"figures": figures, "failures": self._failures, "groups": groups, "done": done}

    def _first_starts(self) -> None:
        """Starts that are measured apart; each process ends at once."""
        for number in range(self._options.start_rounds):
            for kind in in_turn(self._options.engine, number):
                step = (number, "start", kind.name)
                if step not in self._done and kind.name not in self._broken:
                    self._start(kind)
                    self._end([kind.name], note=False)  # it has done next to nothing
                    self._finish(step)

    def _round(self, group: list[EngineKind], round_: int) -> None:
        names = self._measurements()
        steps = [(round_, name, kind) for name in names for kind in in_turn(group, round_)]
        wanted = [(r, n, kind) for r, n, kind in steps if (r, n, kind.name) not in self._done]
        if not wanted:
            return
        self._end([name for name in self._running if name not in {kind.name for kind in group}])
        for kind in group:
            if kind.name not in self._running and kind.name in {each[2].name for each in wanted}:
                self._start(kind)
                self._warm_up(kind)
        for _, name, kind in wanted:
            self._measure(kind, name, round_)

    def _start(self, kind: EngineKind) -> None:
        if kind.name in self._broken:
            return
        self._budget.check()
        options = self._options
        arguments = [str(self.checkpoint), "--num-threads", str(options.num_threads)]
        arguments += ["--kv-cache-gib", str(options.kv_cache_gib), *kind.arguments()]
        caches = self._scratch / "caches" / options.cpu / f"{self.checkpoint.name}-{kind.name}"
        figure = "start_warm" if caches.exists() and any(caches.iterdir()) else "start_cold"
        caches.mkdir(parents=True, exist_ok=True)
        (caches / "started").touch()
        read_all(kind.files(self.checkpoint))
        environment = kind.environment(options.num_threads, options.kv_cache_gib, caches)
        log = self._scratch / f"{self.checkpoint.name}-{kind.name}.log"
        try:
            engine = EngineProcess(kind, arguments, environment, log)
        except EngineFailure as failure:
            self._fail(kind, "start", failure)
            return
        self._running[kind.name] = engine
        self.versions[kind.name] = engine.version
        self._note(figure, kind.name, engine.start_seconds, "s", "lower")
        engine.freeze()

    def _warm_up(self, kind: EngineKind) -> None:
        if kind.name in self._running:
            command = {"names": self._measurements(), "short": self._options.short}
            self._ask(kind, "warm_up", do="warm_up", **command)

    def _measure(self, kind: EngineKind, name: str, round_: int) -> None:
        self._budget.check()
        if kind.name in self._running:
            found = self._ask(kind, name, do="measure", name=name, round=round_)
            for figure in found:
                self._note(
                    figure["name"], kind.name, figure["value"], figure["unit"], figure["better"]
                )
            if found:
                self._finish((round_, name, kind.name))

    def _ask(self, kind: EngineKind, what: str, **command: object) -> list[dict[str, Any]]:
        """Figures of a command. An engine that failed or took too long is not asked again."""
        engine = self._running[kind.name]
        with engine.only():
            try:
                return engine.ask(timeout=self._options.limit, **command)
            except EngineFailure as failure:
                self._fail(kind, what, failure)
        self._end([kind.name])
        return []

    def _fail(self, kind: EngineKind, what: str, failure: EngineFailure) -> None:
        self._broken.add(kind.name)
        self._failures.append(f"{kind.name}, {what}: {failure}")
        print(f"  failed: {failure}", file=sys.stderr)
        self._save(self.results(), self.versions)

    def _end(self, names: list[str], *, note: bool = True) -> None:
        for name in names:
            engine = self._running.pop(name, None)
            if engine is not None:
                if note and name not in self._broken:
                    peaks = engine.memory.peaks()
                    self._note("peak_memory", name, peaks.peak / 1e9, "GB", "lower")
                    self._note("peak_anonymous", name, peaks.anonymous / 1e9, "GB", "lower")
                engine.close()
        self._save(self.results(), self.versions)

    def _note(self, figure: str, engine: str, value: float, unit: str, better: str) -> None:
        self._figures.note(figure, engine, round(value, 5), unit, better)
        print(f"  {figure:<26}{engine:<22}{value:>12.4g} {unit}", file=sys.stderr, flush=True)

    def _finish(self, step: tuple[int, str, str]) -> None:
        self._done.add(step)
        self._save(self.results(), self.versions)

    def _measurements(self) -> list[str]:
        short = "_short" if self._options.short else ""
        text = [
            f"{name}{short}" if name.startswith("decode") else name for name in TEXT_MEASUREMENTS
        ]
        names = self._options.measure or [
            *text,
            *(PICTURE_MEASUREMENTS if self._has_vision else ()),
        ]
        return [name for name in names if self._has_vision or name not in PICTURE_MEASUREMENTS]


def read_all(paths: list[Path]) -> None:
    """Bring files into the page cache, so that no engine pays for the disk."""
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--home", type=Path, default=HOME, help="what prepare.py made")
    parser.add_argument(
        "--cpu", choices=LEVELS, default="native", help="hold all engines to a level"
    )
    parser.add_argument(
        "--engine", action="append", help="RUNNER-FORMAT or RUNNER-FORMAT=PYTHON; default: all"
    )
    parser.add_argument("--checkpoint", action="append", required=True, help="name or folder")
    parser.add_argument("--measure", action="append", choices=MEASUREMENTS, help="default: all")
    parser.add_argument("--short", action="store_true", help="fewer tokens, for slow machines")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--start-rounds", type=int, default=1, help="starts measured apart")
    parser.add_argument("--num-threads", type=int, default=2)
    parser.add_argument("--kv-cache-gib", type=float, default=1)
    parser.add_argument("--memory-gib", type=float, help="for engines; default: what is free")
    parser.add_argument("--budget", type=float, help="seconds after which nothing is begun")
    parser.add_argument(
        "--limit", type=float, default=ANSWER_TIMEOUT, help="seconds for one measurement"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the file of --output")
    parser.add_argument("--scratch", type=Path, help="logs and caches; default: temporary")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    options.home = options.home.absolute()
    names = options.engine or [f"{each}-{kind}" for each, all_ in FORMATS.items() for kind in all_]
    try:
        options.engine = [engine_kind(name, options.home, options.cpu) for name in names]
    except ValueError as error:
        parser.error(str(error))
    if options.memory_gib is None:
        options.memory_gib = psutil.virtual_memory().available / GIB - FREE_GIB
    return options


def _checkpoint(text: str, home: Path) -> Path:
    folder = home / "checkpoints" / text
    return folder if folder.is_dir() else Path(text).absolute()


def main() -> None:
    """The command line."""
    options = _arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.num_threads])
    names = ("cpu", "num_threads", "rounds", "start_rounds", "kv_cache_gib", "short")
    report = Report(
        f"peers-{options.cpu}", {name: getattr(options, name) for name in names}, options.output
    )
    load = os.getloadavg()[0]
    if load > 0.5:
        print("warning: something else is running on this machine", file=sys.stderr)
    before: dict[str, Any] = {}
    if options.resume and report.path.exists():
        before = json.loads(report.path.read_text())
    scratch = options.scratch or Path(tempfile.mkdtemp(prefix="peers-"))
    scratch.mkdir(parents=True, exist_ok=True)
    print(f"logs and caches: {scratch}; result: {report.path}", file=sys.stderr)
    rounds = max(options.rounds, before.get("settings", {}).get("rounds", 0))
    report.content["settings"]["rounds"] = rounds
    budget = Budget(options.budget)
    engines: dict[str, str] = before.get("engines", {})
    checkpoints: dict[str, Any] = before.get("checkpoints", {})
    loads = [*before.get("load_average_before", []), load]
    for path in [_checkpoint(text, options.home) for text in options.checkpoint]:
        print(path.name, file=sys.stderr)

        def save(results: dict[str, Any], versions: dict[str, str], name: str = path.name) -> None:
            checkpoints[name] = results
            engines.update(versions)
            report.write(load_average_before=loads, engines=engines, checkpoints=checkpoints)

        before_it = checkpoints.get(path.name, {})
        Comparison(path, options, scratch, budget, before_it, save).run()
    for name, results in checkpoints.items():
        print(f"\n{name}\n{comparison_table(results['figures'])}")


if __name__ == "__main__":
    main()
