"""The processes of Ray that this one has started."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import psutil


def processes_of(name: str) -> Iterator[psutil.Process]:
    """Those whose command says ``name``; what ends meanwhile is left out."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # some live for a moment only
            if name in " ".join(process.cmdline()):
                yield process
