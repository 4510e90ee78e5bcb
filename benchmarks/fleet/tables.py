"""Write the tables of docs/routing.md from the newest results.

    python -m benchmarks.fleet.tables [--check]

``--check`` only says whether the page shows the newest results.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import pages
from benchmarks.chart import newest
from benchmarks.harness import RESULTS, ROOT
from benchmarks.pages import table

PAGE = ROOT / "docs" / "routing.md"
Results = Mapping[str, Any]


def _percent(value: float) -> str:
    return f"{value:.0%}".replace("%", " %")


def _outcome(row: Results) -> list[str]:
    return [
        _percent(row["prefix_hit_rate"]),
        _percent(row["media_hit_rate"]),
        f"{row['first_token_p50']:.2f} s",
        f"{row['first_token_p99']:.1f} s",
        f"{row['busy_max_over_mean']:.2f}",
    ]


OUTCOME = ("prefix hits", "media hits", "first token p50", "p99", "busy, max/mean")


def sizes(fleet: Results) -> str:
    """Policies by the size of the fleet."""
    rows = [
        [f"{row['num_replicas']:,} ({row['num_routers']})", row["policy"], *_outcome(row)]
        for row in fleet["table"]
    ]
    return table(["replicas (routers)", "policy", *OUTCOME], rows)


def approximation(fleet: Results) -> str:
    """The simulated engine beside the scheduler of real ones."""
    rows = [
        [f"{row['num_replicas']}, {row['policy']}", row["engine"], *_outcome(row)]
        for row in sorted(
            fleet["approximation"], key=lambda row: (row["num_replicas"], row["policy"])
        )
    ]
    return table(["replicas, policy", "engine", *OUTCOME], rows)


def loss(fleet: Results) -> str:
    """A tenth of the replicas ends in the middle."""
    rows = [
        [
            f"{row['num_replicas']:,} ({row['num_routers']})",
            row["policy"],
            f"{row['failed']} of {row['requests']:,}",
            _percent(row["prefix_hit_rate"]),
            f"{row['first_token_p99']:.1f} s",
            f"{row['first_token_p99_after_loss']:.1f} s",
        ]
        for row in fleet["loss"]
    ]
    head = ["replicas (routers)", "policy", "failed", "prefix hits", "first token p99"]
    return table([*head, "p99 of the 20 s after it"], rows)


def images(fleet: Results) -> str:
    """Few images and many requests."""
    rows = [
        [
            row["policy"],
            "Zipf" if row["zipf"] else "equal",
            f"{row['repeats_met'] * 100:.1f} %",
            f"{row['requests_max_over_mean']:.2f}",
        ]
        for row in fleet["images"]
    ]
    return table(["policy", "images", "repeats that meet it", "requests, max/mean"], rows)


def constants(fleet: Results) -> str:
    """One constant of the router varied."""
    rows = []
    for row in fleet["constants"]:
        ((name, value),) = row["constants"].items()
        rows.append([f"`{name}` = {value:g}", *_outcome(row)])
    return table(["constant", *OUTCOME], rows)


def decisions(_: Results) -> str:
    """Times of decisions."""
    result = newest("fleet-decisions")
    rows = [
        [
            f"{row['replicas']:,}",
            *(f"{row['choose_us'][name]:.0f} µs" for name in ("p50", "mean", "p99")),
            f"{row['all_calls_us']['p50']:.0f} µs",
        ]
        for row in result["decisions"]
    ]
    times = table(["replicas", "decision, p50", "mean", "p99", "all calls, p50"], rows)
    full = result["memory"]["peak_bytes"] / 2**20
    return f"{times}\n\nA router whose memory is full takes {full:.0f} MiB."


def validation(_: Results) -> str:
    """The simulation beside real replicas."""
    if not sorted(RESULTS.glob("fleet-validation-*.json")):
        return "There is no result yet."
    result = newest("fleet-validation")
    names = {
        "prefix_hit_rate": "prefix hits",
        "media_hit_rate": "media hits",
        "first_token_p50": "first token, p50",
        "first_token_p90": "first token, p90",
        "requests_max_over_mean": "requests, max/mean",
    }
    if result["settings"]["busy"]:
        names = {name: label for name, label in names.items() if "first" not in name}
    rows = []
    for name, label in names.items():
        real, simulated = result["real"][name], result["simulated"][name]
        shown = [f"{v * 1e3:.1f} ms" if "first" in name else f"{v:.3f}" for v in (real, simulated)]
        rows.append([label, *shown, f"{simulated / real:.2f}"])
    met = f"{result['repeats_met'] * 100:.1f} % of the repeats met a replica that had the image."
    if result["settings"]["busy"]:
        met += " Other work ran on the machine: times were not compared."
    return table(["", "real", "simulated", "ratio"], rows) + "\n\n" + met


SECTIONS: dict[str, Callable[[Results], str]] = {
    "sizes": sizes,
    "approximation": approximation,
    "loss": loss,
    "images": images,
    "constants": constants,
    "decisions": decisions,
    "validation": validation,
}


def filled(page: str) -> str:
    """The page with what lies between marks written anew."""
    fleet = newest("fleet")
    sections = {name: functools.partial(write, fleet) for name, write in SECTIONS.items()}
    return pages.filled(page, sections)


if __name__ == "__main__":
    sys.exit(pages.main(__doc__, "benchmarks.fleet.tables", PAGE, filled))
