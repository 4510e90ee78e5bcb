"""The served description of the API against the server: schemathesis with all of its checks.

It makes requests that the description allows and such that it forbids, and compares the answers.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.fake_frontend import FakeFrontend
from tests.server.harness import running

CONFIG = """
[checks.positive_data_acceptance]
# What is valid also depends on the model, on values that go together, and on what is stored: the
# description has these statuses, too.
expected-statuses = ["2xx", 400, 401, 403, 404, 413, 415, 422, 424]
"""
KEY = "secret"
NUM_EXAMPLES = 5
SECONDS = 300


@pytest.fixture
def url() -> Iterator[str]:
    """The address of a server in another thread, which asks for a key."""
    address: list[str] = []
    is_up, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        async with running(FakeFrontend(), api_key=(KEY,)) as server:
            address.append(server.base_url)
            is_up.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert is_up.wait(60)
    yield address[0]
    stop.set()
    thread.join()


@pytest.mark.slow
def test_no_answer_contradicts_the_description(url: str, tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    start = "from schemathesis.cli import schemathesis; schemathesis()"
    command = [sys.executable, "-c", start, "run", f"{url}/openapi.json"]
    command += ["--checks", "all", "--phases", "examples,coverage,fuzzing,stateful"]
    command += ["--max-examples", str(NUM_EXAMPLES), "--seed", "1", "--no-color"]
    command += ["--generation-database", "none"]
    command += ["--header", f"Authorization: Bearer {KEY}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    assert "generated" in done.stdout
