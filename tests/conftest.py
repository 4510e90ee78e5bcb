"""Fixtures of every test, and the order in which files of tests run."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.rewriting import compile_all

SHARED = ("tests/reliability/", "tests/ray/")
"""Folders whose tests share servers, or a cluster, for the whole session: of each of them, one
process runs all files."""
LONG = (
    *SHARED,
    "tests/bench/test_scripts.py",
    "tests/e2e/",
    "tests/kernels/",
)
"""What takes longest begins first, so that all processes end at about the same time."""
NOT_FAST = (
    *SHARED,
    "tests/assets/",
    "tests/bench/",
    "tests/browser/",
    "tests/cli/chat/test_local.py",
    "tests/cli/chat/test_terminal.py",
    "tests/cli/commands/test_bench.py",
    "tests/cli/commands/test_embed.py",
    "tests/clients/",
    "tests/docs/test_running.py",
    "tests/docs/test_site.py",
    "tests/docs/test_troubleshooting.py",
    "tests/e2e/",
    "tests/engine/grammar/test_compiler.py",
    "tests/engine/parallel/",
    "tests/engine/serving/test_process.py",
    "tests/engine/serving/test_worker.py",
    "tests/examples/",
    "tests/fuzz/",
    "tests/kernels/",
    "tests/layers/",
    "tests/models/",
    "tests/multimodal/workers/",
    "tests/processes/",
    "tests/runtime/",
    "tests/test_async_llm.py",
    "tests/test_docs_assets.py",
    "tests/test_embed.py",
    "tests/test_llm",
    "tests/training/",
)
"""Beginnings of the names of folders and files that ``--fast`` leaves out, besides tests marked as
slow: they compile kernels, run models or start processes."""
ROOT = Path(__file__).parents[1]

# No example fails for the time that it takes, or that making it takes: other programs may run.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast", action="store_true", help="the quick tests only, see CONTRIBUTING.md"
    )


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Take one process more than there are CPUs: tests of servers wait for a fifth of their time."""
    return len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [0]) + 1


def pytest_sessionstart(session: pytest.Session) -> None:
    """Prepare what all processes of a run would prepare at the same time."""
    if session.config.getoption("numprocesses", None) and not hasattr(
        session.config, "workerinput"
    ):
        compile_all(session.config, ROOT)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Iterator[None]:
    """Keep the collector of garbage from what each process loads for all tests.

    It would walk these two million objects while they come, and again whenever a test collects.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out what is not fast before it is imported."""
    if not config.getoption("fast") or not collection_path.is_relative_to(ROOT):
        return None
    name = collection_path.relative_to(ROOT).as_posix() + "/" * collection_path.is_dir()
    return name.startswith(NOT_FAST) or None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order files, not the tests within a file; with ``--fast`` leave out what is marked as slow."""
    if config.getoption("fast"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    ranks = {prefix: rank for rank, prefix in enumerate(LONG)}

    def rank(item: pytest.Item) -> int:
        found = (rank for prefix, rank in ranks.items() if item.nodeid.startswith(prefix))
        return next(found, len(ranks))

    items.sort(key=rank)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each process whole files, and those that share servers together."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return next((folder for folder in SHARED if file.startswith(folder)), file)

    return Scheduling(config, log) if config.getvalue("dist") == "loadfile" else None


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Take back the variables that the code under test sets for its child processes."""
    before = dict(os.environ)
    yield
    if os.environ != before:
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt, as in a terminal: what runs in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def same_priority() -> Iterator[None]:
    """Take back real-time priority that a library has set; child processes would inherit it."""
    yield
    if hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
