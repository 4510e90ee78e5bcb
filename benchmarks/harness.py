"""One harness for the benchmarks.

Flags from fields, sides in turn, rows with targets, JSON with the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sensorium.bench.report import header
from sensorium.bench.summary import summarize

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
T = TypeVar("T")


# --- flags ----------------------------------------------------------------------------------------


class Size(NamedTuple):
    """Width and height in pixels, ``1920x1080`` on the command line."""

    width: int
    height: int

    @classmethod
    def parse(cls, text: str) -> Size:
        """Read ``WIDTHxHEIGHT``. Raises ArgumentTypeError."""
        width, _, height = text.partition("x")
        if not (width.isdigit() and height.isdigit()):
            raise argparse.ArgumentTypeError(f"must look like 1920x1080, got {text!r}")
        return cls(int(width), int(height))


def flag(default: Any, help: str = "", *, quick: Any = dataclasses.MISSING, **parsing: Any) -> Any:
    """A field of settings that is a flag; ``quick`` is its value in a trial of seconds.

    ``parsing`` goes to ``add_argument``; the type is that of the default, a tuple takes several
    values.
    """
    chosen = default if quick is dataclasses.MISSING else quick
    return field(default=default, metadata={"help": help, "quick": chosen, "parsing": parsing})


def add_flags(parser: argparse.ArgumentParser, settings: Iterable[type]) -> None:
    """Add a flag for each field of these dataclasses; one flag serves all fields of its name."""
    fields: dict[str, list[tuple[str, dataclasses.Field[Any]]]] = {}
    for kind in settings:
        for each in dataclasses.fields(kind):
            if "parsing" in each.metadata:
                where = kind.__module__.rpartition(".")[2]
                fields.setdefault(each.name, []).append((where, each))
    for name, places in fields.items():
        first = places[0][1]
        words = dict.fromkeys(each.metadata["help"] for _, each in places)
        defaults = ", ".join(f"{where}: {_shown(each.default)}" for where, each in places)
        parsing = {**_parsing_of(first.default), **first.metadata["parsing"]}
        text = f"{'; '.join(filter(None, words))} ({defaults})".strip().replace("%", "%%")
        parser.add_argument(
            "--" + name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **parsing
        )


def settings_of(kind: type[T], options: argparse.Namespace, *, quick: bool = False) -> T:
    """Settings with the values that were given, the quick ones or the defaults for the rest."""
    given = vars(options)
    values = {}
    for each in dataclasses.fields(kind):  # type: ignore[arg-type]
        if each.name in given:
            value = given[each.name]
            values[each.name] = tuple(value) if isinstance(value, list) else value
        elif quick and "quick" in each.metadata:
            values[each.name] = each.metadata["quick"]
    return kind(**values)


def settings_from_flags(kind: type[T], description: str | None) -> tuple[T, Path | None]:
    """Settings from the command line, and the file for the results, None for the usual one."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser, [kind])
    parser.add_argument("--quick", action="store_true", help="a trial whose figures mean nothing")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    return settings_of(kind, options, quick=options.quick), options.output


def _parsing_of(default: Any) -> dict[str, Any]:
    if isinstance(default, Size):
        return {"type": Size.parse, "metavar": "WxH"}
    if isinstance(default, tuple):
        return {"nargs": "+", **({"type": type(default[0])} if default else {})}
    return {} if default is None else {"type": type(default)}


def _shown(value: Any) -> str:
    if isinstance(value, Size):
        return f"{value.width}x{value.height}"
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return "none" if value in (None, "") else str(value)


# --- sides in turn --------------------------------------------------------------------------------


def in_turn(items: Sequence[T], round_: int) -> list[T]:
    """The items in an order whose first one changes with the round."""
    start = round_ % len(items)
    return [*items[start:], *items[:start]]


def quickest(seconds: Sequence[float]) -> dict[str, float]:
    """Least and lower quartile of the times of steps, in ms, and how many there were."""
    return {
        "least_ms": min(seconds) * 1e3,
        "lower_quartile_ms": statistics.quantiles(seconds, n=4)[0] * 1e3,
        "steps": len(seconds),
    }


