"""Progress of long tasks: bars in a terminal, a log line per interval elsewhere.

Nothing is shown of a task that ends within two seconds, and nothing at all with
``SENSORIUM_PROGRESS=0`` (the flag ``--no-progress``). Bars go to stderr, never to the output of a
command.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from sensorium.environment import progress_wanted

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    Base = tqdm[Any]
else:
    Base = tqdm

DELAY = 2.0
"""Seconds that a task takes before it is shown."""
INTERVAL = 10.0
"""Seconds between two log lines of a task."""
SCALED = ("B", "weights")
"""Units that are counted in thousands and more."""


class TerminalBar(Base):
    """A bar that appears after ``DELAY`` seconds, and starts no thread."""

    monitor_interval = 0

    def __init__(self, *args: Any, **keywords: Any) -> None:
        keywords.pop("name", None)  # of the Hugging Face hub's own bars
        defaults = {"delay": DELAY, "leave": False, **_width()}
        super().__init__(*args, **{**defaults, **keywords})

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Draw the bar, unless it is too early; log lines that are written make tqdm ask for it.

        Returns:
            True if it was drawn, as tqdm expects, whose declared type says otherwise.
        """
        if msg == "" or time.time() >= getattr(self, "start_t", 0.0) + (self.delay or 0.0):
            super().display(msg, pos)
            return True
        return False


class LoggedBar(TerminalBar):
    """The same, written to the log each ``INTERVAL`` seconds."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        self._next = time.monotonic() + INTERVAL
        super().__init__(
            *args,
            **{**keywords, "file": io.StringIO(), "mininterval": INTERVAL, "delay": INTERVAL},
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Write a line if the last is long enough ago."""
        if msg != "" and time.monotonic() >= self._next:
            self._next = time.monotonic() + INTERVAL
            logger.info("%s", line_of(self.format_dict))


class HiddenBar(TerminalBar):
    """A bar that is never shown."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **{**keywords, "disable": True})


for _kind in (TerminalBar, LoggedBar, HiddenBar):
    # The default lock is one for processes, and starts a helper process.
    _kind.set_lock(threading.RLock())


def _width() -> dict[str, Any]:
    """Return the width of bars: that of the terminal, or a usual one where it tells none."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if os.get_terminal_size(sys.stderr.fileno()).columns == 0:
            return {"ncols": 80, "nrows": 20}
    return {"dynamic_ncols": True}


def line_of(facts: Mapping[str, Any]) -> str:
    """Return the state of a bar as text, such as ``Downloading: 1.2GB of 4.0GB (30 %), 9 s``."""
    name = (facts.get("prefix") or "Working").rstrip(": ")
    done, total, unit = facts["n"], facts.get("total"), facts["unit"].strip()

    def shown(number: float) -> str:
        text = tqdm.format_sizeof(number) if facts["unit_scale"] else f"{number:g}"
        return f"{text}B" if unit == "B" else text

    of = f" of {shown(total)}" if total else ""
    counted = "" if unit == "B" else f" {unit}"
    percent = f" ({100 * done / total:.0f} %)" if total else ""
    more = f", {facts['postfix']}" if facts.get("postfix") else ""
    return f"{name}: {shown(done)}{of}{counted}{percent}, {facts['elapsed']:.0f} s{more}"


class _Stderr(logging.Handler):
    """Writes to stderr in a process that has set up no log."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line."""
        if not logging.getLogger().handlers:
            print(self.format(record), file=sys.stderr, flush=True)


def write_lines() -> None:
    """Write the lines of long tasks to stderr in a command that logs nothing else."""
    if not logger.handlers:
        logger.addHandler(_Stderr())
        logger.setLevel(logging.INFO)


def bar_class() -> type[TerminalBar]:
    """Return the kind of bars for this process: in a terminal, in the log, or hidden."""
    if not progress_wanted():
        return HiddenBar
    return TerminalBar if _is_shown() else LoggedBar


@contextlib.contextmanager
def bar(
    title: str,
    total: float | None,
    *,
    unit: str = "",
    keep: bool = False,
    delay: float = DELAY,
    initial: int = 0,
) -> Iterator[TerminalBar]:
    """Show the progress of a task; the caller calls ``update`` of what this yields.

    Args:
        title: of the task, such as "Loading weights".
        total: number of units, None if unknown.
        unit: "B" for bytes, else a plural such as "requests".
        keep: leave the full bar in the terminal.
        delay: seconds until it is shown in a terminal.
        initial: units that were done before.
    """
    kind = bar_class()
    spaced = unit if unit in ("", "B") else f" {unit}"
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(
            kind(
                total=total,
                desc=title,
                unit=spaced,
                unit_scale=unit in SCALED,
                leave=keep,
                delay=delay,
                initial=initial,
            )
        )
        if kind is TerminalBar:
            stack.enter_context(_log_above())
        yield made


_LOCK = threading.Lock()
_REDIRECTS: list[contextlib.AbstractContextManager[None]] = []
"""The redirection of the log, once for each bar that is open: the same object."""


@contextlib.contextmanager
def _log_above() -> Iterator[None]:
    """Write log lines of this process above the bars, while any is open."""
    with _LOCK:
        if not _REDIRECTS:
            _REDIRECTS.append(logging_redirect_tqdm(tqdm_class=TerminalBar))
            _REDIRECTS[0].__enter__()
        else:
            _REDIRECTS.append(_REDIRECTS[0])
    try:
        yield
    finally:
        with _LOCK:
            last = _REDIRECTS.pop()
            if not _REDIRECTS:
                last.__exit__(None, None, None)


def _is_shown() -> bool:
    """Return whether stderr is a terminal, or a notebook, which shows bars, too."""
    return "ipykernel" in sys.modules or (sys.stderr is not None and sys.stderr.isatty())
