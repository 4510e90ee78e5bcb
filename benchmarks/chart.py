"""Draw the comparisons with other engines in ``results/`` as the charts that README.md and docs/ show.

    python -m benchmarks.chart [--check]

Every bar is a ratio within one run, on a logarithmic scale: to the right Sensorium is faster, to
the left it is slower. ``--check`` only says whether the committed charts are up to date.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
ASSETS = ROOT / "docs" / "assets"

ENGINE_ROWS = {
    "start_cold": "start to first token, first ever",
    "start_warm": "start to first token, later",
    "decode_b1": "decode, 1 sequence",
    "decode_b8": "decode, 8 sequences",
    "decode_b32": "decode, 32 sequences",
    "prefill_2048": "prefill of 2048 tokens",
    "image_first": "first token, new 640×480 image",
    "image_repeat_same_text": "first token, same request again",
    "image_repeat_other_text": "first token, same image, new text",
    "images_x8": "8 images at once, 32 tokens each",
}
MEDIA_ROWS = {
    "new_images_per_second": "throughput",
    "new_image_p50": "first token of an image, p50",
    "new_text_first_token_p50": "first token of a text meanwhile, p50",
    "new_health_p99": "/health meanwhile, p99",
    "known_images_per_second": "throughput",
    "known_image_p50": "first token of an image, p50",
    "known_text_first_token_p50": "first token of a text meanwhile, p50",
    "known_health_p99": "/health meanwhile, p99",
    "first_token_new": "first token of a new image, alone",
    "first_token_known": "first token of a known image, alone",
    "one_url_seconds_fast": "100 requests for one URL",
    "known_image_front": "CPU time of a known image, by data",
    "known_uuid_front": "CPU time of a known image, by uuid",
}
MEDIA_GROUPS = {
    "32 clients, new 2048×2048 JPEGs": "new_",
    "32 clients, known 2048×2048 JPEGs": "known_",
    "Other requests": "",
}
FORMAT_ROWS = {
    "decode_b1": "decode, 1 sequence",
    "decode_b8": "decode, 8 sequences",
    "decode_b32": "decode, 32 sequences",
    "prefill_2048": "prefill of 2048 tokens",
    "image_first": "first token, new 640×480 image",
    "image_repeat_other_text": "first token, same image, new text",
    "start_warm": "start to first token",
    "peak_memory": "peak memory",
}
CHECKPOINTS = {
    "qwen2-0.5b": "Text model, 0.5B",
    "qwen2-vl-2b": "Qwen2-VL-2B",
}

WIDTH, MARGIN = 820, 20
LEFT, RIGHT = 258, 650
"""Edges of the plot; labels stand before it, the measured values after it."""
ROW, HEAD = 22, 34


@dataclass(frozen=True)
class Bar:
    """One measured figure of both engines."""

    label: str
    ours: float
    theirs: float
    unit: str
    speedup: float
    other: str = ""
    """The engine that ours is compared with, where it is not the same for all bars."""


@dataclass(frozen=True)
class Chart:
    """What one picture shows: groups of bars under their headings, and lines below."""

    title: str
    subtitle: str
    groups: Mapping[str, list[Bar]]
    notes: list[str]


def newest(name: str) -> dict[str, Any]:
    """Return the newest result of a benchmark; the files' names end in a date."""
    path = max(RESULTS.glob(f"{name}-????-??-??.json"))
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return result | {"file": path.name}


def engine_chart() -> Chart:
    """Start, decode, prefill and images of both engines, from ``peers-DATE.json``."""
    result = newest("peers")
    groups = {
        CHECKPOINTS[name]: [
            bar(label, checkpoint["figures"][key])
            for key, label in ENGINE_ROWS.items()
            if key in checkpoint["figures"]
        ]
        for name, checkpoint in result["checkpoints"].items()
    }
    vllm = result["engines"]["vllm"].split()[-1]
    conditions = (
        f"{result['dtype']}, {result['num_threads']} threads, random weights in real shapes, "
        f"medians of {result['rounds']} rounds (starts: {result['start_rounds']})"
    )
    notes = [machine_note(result), conditions, sources_note(result, vllm)]
    return Chart("Sensorium and vLLM on one CPU", subtitle(vllm), groups, notes)


