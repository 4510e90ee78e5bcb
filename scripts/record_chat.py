#!/usr/bin/env python3
"""Record a conversation with the demo model as an animated SVG.

Runs a shell and ``sensorium chat`` in a pseudo-terminal, types the questions, and draws what the
terminal showed at the time that it showed it. Only long pauses are shortened.

    .venv/bin/python scripts/record_chat.py [--output docs/assets/chat.svg]
"""

from __future__ import annotations

import argparse
import base64
import os
import pty
import re
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from training.pictures import draw_picture  # noqa: E402

IMAGES = {"shapes.png": ("shapes", 298), "chart.png": ("chart", 11)}
"""The files that are asked about: scene and seed of each drawing."""
IMAGE_SIZE = (320, 240)
TYPED = (
    "sensorium chat demo --image shapes.png",
    "What is in the picture?",
    "Where is the blue circle?",
    "/reset",
    "/image chart.png",
    "What color is the tallest bar?",
    "/exit",
)
PROMPT = re.compile(r"(?:^|\n)[$>] $")
"""The end of the output when the shell (``$``) or the chat (``>``) waits for a line."""

KEY_SECONDS = 0.045
THINKING_SECONDS = 0.7
LONGEST_PAUSE = 1.4
LAST_SECONDS = 5.0
ANSWER_TIMEOUT = 120.0

COLUMNS, FONT_SIZE, CELL, LINE_HEIGHT = 66, 14, 8.4, 21
MARGIN, BAR, PANEL, CAPTION = 18, 34, 184, 28
CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r")


@dataclass(frozen=True)
class Output:
    """Text that the terminal received at a time, in seconds since the start."""

    at: float
    text: str


@dataclass(frozen=True)
class Run:
    """Text of one line that appears at once: its place in cells, and when."""

    at: float
    row: int
    column: int
    text: str


def record(folder: Path) -> list[Output]:
    """Type every line of ``TYPED`` into a shell in ``folder``; return what the terminal showed.

    Raises:
        TimeoutError: no new prompt came within ``ANSWER_TIMEOUT`` seconds after a line.
    """
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PS1": "$ ",
        "TERM": "dumb",
    }
    terminal, child_end = pty.openpty()
    shell = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"],
        stdin=child_end,
        stdout=child_end,
        stderr=child_end,
        cwd=folder,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # its controlling terminal
    )
    os.close(child_end)
    outputs: list[Output] = []
    started = time.monotonic()

    def read(seconds: float) -> str:
        end = time.monotonic() + seconds
        received = ""
        while (left := end - time.monotonic()) > 0 and not PROMPT.search(received):
            if select.select([terminal], [], [], left)[0]:
                text = CONTROL.sub("", os.read(terminal, 4096).decode())
                outputs.append(Output(time.monotonic() - started, text))
                received += text
        return received

    try:
        for line in TYPED:
            if not PROMPT.search(read(ANSWER_TIMEOUT)):
                raise TimeoutError(f"no prompt within {ANSWER_TIMEOUT:.0f} s before {line!r}")
            read(THINKING_SECONDS)
            for key in line:
                os.write(terminal, key.encode())
                read(KEY_SECONDS)
            os.write(terminal, b"\r")
        read(ANSWER_TIMEOUT)
    finally:
        shell.kill()
        shell.wait()
        os.close(terminal)
    return outputs


def shortened(outputs: list[Output]) -> list[Output]:
    """Move the outputs to earlier times, so that no pause is longer than ``LONGEST_PAUSE``."""
    result: list[Output] = []
    clock = previous = outputs[0].at
    for output in outputs:
        clock += min(output.at - previous, LONGEST_PAUSE)
        previous = output.at
        result.append(replace(output, at=clock - outputs[0].at))
    return result


def runs_of(outputs: list[Output]) -> list[Run]:
    """Place the outputs in rows of ``COLUMNS`` cells."""
    runs: list[Run] = []
    row = column = 0
    for output in outputs:
        for piece in re.findall(r"\n|[^\n]+", output.text):
            if piece == "\n":
                row, column = row + 1, 0
                continue
            while piece:
                if column == COLUMNS:
                    row, column = row + 1, 0
                part, piece = piece[: COLUMNS - column], piece[COLUMNS - column :]
                runs.append(Run(output.at, row, column, part))
                column += len(part)
    return runs


def transcript(runs: list[Run]) -> list[str]:
    """Return the rows as they stand at the end."""
    rows: dict[int, str] = {}
    for run in runs:
        rows[run.row] = rows.get(run.row, "") + run.text
    return [rows.get(row, "").rstrip() for row in range(max(rows) + 1)]


def shown_from(name: str, runs: list[Run]) -> float:
    """Return the time at which the line that names a file had been typed."""
    row = next(row for row, text in enumerate(transcript(runs)) if name in text)
    return max(run.at for run in runs if run.row == row)


