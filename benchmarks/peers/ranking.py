"""Sensorium's figures beside the best ones of other engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.peers.engines import OURS, SIZES


def size_of(engine: str) -> str:
    """The key of ``SIZES`` of an engine's format; "" when it has none."""
    kind = engine.partition("-")[2]
    return next((size for size, kinds in SIZES.items() if kind in kinds), "")


def is_ours(engine: str) -> bool:
    """True for Sensorium, whatever the format."""
    return engine.partition("-")[0] == OURS


def beside_best(figure: Mapping[str, Any]) -> dict[str, Any]:
    """For each format of ours: the best other engine of its size and of all, and ours over it.

    ``range`` has the least and the greatest ratio of two values that were measured in turn.
    """
    found: dict[str, Any] = {}
    for ours in filter(is_ours, figure["median"]):
        others = [engine for engine in figure["median"] if not is_ours(engine)]
        same = [engine for engine in others if size_of(engine) == size_of(ours)]
        found[ours] = {
            which: _ratio(figure, ours, engines)
            for which, engines in (("of_its_size", same), ("of_all", others))
            if engines
        }
    return found


def _ratio(figure: Mapping[str, Any], ours: str, others: list[str]) -> dict[str, Any]:
    median, values = figure["median"], figure["values"]
    choose = max if figure["better"] == "higher" else min
    best = choose(others, key=lambda engine: median[engine])
    each = [mine / other for mine, other in zip(values[ours], values[best], strict=False)]
    return {
        "engine": best,
        "ratio": median[ours] / median[best],
        "range": [min(each), max(each)],
    }


def comparison_table(figures: Mapping[str, Any]) -> str:
    """A line for each figure and engine: the median, and for ours the ratios."""
    lines = []
    for name, figure in figures.items():
        lines.append(f"{name}, {figure['unit']}, {figure['better']} is better")
        for engine, median in figure["median"].items():
            beside = figure["beside_best"].get(engine, {})
            ratios = [
                f"{which.replace('_', ' ')}: {each['ratio']:.2f} x {each['engine']}"
                f" ({each['range'][0]:.2f} to {each['range'][1]:.2f})"
                for which, each in beside.items()
            ]
            count = len(figure["values"][engine])
            lines.append(f"  {engine:<22}{median:>10.4g}  n={count}  {'; '.join(ratios)}".rstrip())
    return "\n".join(lines)
