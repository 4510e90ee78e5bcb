"""The figures of ``media.py`` as rows of a table, with the targets of those that have one."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.media import sharing

MOST_LAG_SECONDS = 0.01
MOST_ITEM_MS = 1.0
MOST_RECOVERY_SECONDS = {"worker": 2.0, "forker": 10.0, "engine": 20.0}


@dataclass(frozen=True, slots=True)
class Row:
    """One figure, with the least or the most that it should be where that is a target. A target is missed by a figure
    that is not there, too."""

    section: str
    name: str
    value: float | None
    unit: str
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
        """Whether there is a target, and this is not it."""
        if self.value is None:
            return bool(self.wanted)
        return (self.least is not None and self.value < self.least) or (
            self.most is not None and self.value > self.most
        )


def preprocess_rows(found: Mapping[str, Any], least_ratio: float) -> list[Row]:
    """For each family images per second, and the ratio."""
    rows = []
    for family, figures in found.items():
        for workers, rate in figures["images_per_second"].items():
            rows.append(Row("preprocess", f"{family}, workers: {workers}", rate, "images/s"))
        ratio = figures["ratio"]
        rows.append(Row("preprocess", f"{family}, ratio", ratio, "", least=least_ratio))
    return rows


def load_rows(found: Mapping[str, Any]) -> list[Row]:
    """The loop's lag, /health, texts and pictures."""
    rows = []
    for name, words, most in (
        ("at_rest", "at rest", None),
        ("under_load", "under load", MOST_LAG_SECONDS),
    ):
        phase = found[name]
        lag = phase["loop_lag_seconds"]["p99"]
        health, text = phase["health_seconds"], phase["text_first_token_seconds"]
        rows += [
            Row("load", f"loop's lag {words}, p99 (at most)", lag, "s", most=most),
            Row("load", f"/health {words}, p50", health and health["p50"], "s"),
            Row("load", f"/health {words}, p99", health and health["p99"], "s"),
            Row("load", f"text's first token {words}, p50", text and text["p50"], "s"),
            Row("load", f"text's first token {words}, p99", text and text["p99"], "s"),
        ]
    loaded = found["under_load"]
    statuses = loaded["statuses"]
    failed = sum(count for status, count in statuses.items() if status != "200")
    return [
        *rows,
        Row("load", "pictures", loaded["images_per_second"], "images/s"),
        Row("load", "pictures refused", failed if statuses else None, "", most=0),
    ]


def cached_rows(found: Mapping[str, Any]) -> list[Row]:
    """What an item adds to the HTTP process and the media workers, and what work was done for it."""
    added = found["added_milliseconds"]["front"]["median"]
    text = found["milliseconds"]["front"]["median"]["text"]
    work = [
        value
        for form in ("image", "uuid")
        for value in found["work"].get(form, {None: None}).values()
    ]
    risen = None if None in work else sum(work)
    return [
        Row("cached", "a request without an image", text, "ms of CPU"),
        Row("cached", "a known image adds", added.get("image"), "ms of CPU", most=MOST_ITEM_MS),
        Row("cached", "a uuid adds", added.get("uuid"), "ms of CPU", most=MOST_ITEM_MS),
        Row("cached", "the same text again adds", added["again"], "ms of CPU"),
        Row("cached", "items and bytes decoded … encoded", risen, "", most=0),
    ]


def once_rows(runs: Sequence[Mapping[str, Any]]) -> list[Row]:
    """For each delay of the host the value that is farthest from one."""
    rows = []
    for delay in sharing.DELAYS:
        chosen = [run for run in runs if run["delay_seconds"] == delay]
        where = f"host answers after {delay * 1e3:g} ms"
        fetches = [run["fetches_seen_by_host"] for run in chosen]
        counters = {name: [run["counters"][name] for run in chosen] for name in sharing.ONCE}
        seconds = statistics.median(run["seconds"] for run in chosen)
        answers = max(run["different_answers"] for run in chosen)
        refused = sum(
            count for run in chosen for status, count in run["statuses"].items() if status != "200"
        )
        rows += [
            Row("once", f"{where}: fetches by its log", _farthest(fetches), "", 1, 1),
            *(
                Row("once", f"{where}: {name}", _farthest(values), "", 1, 1)
                for name, values in counters.items()
            ),
            Row("once", f"{where}: different answers", answers, "", 1, 1),
            Row("once", f"{where}: requests refused", refused, "", most=0),
            Row("once", f"{where}: until all are answered", seconds, "s"),
        ]
    return rows


def _farthest(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known, key=lambda value: abs(value - 1)) if len(known) == len(values) else None


def recovery_rows(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Row]:
    """For each victim the longest time until service is full again, and how many others it cost."""
    rows = []
    for victim, kills in found.items():
        good = [kill["good_request_seconds"] for kill in kills]
        healthy = [kill["healthy_seconds"] for kill in kills]
        most = MOST_RECOVERY_SECONDS[victim]
        rows += [
            Row("recovery", f"{victim}: until a good answer", _longest(good), "s", most=most),
            Row("recovery", f"{victim}: until /health is 200", _longest(healthy), "s", most=most),
            Row(
                "recovery",
                f"{victim}: failed later",
                sum(k["failed_later"] for k in kills),
                "",
                most=0,
            ),
        ]
        if victim == "worker":
            others = sum(
                count
                for kill in kills
                for code, count in (*kill["hit"].items(), *kill["meanwhile"].items())
                if code != "200"
            )
            rows.append(Row("recovery", "worker: other requests that failed", others, "", most=0))
    return rows


def _longest(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known) if len(known) == len(values) else None


def table_of(rows: Sequence[Row]) -> str:
    """A line for each figure."""
    lines = []
    for row in rows:
        value = "-" if row.value is None else f"{row.value:.4g}"
        mark = "MISSED" if row.missed else "ok" if row.wanted else ""
        lines.append(f"  {row.name:<58}{value:>10} {row.unit:<10}{row.wanted:<15}{mark}".rstrip())
    return "\n".join(lines)
