"""Servers that tests start do not outlive the tests."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import psutil

from tests.e2e.serving import tied_to_this_process

RUN = """
import subprocess, sys
from tests.e2e.serving import tied_to_this_process
child = subprocess.Popen(["sleep", "600"], preexec_fn=tied_to_this_process())
print(child.pid, flush=True)
child.wait()
"""


def test_a_test_run_that_is_killed_leaves_no_server() -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", RUN],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    with run:
        assert run.stdout is not None
        child = psutil.Process(int(run.stdout.readline()))
        run.kill()
    _, alive = psutil.wait_procs([child], timeout=300)
    assert not alive


def test_other_threads_tie_nothing_to_their_end() -> None:
    told: list[object] = []
    thread = threading.Thread(target=lambda: told.append(tied_to_this_process()))
    thread.start()
    thread.join()
    assert told == [None]
