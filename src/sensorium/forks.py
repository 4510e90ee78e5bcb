"""What a process that was forked must not use: a fork copies memory and locks, but of all threads only the one that
called it.

Where a model has run, the libraries that compute keep threads; in a child they would be waited for for ever. So would
those of an ``LLM`` that the child has from its parent.
"""

from __future__ import annotations

import os

from sensorium.errors import ForkedProcessError

_ADVICE = (
    "Start processes by 'spawn' (multiprocessing.get_context('spawn'), ProcessPoolExecutor(mp_context=…), "
    "DataLoader(multiprocessing_context='spawn')), or fork them before the first LLM is made; and make the LLM in the "
    "process that uses it (with gunicorn in post_fork, not before with --preload)."
)


class _Lineage:
    """How often this process and those before it were forked, and whether threads were left behind."""

    def __init__(self) -> None:
        self.num_forks = 0
        self.has_computed = False
        self.cannot_compute = False

    def forked(self) -> None:
        """Called in every child."""
        self.num_forks += 1
        self.cannot_compute = self.cannot_compute or self.has_computed


_LINEAGE = _Lineage()
os.register_at_fork(after_in_child=_LINEAGE.forked)


def generation() -> int:
    """A number that is another one in a forked child."""
    return _LINEAGE.num_forks


def begin_computing() -> None:
    """Note that a model runs in this process from now on. Raises ForkedProcessError where none can."""
    if _LINEAGE.cannot_compute:
        raise ForkedProcessError(
            "No model can run in this process: it was forked from one in which a model has run, and lacks the threads "
            f"that compute. {_ADVICE}"
        )
    _LINEAGE.has_computed = True


def check_owner(made_in: int, name: str) -> None:
    """Raise ForkedProcessError where an object, made in generation ``made_in``, came by a fork."""
    if made_in != _LINEAGE.num_forks:
        raise ForkedProcessError(
            f"This {name} belongs to the process from which this one was forked: its threads are not here. {_ADVICE}"
        )
