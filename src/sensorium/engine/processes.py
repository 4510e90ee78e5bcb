"""The environment of the processes that are started from here."""

from __future__ import annotations

import os
import sys

_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


def child_environment(*, one_thread: bool = False) -> dict[str, str]:
    """The caller's environment, with the import path under which this package was found.

    ``one_thread``: libraries start no threads of their own, as in a process that is to fork.
    """
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    if one_thread:
        environment |= dict.fromkeys(_THREADS, "1")
    return environment
