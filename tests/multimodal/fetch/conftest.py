"""A host of media on this machine, and threads for a fetcher."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from sensorium.multimodal.fetch import client
from sensorium.multimodal.workers.threads import ThreadWorkers
from tests.multimodal.support import MediaServer, media_server


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_FIRST_BACKOFF", 0.001)


@pytest.fixture
def workers() -> Iterator[ThreadWorkers]:
    workers = ThreadWorkers(1)
    yield workers
    workers.close()


@pytest.fixture
async def server() -> AsyncIterator[MediaServer]:
    async with media_server() as server:
        yield server
