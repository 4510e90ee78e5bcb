"""Small numbers that are measured once per machine, kept beside its compiled kernels.

They hold for the kernels' folder, which stands for sources, compiler and CPU, and for what
``_setting`` lists besides.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from sensorium.kernels.cpu.compiler.cache import cache_folder

FILE = "findings.json"
MOST_ENTRIES = 4096
_PREFIXES = ("ATEN_", "DNNL_", "MKL_", "ONEDNN_")
"""Beginnings of the names of variables that choose the code of torch's libraries."""


def find(name: str, measure: Callable[[], int], keep: Callable[[], bool]) -> int:
    """Return the number that was found under ``name`` on this machine, else measure and keep it.

    keep: asked after measuring; if false, the number is good for the caller alone. A file that
    cannot be read or written counts as empty.
    """
    key = f"{_setting()} {name}"
    before = known()
    if key in before:
        return before[key]
    found = measure()
    if keep():
        before[key] = found
        _keep(before)
    return found


def _setting() -> str:
    """Return what results depend on besides the folder: torch, its settings and its threads."""
    variables = sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith(_PREFIXES))
    return " ".join(
        [f"torch={torch.__version__}", f"threads={torch.get_num_threads()}", *variables]
    )


@functools.cache
def known() -> dict[str, int]:
    """Return the findings by key, as the file has them when they are asked for first."""
    folder = cache_folder()
    return {} if folder is None else _read(folder / FILE)


def _read(path: Path) -> dict[str, int]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    items = values.items() if isinstance(values, dict) else ()
    return {key: value for key, value in items if type(value) is int}


def _keep(findings: dict[str, int]) -> None:
    """Write the findings, with those of other processes; whole or not at all."""
    folder = cache_folder()
    if folder is None:
        return
    values = {**_read(folder / FILE), **findings}
    if len(values) > MOST_ENTRIES:
        values = findings
    with contextlib.suppress(OSError):
        handle, name = tempfile.mkstemp(dir=folder, prefix=FILE)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(values, file, indent=0, sort_keys=True)
            os.replace(name, folder / FILE)
        except OSError:
            os.unlink(name)
            raise
