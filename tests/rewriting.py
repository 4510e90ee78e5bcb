"""Modules compiled once before a run of several processes begins, and the asserts of tests rewritten.

Each of these would do it for all modules, at the same time as the others: eight seconds of a CPU.
So would each server that a test starts, where the environment keeps Python from writing what it
compiles (``PYTHONDONTWRITEBYTECODE``): half a second to a second of a CPU.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import py_compile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from _pytest.assertion import rewrite as pytest_rewrite

# Not part of pytest's public interface.
rewrite: Any = pytest_rewrite

FOLDERS = ("src", "tests", "training", "benchmarks", "examples")


def compile_all(config: pytest.Config, root: Path) -> None:
    """Compile what has changed of a checkout's modules, as Python and pytest do when they import.

    Where that fails, such as for a module that is no Python, they do it later and say why.
    """
    files = [file for folder in FOLDERS for file in (root / folder).rglob("*.py")]
    fork = multiprocessing.get_context("fork")
    num_processes = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(num_processes, fork, _remember, (config,)) as processes:
        list(processes.map(_compile, files, chunksize=8))


_CONFIG: list[pytest.Config] = []


def _remember(config: pytest.Config) -> None:
    _CONFIG.append(config)


def _compile(file: Path) -> None:
    with contextlib.suppress(Exception):
        if file.name.startswith("test_") or file.name == "conftest.py":
            _rewrite(file)
        else:
            _compile_plain(file)


def _compile_plain(file: Path) -> None:
    kept = Path(importlib.util.cache_from_source(str(file)))
    if not kept.exists() or kept.stat().st_mtime < file.stat().st_mtime:
        py_compile.compile(str(file), doraise=True)


def _rewrite(file: Path) -> None:
    kept = rewrite.get_cache_dir(file) / (file.name.removesuffix(".py") + rewrite.PYC_TAIL)
    if rewrite._read_pyc(file, kept) is None and rewrite.try_makedirs(kept.parent):
        digest, code = rewrite._rewrite_test(file, _CONFIG[0])
        rewrite._write_pyc(_CONFIG[0].stash[rewrite.assertstate_key], code, digest, kept)