@dataclass(slots=True)
class Series:
    """All values of one figure, by side."""

    unit: str
    better: str
    values: dict[str, list[float]] = field(default_factory=dict)

    def summary(self, ours: str) -> dict[str, Any]:
        """Medians, all values, and the median of ``ours`` divided by that of each other side.

        ``range`` has the least and the greatest ratio of two values that were measured in turn.
        """
        medians = {side: statistics.median(values) for side, values in self.values.items()}
        ratios = {
            side: medians[ours] / median
            for side, median in medians.items()
            if ours in medians and side != ours and median
        }
        ranges = {}
        for side in ratios:
            pairs = zip(self.values[ours], self.values[side], strict=False)
            each = [our_value / value for our_value, value in pairs if value]
            ranges[side] = [min(each), max(each)]
        return {
            "unit": self.unit,
            "better": self.better,
            "median": medians,
            "values": self.values,
            "ours_over": ratios,
            "range": ranges,
        }


class Figures(dict[str, Series]):
    """Series by name."""

    def note(self, name: str, side: str, value: float, unit: str, better: str = "lower") -> None:
        """Add one value of a figure."""
        series = self.setdefault(name, Series(unit, better))
        series.values.setdefault(side, []).append(value)

    def summary(self, ours: str) -> dict[str, Any]:
        """The summary of each series."""
        return {name: series.summary(ours) for name, series in self.items()}


def figures_table(figures: Mapping[str, Any], sides: Sequence[str], ours: str) -> str:
    """The medians and ratios with their ranges of ``Figures.summary``, a line for each figure."""
    others = [side for side in sides if side != ours]
    head = f"{'figure':<26}" + "".join(f"{side:>14}" for side in sides)
    lines = [head + "".join(f"{ours + '/' + side:>24}" for side in others)]
    for name, figure in figures.items():
        cells = [f"{_number(figure['median'].get(side)):>14}" for side in sides]
        for side in others:
            low, high = figure["range"].get(side, (None, None))
            spread = f"{_number(low, 3)} to {_number(high, 3)}"
            cells.append(f"{_number(figure['ours_over'].get(side), 3):>8}{spread:>16}")
        better = f"{figure['unit']}, {figure['better']} is better"
        lines.append(f"{name:<26}{''.join(cells)}   {better}")
    return "\n".join(lines)


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Count, median, 99th percentile and maximum; None for each of a series without values."""
    found = summarize(values)
    parts = ("p50", "p99", "maximum")
    return {"count": len(values), **{part: found and getattr(found, part) for part in parts}}


# --- rows and results -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One figure of a table, with the least or the most that it should be where that is a target.

    A figure without a value misses its target, too.
    """

    name: str
    value: float | None
    unit: str = ""
    least: float | None = None
    most: float | None = None

    @property
    def wanted(self) -> str:
        """The target in words; "" without one."""
        if self.least is not None and self.least == self.most:
            return f"{self.least:g}"
        words = [] if self.least is None else [f"at least {self.least:g}"]
        return " and ".join(words + ([] if self.most is None else [f"at most {self.most:g}"]))

    @property
    def missed(self) -> bool:
        """True for a target that the value does not meet."""
        if self.value is None:
            return bool(self.wanted)
        return (self.least is not None and self.value < self.least) or (
            self.most is not None and self.value > self.most
        )

    def __str__(self) -> str:
        mark = "MISSED" if self.missed else "ok" if self.wanted else ""
        value = _number(self.value)
        return f"  {self.name:<58}{value:>10} {self.unit:<10}{self.wanted:<15}{mark}".rstrip()


@dataclass(frozen=True, slots=True)
class Found:
    """All values of a benchmark, for JSON, and the rows of its table."""

    values: Mapping[str, Any]
    rows: Sequence[Row] = ()


class Report:
    """A file of results that is written after each section."""

    def __init__(
        self, benchmark: str, settings: Mapping[str, Any], output: Path | None = None
    ) -> None:
        self.content = header(benchmark, settings)
        self.path = output or RESULTS / f"{benchmark}-{self.content['date'][:10]}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, **content: Any) -> None:
        """Set these entries and write the file."""
        self.content |= content
        self.path.write_text(json.dumps(self.content, indent=1, default=str) + "\n")


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}g}"