def media_chart() -> Chart:
    """Images on the servers of both, from ``media-peers-DATE.json``."""
    result = newest("media-peers")
    peers = result["sections"]["peers"]
    rounds = len(peers["rounds"]) // len(peers["engines"])
    left = dict(MEDIA_ROWS)
    groups: dict[str, list[Bar]] = {}
    for heading, prefix in MEDIA_GROUPS.items():
        keys = [k for k in left if k.startswith(prefix) and (not prefix or "front" not in k)]
        groups[heading] = [bar(left.pop(key), peers["figures"][key]) for key in keys]
    vllm = peers["engines"]["vllm"]
    conditions = (
        f"Qwen2-VL with few layers, so that the time goes into media; "
        f"{peers['num_threads']} threads, {peers['max_pixels']} pixels an image, "
        f"medians of {rounds} rounds"
    )
    notes = [machine_note(result), conditions, sources_note(result, vllm)]
    return Chart("Images on the servers of Sensorium and vLLM", subtitle(vllm), groups, notes)


def formats_chart(result: Mapping[str, Any]) -> Chart:
    """Each format of weights beside the best other engine of its size, from a ``peers-LEVEL`` result."""
    groups: dict[str, list[Bar]] = {}
    for name, checkpoint in result["checkpoints"].items():
        for key, label in FORMAT_ROWS.items():
            bars = list(format_bars(checkpoint["figures"].get(key)))
            if bars:
                groups[f"{CHECKPOINTS.get(name, name)}: {label}, {bars[0].unit}"] = bars
    level = {"native": "its own instructions", "avx2": "AVX2 alone"}[result["settings"]["cpu"]]
    settings, machine = result["settings"], result["machine"]
    versions = ", ".join(sorted(set(result["engines"].values())))
    conditions = (
        f"{level}, {settings['num_threads']} threads, random weights in real shapes, "
        f"medians of up to {settings['rounds']} rounds"
    )
    notes = [machine_note(result), conditions, versions]
    notes.append(f"torch {machine['packages']['torch']}  ·  benchmarks/results/{result['file']}")
    about = "Times as good as the best other engine with weights of the same size, logarithmic. Orange: worse."
    return Chart(f"Sensorium and other engines, {level}", about, groups, notes)


def format_bars(figure: Mapping[str, Any] | None) -> Iterator[Bar]:
    """A bar for each format of ours that has another engine of its size beside it."""
    for engine, found in ({} if figure is None else figure["beside_best"]).items():
        beside = found.get("of_its_size")
        if figure is not None and beside is not None:
            medians = figure["median"]
            ours, theirs = medians[engine], medians[beside["engine"]]
            speedup = ours / theirs if figure["better"] == "higher" else theirs / ours
            kind = engine.partition("-")[2] or "as stored"
            yield Bar(kind, ours, theirs, figure["unit"], speedup, beside["engine"])


def bar(label: str, figure: Mapping[str, Any]) -> Bar:
    """Return the medians of a figure, and how many times as fast Sensorium is."""
    ours, theirs = figure["median"]["sensorium"], figure["median"]["vllm"]
    speedup = ours / theirs if figure["better"] == "higher" else theirs / ours
    return Bar(label, ours, theirs, figure["unit"].partition(" ")[0], speedup)


def subtitle(vllm: str) -> str:
    """Say what the bars mean."""
    return (
        f"Times as fast as vLLM {vllm} (CPU build), logarithmic. Orange: Sensorium is slower. "
        f"Right: Sensorium / vLLM."
    )


def machine_note(result: Mapping[str, Any]) -> str:
    """Name the machine and the day."""
    machine = result["machine"]
    day = result["date"].partition("T")[0]
    return f"{day}  ·  {machine['processor']}, {machine['num_cores']} cores"


def sources_note(result: Mapping[str, Any], vllm: str) -> str:
    """Name the versions and the file of the result."""
    machine = result["machine"]
    ours = result.get("sensorium") or result["engines"]["sensorium"].split()[-1]
    return (
        f"Sensorium {ours}, vLLM {vllm}, torch {machine['packages']['torch']}, "
        f"Python {machine['python']}  ·  benchmarks/results/{result['file']}"
    )