STYLE = """
    .window { fill: #0d1117; stroke: #3d444d; }
    .bar { fill: #3d444d; }
    .frame { fill: none; stroke: #3d444d; }
    .light { fill: #9198a1; }
    text { font: 14px ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
           fill: #f0f6fc; white-space: pre; }
    text, g { animation-duration: DURATIONs; animation-timing-function: step-end;
              animation-iteration-count: infinite; }
    .name { fill: #9198a1; font-size: 12px; }
    .typed { fill: #7ee787; }
    @media (prefers-color-scheme: light) {
      .window { fill: #ffffff; stroke: #d1d9e0; }
      .bar { fill: #eff2f5; }
      .frame { stroke: #d1d9e0; }
      .light { fill: #afb8c1; }
      text { fill: #1f2328; }
      .name { fill: #59636e; }
      .typed { fill: #116329; }
    }
    @media (prefers-reduced-motion: reduce) { * { animation: none !important; } }"""


def draw(outputs: list[Output], images: dict[str, bytes]) -> str:
    """Return the recording as an SVG that repeats itself; without animation it shows the end."""
    runs = runs_of(shortened(outputs))
    rows = transcript(runs)
    total = max(run.at for run in runs) + LAST_SECONDS
    left_width = round(2 * MARGIN + COLUMNS * CELL)
    image_height = PANEL * IMAGE_SIZE[1] // IMAGE_SIZE[0]
    content = max(len(rows) * LINE_HEIGHT, len(images) * (image_height + CAPTION))
    width, height = left_width + PANEL + MARGIN, BAR + 2 * MARGIN + content
    times = {run.at for run in runs} | {shown_from(name, runs) for name in images}
    frames = {at: f"t{number}" for number, at in enumerate(sorted(times))}

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" role="img"',
        f'     viewBox="0 0 {width} {height}">',
        "  <title>sensorium chat demo --image shapes.png</title>",
        f"  <desc>{escape(chr(10).join(rows), quote=False)}</desc>",
        f"  <style>{STYLE.replace('DURATION', f'{total:.1f}')}",
        *(_keyframes(name, at, total) for at, name in frames.items()),
        "  </style>",
        '  <rect class="window" x="0.5" y="0.5" rx="10"',
        f'        width="{width - 1}" height="{height - 1}"/>',
        '  <path class="bar"',
        f'        d="M1 {BAR}V10a9 9 0 0 1 9-9h{width - 20}a9 9 0 0 1 9 9v{BAR - 10}z"/>',
        *(f'  <circle class="light" cx="{20 + 20 * n}" cy="17.5" r="6"/>' for n in range(3)),
    ]
    for run in runs:
        x = MARGIN + run.column * CELL
        y = BAR + MARGIN + run.row * LINE_HEIGHT + FONT_SIZE
        kind = ' class="typed"' if _is_typed(run, rows) else ""
        lines.append(
            f'  <text{kind} x="{x:.1f}" y="{y}" textLength="{len(run.text) * CELL:.1f}" '
            f'style="animation-name:{frames[run.at]}">{escape(run.text, quote=False)}</text>'
        )
    for number, (name, png) in enumerate(images.items()):
        y = BAR + MARGIN + number * (image_height + CAPTION)
        lines += [
            f'  <g style="animation-name:{frames[shown_from(name, runs)]}">',
            f'    <image x="{left_width}" y="{y}" width="{PANEL}" height="{image_height}"',
            f'           href="data:image/png;base64,{base64.b64encode(png).decode()}"/>',
            f'    <path class="frame" d="M{left_width} {y}h{PANEL}v{image_height}h{-PANEL}z"/>',
            f'    <text class="name" x="{left_width}" y="{y + image_height + 16}">{name}</text>',
            "  </g>",
        ]
    return "\n".join([*lines, "</svg>", ""])


def _keyframes(name: str, at: float, total: float) -> str:
    share = 100 * at / total
    return (
        f"    @keyframes {name} {{ 0% {{ visibility: hidden }} {share:.2f}%, 100% "
        f"{{ visibility: visible }} }}"
    )


def _is_typed(run: Run, rows: list[str]) -> bool:
    """Say that a run is part of a line after a prompt, but not the prompt itself."""
    return run.column >= 2 and rows[run.row].startswith(("$ ", "> "))


def main() -> int:
    """Record, and write the SVG."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "assets" / "chat.svg")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, (scene, seed) in IMAGES.items():
            draw_picture(seed, scene, IMAGE_SIZE).image.save(folder / file, optimize=True)
        outputs = record(folder)
        images = {file: (folder / file).read_bytes() for file in IMAGES}
    args.output.write_text(draw(outputs, images), encoding="utf-8")
    print("\n".join(transcript(runs_of(outputs))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
