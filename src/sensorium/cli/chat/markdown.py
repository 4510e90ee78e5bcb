"""Markdown that is rendered while it arrives.

Blocks that are complete are printed once and scroll away; the last one is drawn again as it grows,
its end only if it is longer than the screen.
"""

from __future__ import annotations

import time
from types import TracebackType

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

FRAME_SECONDS = 0.08
"""Least time between two drawings of the last block."""
MOST_THOUGHTS = 1000
"""Characters of what a model thinks that are kept for showing their end."""
_THINKS = "Thinking: "
BUSY = 4
"""Times that a drawing takes until the next, so that long blocks leave time for the model."""


class MarkdownAnswer:
    """An answer in the terminal; a context manager. ``write`` takes text without control codes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True)
        self._rest = ""
        self._num_blocks = 0
        self._next_frame = 0.0
        self._thoughts = ""

    def __enter__(self) -> MarkdownAnswer:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._live.update("", refresh=True)
        finally:
            self._live.stop()
        if self._rest.strip():
            self._print(self._rest)
        self._rest = ""

    def write(self, text: str) -> None:
        """Add a piece of the answer."""
        self._rest += text
        start = time.monotonic()
        if start < self._next_frame:
            return
        end = _end_of_complete_blocks(self._rest)
        if end:
            complete, self._rest = self._rest[:end], self._rest[end:]
            self._print(complete)
        self._live.update(_Tail(self._rest, blank=self._num_blocks > 0), refresh=True)
        now = time.monotonic()
        self._next_frame = now + max(FRAME_SECONDS, BUSY * (now - start))

    def think(self, text: str) -> None:
        """Show the end of what the model thinks; it vanishes when the answer begins."""
        self._thoughts = (self._thoughts + text)[-MOST_THOUGHTS:]
        start = time.monotonic()
        if start >= self._next_frame:
            last = " ".join(self._thoughts.split())
            width = max(1, self._console.width - len(_THINKS) - 1)
            self._live.update(
                Text(_THINKS + last[-width:], style="dim", no_wrap=True), refresh=True
            )
            self._next_frame = time.monotonic() + FRAME_SECONDS

    def _print(self, text: str) -> None:
        if self._num_blocks:
            self._console.print()
        self._num_blocks += 1
        self._console.print(rendered(text))


def rendered(text: str) -> Markdown:
    """Return Markdown that shows HTML as text, and the addresses of links."""
    made = Markdown(text, code_theme="ansi_dark", hyperlinks=False)
    made.parsed = _parser().parse(text)
    return made


class _Tail:
    """The end of a block that is being written, as much as fits on the screen."""

    def __init__(self, text: str, *, blank: bool) -> None:
        self._text = text
        self._blank = blank

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(rendered(self._text), options.update(height=None), pad=False)
        if self._blank:
            lines.insert(0, [])
        for line in lines[-max(1, console.height - 2) :]:
            yield from line
            yield Segment.line()


def _parser() -> MarkdownIt:
    return MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


def _end_of_complete_blocks(text: str) -> int:
    """Return where the last top-level block begins: what is before it changes no more."""
    starts = [token.map[0] for token in _parser().parse(text) if token.level == 0 and token.map]
    if len(starts) < 2:
        return 0
    return sum(len(line) + 1 for line in text.split("\n")[: max(starts)])
