"""Write the tables of docs/performance.md from the newest comparison of each CPU level.

    python -m benchmarks.peers.tables [--check]

``--check`` only says whether the page shows the newest results.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks import pages
from benchmarks.chart import CHECKPOINTS, newest
from benchmarks.harness import RESULTS, ROOT
from benchmarks.pages import table
from benchmarks.peers.engines import FORMATS, LEVELS
from benchmarks.peers.ranking import is_ours

PAGE = ROOT / "docs" / "performance.md"
COLUMNS = {
    "decode_b1": "decode 1",
    "decode_b8": "8",
    "decode_b32": "32",
    "prefill_2048": "prefill 2048",
    "image_first": "new image, s",
    "image_repeat_same_text": "again, s",
    "image_repeat_other_text": "other text, s",
    "images_x8": "8 images, s",
    "start_cold": "start cold, s",
    "start_warm": "start, s",
    "peak_memory": "peak, GB",
    "peak_anonymous": "not mapped, GB",
}
NAMES = {
    "sensorium": "Sensorium",
    "llamacpp": "llama.cpp",
    "openvino": "OpenVINO",
    "vllm": "vLLM",
    "transformers": "transformers",
}
NONE_YET = "There is no result of this level yet."


def section(level: str) -> str:
    """The tables of a level's newest result in Markdown."""
    name = f"peers-{level}"
    if not any(RESULTS.glob(f"{name}-????-??-??.json")):
        return NONE_YET
    result = newest(name)
    about = "how many times as good as the best other engine each format of weights is"
    parts = [_conditions(result), f"![Bars: {about}](assets/{name}.svg)"]
    for checkpoint, found in result["checkpoints"].items():
        figures = {key: found["figures"][key] for key in COLUMNS if key in found["figures"]}
        title = CHECKPOINTS.get(checkpoint, checkpoint)
        parts += [medianstable(title, figures), ratiostable(title, figures)]
    return "\n\n".join(part for part in parts if part)


def medianstable(title: str, figures: Mapping[str, Any]) -> str:
    """A row for each engine, a column for each figure; the best of a column is bold."""
    rows = []
    for engine in _engines(figures):
        cells = [_median(figure, engine) for figure in figures.values()]
        rows.append([engine_name(engine), *cells])
    return table([title, *(COLUMNS[key] for key in figures)], rows)


def ratiostable(title: str, figures: Mapping[str, Any]) -> str:
    """How many times as good ours is as the best other engine with weights of the same size."""
    rows = []
    for engine in filter(is_ours, _engines(figures)):
        cells = [_ratio(figure, engine) for figure in figures.values()]
        if any(cells):
            rows.append([engine_name(engine), *cells])
    head = [f"{title}: times the best other of its size", *(_bare(key) for key in figures)]
    return table(head, rows) if rows else ""


def engine_name(engine: str) -> str:
    """The name as people write it: ``llamacpp-q8_0`` is llama.cpp Q8_0."""
    runner, _, kind = engine.partition("-")
    spelled = kind.upper() if runner == "llamacpp" else kind
    return f"{NAMES[runner]} {spelled}".rstrip()


def _engines(figures: Mapping[str, Any]) -> list[str]:
    order = [f"{runner}-{kind}" for runner, kinds in FORMATS.items() for kind in kinds]
    found = {engine for figure in figures.values() for engine in figure["median"]}
    return sorted(found, key=lambda engine: order.index(engine) if engine in order else -1)


def _median(figure: Mapping[str, Any], engine: str) -> str:
    medians = figure["median"]
    if engine not in medians:
        return "-"
    best = (max if figure["better"] == "higher" else min)(medians.values())
    text = number(medians[engine])
    return f"**{text}**" if medians[engine] == best else text


def _ratio(figure: Mapping[str, Any], engine: str) -> str:
    found = figure["beside_best"].get(engine, {}).get("of_its_size")
    if found is None:
        return ""
    ratios = [found["ratio"], *found["range"]]
    if figure["better"] == "lower":
        ratios = [1 / ratio for ratio in ratios]
    middle, low, high = ratios[0], min(ratios[1:]), max(ratios[1:])
    spread = f" ({low:.2f} to {high:.2f})" if low != high else ""
    return f"{middle:.2f}{spread}"


def _bare(key: str) -> str:
    return COLUMNS[key].removesuffix(", s").removesuffix(", GB")


def number(value: float) -> str:
    """Three significant digits, and whole numbers from 100 on."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _conditions(result: Mapping[str, Any]) -> str:
    settings, machine = result["settings"], result["machine"]
    versions = ", ".join(sorted(set(result["engines"].values())))
    return (
        f"`benchmarks/results/{result['file']}`: {settings['num_threads']} threads of "
        f"{machine['processor']}, medians of up to {settings['rounds']} rounds. {versions}."
    )


def filled(page: str) -> str:
    """The page with the sections between their marks written anew."""
    sections = {f"peers-{level}": functools.partial(section, level) for level in LEVELS}
    return pages.filled(page, sections)


if __name__ == "__main__":
    sys.exit(pages.main(__doc__, "benchmarks.peers.tables", PAGE, filled))
