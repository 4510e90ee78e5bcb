"""Processes under measurement.

Started, stopped while another side is measured, ended with all that they started.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import psutil

from sensorium.processes.start import end_with


class ProcessTree:
    """A process of our own with its descendants.

    It is killed when this process ends, however that happens.
    """

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str] | None = None, **streams: Any
    ) -> None:
        self.root = subprocess.Popen(
            command,
            env=env,
            start_new_session=True,
            preexec_fn=_tied_to_this_process(),
            **streams,
        )

    @property
    def alive(self) -> bool:
        """True while the first process runs."""
        return self.root.poll() is None

    def processes(self) -> list[psutil.Process]:
        """The processes that run, parents first."""
        try:
            root = psutil.Process(self.root.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def freeze(self) -> None:
        """Stop all processes, so that an idle one takes nothing from another side."""
        _signal(self.processes(), signal.SIGSTOP)

    def thaw(self) -> None:
        """Let them run again, children first."""
        _signal(reversed(self.processes()), signal.SIGCONT)

    @contextlib.contextmanager
    def only(self) -> Iterator[None]:
        """Let the processes run within, and stop them after."""
        self.thaw()
        try:
            yield
        finally:
            self.freeze()

    def end(self, ask: Callable[[], None], timeout: float, children_timeout: float) -> None:
        """Call ``ask``, which makes the first process end, and kill what is left after the
        timeouts.
        """
        self.thaw()
        children = self.processes()[1:]
        if self.alive:
            ask()
        try:
            self.root.wait(timeout)
        except subprocess.TimeoutExpired:
            self.root.kill()
            self.root.wait()
        _, left = psutil.wait_procs(children, timeout=children_timeout)
        _signal(left, signal.SIGKILL)
        psutil.wait_procs(left, timeout=timeout)


def _signal(processes: Any, number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _tied_to_this_process() -> Callable[[], None] | None:
    """A ``preexec_fn``; None in other threads than the main one, whose end the system would mean."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return functools.partial(end_with, os.getpid())
