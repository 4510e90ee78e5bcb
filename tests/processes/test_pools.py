"""Libraries of our own processes start no thread per core."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from sensorium.processes.start import child_environment
from tests.cores import environment
from tests.e2e.serving import Server

MOST_THREADS = 24
"""Threads of an HTTP process: its own few, and the pools of workers, which are bounded."""
ENGINE_EXTRA = 8


@pytest.mark.parametrize("num_threads", [1, 16])
def test_a_server_on_128_cores_has_the_threads_of_one_on_two(
    num_threads: int, tmp_path: Path
) -> None:
    """A pool of the engine's own size is torch's; nothing else may come to 128."""
    variables = environment(128) | {"OMP_NUM_THREADS": ""}  # the helper's own would hide the fault
    flags = ("--num-threads", str(num_threads), "--num-media-workers", "1")
    server = Server("demo", tmp_path / "log", flags, variables)
    try:
        assert psutil.Process(server.process.pid).num_threads() <= MOST_THREADS
        [engine] = server.engines()
        assert engine.num_threads() <= 2 * num_threads + ENGINE_EXTRA
    finally:
        server.stop()


def test_what_the_environment_sets_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    found = child_environment()
    assert (found["OPENBLAS_NUM_THREADS"], found["TOKENIZERS_PARALLELISM"]) == ("3", "false")
    assert child_environment(one_thread=True)["OPENBLAS_NUM_THREADS"] == "1"