STYLE = """
    .card { fill: #ffffff; stroke: #d1d9e0; }
    text { font: 13px -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif;
           fill: #1f2328; }
    .title { font-size: 17px; font-weight: 600; }
    .heading { font-weight: 600; }
    .quiet { fill: #59636e; font-size: 12px; }
    .end { text-anchor: end; }
    .middle { text-anchor: middle; }
    .grid { stroke: #d1d9e0; }
    .one { stroke: #59636e; }
    .faster { fill: #1a7f64; }
    .slower { fill: #bc4c00; }
    @media (prefers-color-scheme: dark) {
      .card { fill: #0d1117; stroke: #3d444d; }
      text { fill: #f0f6fc; }
      .quiet { fill: #9198a1; }
      .grid { stroke: #3d444d; }
      .one { stroke: #9198a1; }
      .faster { fill: #3fb995; }
      .slower { fill: #f0883e; }
    }"""


def draw(chart: Chart) -> str:
    """Return the chart as an SVG, light or dark as the reader prefers."""
    speedups = [bar.speedup for bars in chart.groups.values() for bar in bars]
    low = math.floor(math.log2(min([*speedups, 0.9])))
    high = math.ceil(math.log2(max([*speedups, 1.1])))
    top = 88
    bottom = top + sum(HEAD + ROW * len(bars) for bars in chart.groups.values())
    height = bottom + 24 + 18 * len(chart.notes)

    def place(value: float) -> float:
        return LEFT + (math.log2(value) - low) / (high - low) * (RIGHT - LEFT)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" role="img"',
        f'     viewBox="0 0 {WIDTH} {height}">',
        f"  <title>{escape(chart.title)}</title>",
        f"  <style>{STYLE}\n  </style>",
        f'  <rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="10"/>',
        _text(MARGIN, 32, chart.title, "title"),
        _text(MARGIN, 54, chart.subtitle, "quiet"),
    ]
    for power in range(low, high + 1):
        x, kind = place(2.0**power), "one" if power == 0 else "grid"
        lines.append(f'  <path class="{kind}" d="M{x:.1f} {top}V{bottom}"/>')
        lines.append(_text(x, top - 8, f"{2.0**power:g}×", "quiet middle"))
    y = top
    for heading, bars in chart.groups.items():
        lines.append(_text(MARGIN, y + 22, heading, "heading"))
        y += HEAD
        for bar in bars:
            lines += _bar(bar, y, place(1.0), place(bar.speedup))
            y += ROW
    lines += [
        _text(MARGIN, bottom + 26 + 18 * number, note, "quiet")
        for number, note in enumerate(chart.notes)
    ]
    return "\n".join([*lines, "</svg>", ""])


def _bar(bar: Bar, y: int, one: float, end: float) -> Iterator[str]:
    kind = "faster" if bar.speedup >= 1 else "slower"
    left, width = min(one, end), abs(end - one)
    outside, anchor = (end + 6, "") if bar.speedup >= 1 else (end - 6, " end")
    middle = y + 14
    yield _text(LEFT - 10, middle, bar.label, "end")
    yield (
        f'  <rect class="{kind}" x="{left:.1f}" y="{y + 3}" width="{width:.1f}" '
        f'height="{ROW - 7}" rx="2"/>'
    )
    yield _text(outside, middle, f"{bar.speedup:.{1 if bar.speedup >= 2 else 2}f}×", kind + anchor)
    yield _text(WIDTH - MARGIN, middle, _values(bar), "quiet end")


def _values(bar: Bar) -> str:
    if bar.other:
        return f"{_number(bar.ours)} / {_number(bar.theirs)} {bar.other}"
    factor, unit = (1000, "ms") if bar.unit == "s" and bar.theirs < 1 else (1, bar.unit)
    return f"{_number(factor * bar.ours)} / {_number(factor * bar.theirs)} {unit}"


def _number(value: float) -> str:
    """Return three significant digits, and whole numbers from 100 on."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'  <text class="{kind}" x="{x:g}" y="{y:g}">{escape(text, quote=False)}</text>'


CHARTS: dict[str, Callable[[], Chart]] = {
    "peers.svg": engine_chart,
    "media-peers.svg": media_chart,
    **{
        f"peers-{level}.svg": functools.partial(
            lambda name: formats_chart(newest(name)), f"peers-{level}"
        )
        for level in ("native", "avx2")
        if any(RESULTS.glob(f"peers-{level}-????-??-??.json"))
    },
}
"""Charts by file; those of the CPU levels where there is a result."""


def main() -> int:
    """Write the charts, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if out of date")
    args = parser.parse_args()
    for name, make in CHARTS.items():
        path, svg = ASSETS / name, draw(make())
        if not args.check:
            path.write_text(svg, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != svg:
            print(f"{path.relative_to(ROOT)} is out of date: run python benchmarks/chart.py")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
