"""Progress: bars in a terminal once a task is long, lines in the log elsewhere, nothing if hidden."""

from __future__ import annotations

import logging
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sensorium import progress

PROGRAM = """
import logging, sys
from sensorium import progress
logging.basicConfig(level="INFO", format="LOG %(message)s")
delay = float(sys.argv[1])
with progress.bar("Loading weights", 2, unit="files", delay=delay) as bar:
    for _ in range(2):
        bar.update()
        bar.refresh() if delay == 0 else None
        logging.info("a line")
print("the result")
"""


def in_terminal(*arguments: str, **variables: str) -> tuple[str, str]:
    """Return what the program writes to a terminal on stderr, and its standard output."""
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *arguments],
            stdout=subprocess.PIPE,
            stderr=theirs,
            env={**os.environ, **variables},
            text=True,
            check=True,
            timeout=300,
        )
        os.close(theirs)
        theirs = -1
        shown = b""
        while True:
            try:
                shown += os.read(ours, 65536)
            except OSError:  # the other end is closed, and all is read
                return shown.decode(), done.stdout
    finally:
        os.close(ours)
        if theirs >= 0:
            os.close(theirs)


def test_a_bar_in_a_terminal_and_nothing_on_stdout() -> None:
    shown, output = in_terminal("0")
    assert "Loading weights" in shown
    assert "2/2" in shown
    assert shown.count("LOG a line\r\n") == 2, "log lines stand on lines of their own"
    assert shown.endswith("\r"), "the bar is gone, and what follows begins at the left"
    assert output == "the result\n"


def test_a_short_task_shows_nothing() -> None:
    shown, _ = in_terminal("60")
    assert "Loading" not in shown


def test_it_can_be_hidden() -> None:
    shown, _ = in_terminal("0", SENSORIUM_PROGRESS="0")
    assert "Loading" not in shown


def test_lines_in_the_log_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    monkeypatch.setattr("sys.stderr", open(os.devnull, "w"))  # noqa: SIM115
    caplog.set_level(logging.INFO)
    with progress.bar("Downloading", 4_000_000, unit="B") as bar:
        assert isinstance(bar, progress.LoggedBar)
        bar.update(1_000_000)
    assert caplog.messages[-1].startswith("Downloading: 1.00MB of 4.00MB (25 %), ")


def test_a_line_per_interval(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    bar = progress.LoggedBar(total=1000, desc="Requests")
    for _ in range(1000):
        bar.update()
        bar.refresh()
    bar.close()
    assert caplog.messages == []


LINES = """
import sys
from sensorium import progress
from sensorium.cli.main import main
main(["info", "--port", "1"])
progress.INTERVAL = 0.0
with progress.bar("Lines", 4, unit="lines") as bar:
    bar.set_postfix_str("failed 1", refresh=False)
    bar.update()
"""


def test_a_command_without_a_terminal_and_a_log_writes_lines() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LINES], capture_output=True, text=True, check=True, timeout=300
    )
    line = done.stderr.splitlines()[-1]
    assert line.startswith("Lines: 1 of 4 lines (25 %), ")
    assert line.endswith(", failed 1")


def test_no_thread_is_started() -> None:
    before = set(threading.enumerate())
    for kind in (progress.TerminalBar, progress.LoggedBar, progress.HiddenBar):
        with open(os.devnull, "w") as nothing, kind(total=3, file=nothing) as bar:
            bar.update()
    assert set(threading.enumerate()) == before


def test_the_flag_sets_it_for_this_process_and_its_children(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from sensorium.cli.main import main

    monkeypatch.delenv("SENSORIUM_PROGRESS", raising=False)
    assert main(["info", "--port", "1", "--no-progress"]) == 0
    assert os.environ["SENSORIUM_PROGRESS"] == "0"
    assert progress.bar_class() is progress.HiddenBar
