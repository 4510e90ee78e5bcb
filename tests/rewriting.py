"""Asserts of test modules, rewritten once before a run of several processes begins.

Each of these would do it for all modules, at the same time as the others: eight seconds of a CPU.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from _pytest.assertion import rewrite as pytest_rewrite

# Not part of pytest's public interface.
rewrite: Any = pytest_rewrite


def rewrite_all(config: pytest.Config, folder: Path) -> None:
    """Rewrite what pytest has not, as it would when it imports the modules below a folder.

    Where that fails, such as for a module that is no Python, pytest does it later and says why.
    """
    files = [*folder.rglob("test_*.py"), *folder.rglob("conftest.py")]
    fork = multiprocessing.get_context("fork")
    num_processes = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(num_processes, fork, _remember, (config,)) as processes:
        list(processes.map(_rewrite, files, chunksize=8))


_CONFIG: list[pytest.Config] = []


def _remember(config: pytest.Config) -> None:
    _CONFIG.append(config)


def _rewrite(file: Path) -> None:
    with contextlib.suppress(Exception):
        _rewrite_now(file)


def _rewrite_now(file: Path) -> None:
    kept = rewrite.get_cache_dir(file) / (file.name.removesuffix(".py") + rewrite.PYC_TAIL)
    if rewrite._read_pyc(file, kept) is None and rewrite.try_makedirs(kept.parent):
        digest, code = rewrite._rewrite_test(file, _CONFIG[0])
        rewrite._write_pyc(_CONFIG[0].stash[rewrite.assertstate_key], code, digest, kept)
