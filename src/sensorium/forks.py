"""Guards of forked processes.

A fork copies memory and locks, but of all threads only the one that called it.

Where a model has run, the libraries that compute keep threads; a child would wait for them for
ever. So it would for those of an ``LLM`` that it has from its parent.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable

from sensorium.errors import ForkedProcessError

_ADVICE = (
    "Start processes by 'spawn' (multiprocessing.get_context('spawn'), "
    "ProcessPoolExecutor(mp_context=…), DataLoader(multiprocessing_context='spawn')), or fork them "
    "before the first LLM is made; and make the LLM in the process that uses it (with gunicorn in "
    "post_fork, not before with --preload)."
)

OWN_THREADS = "sensorium-"
"""Prefix of the names of the threads that are started here, and that closing waits for."""


class _Lineage:
    """Number of forks that led to this process, and the threads that they left behind."""

    def __init__(self) -> None:
        self.num_forks = 0
        self.has_computed = False
        self.cannot_compute = False

    def forked(self) -> None:
        """Note a fork; called in every child."""
        self.num_forks += 1
        self.cannot_compute = self.cannot_compute or self.has_computed


_LINEAGE = _Lineage()
os.register_at_fork(after_in_child=_LINEAGE.forked)


def generation() -> int:
    """Return a number that differs in a forked child."""
    return _LINEAGE.num_forks


def release(made_in: int, *closers: Callable[[], object]) -> None:
    """Free threads, processes and descriptors of an object that is gone (``weakref.finalize``).

    Does nothing in a forked child, where they are the parent's: ``made_in`` is the generation of
    the object. The last reference may go in any thread: one of ours, which a closer may wait for,
    leaves the work to another.
    """
    if made_in != generation():
        return
    if threading.current_thread().name.startswith(OWN_THREADS):
        threading.Thread(target=_call, args=(closers,), name="closing").start()
    else:
        _call(closers)


def _call(closers: Iterable[Callable[[], object]]) -> None:
    for close in closers:
        close()


def begin_computing() -> None:
    """Note that a model runs in this process from now on.

    Raises ForkedProcessError where none can run.
    """
    if _LINEAGE.cannot_compute:
        raise ForkedProcessError(
            "No model can run in this process: it was forked from one in which a model has run, "
            f"and lacks the threads that compute. {_ADVICE}"
        )
    _LINEAGE.has_computed = True


def check_owner(made_in: int, name: str) -> None:
    """Raise ForkedProcessError for an object that a fork brought: ``made_in`` is its generation."""
    if made_in != _LINEAGE.num_forks:
        raise ForkedProcessError(
            f"This {name} belongs to the process from which this one was forked: its threads are "
            f"not here. {_ADVICE}"
        )
