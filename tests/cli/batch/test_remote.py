"""Requests of a batch to a server that is slow, or away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from sensorium.cli.batch.remote import RemoteCaller
from sensorium.errors import UnavailableError
from sensorium.server.batches.lines import Line
from sensorium.server.batches.runner import LineRunner, Outcome


@pytest.fixture
async def silent() -> AsyncIterator[str]:
    """Address of a server that takes requests and says nothing."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.read(1000):
                pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_a_request_that_takes_too_long_has_failed(silent: str) -> None:
    found: list[Outcome] = []

    async def write(outcome: Outcome) -> None:
        found.append(outcome)

    async with RemoteCaller(silent, api_key=None, timeout=1.0) as caller:
        runner = LineRunner(caller, 1, patience=600)
        async with asyncio.timeout(60):
            await runner.run(iter([Line(1, "a", "/v1/completions", b"{}")]), write)
    [outcome] = found
    assert not outcome.succeeded
    response = json.loads(outcome.text)["response"]
    assert response["status_code"] == 408
    assert "--request-timeout" in response["body"]["error"]["message"]


async def test_a_server_that_is_away_may_come_back() -> None:
    async with RemoteCaller("127.0.0.1:9", api_key=None, timeout=10.0) as caller:
        with pytest.raises(UnavailableError):
            await caller.call("/v1/completions", b"{}")
