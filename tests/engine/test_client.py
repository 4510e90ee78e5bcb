"""The client of an engine process that does not do what it should."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from sensorium.config import engine_config
from sensorium.core.request import EngineRequest
from sensorium.engine import client as client_module
from sensorium.engine import wire
from sensorium.engine.client import EngineClient, Inbox
from sensorium.errors import EngineDeadError, OverloadedError
from sensorium.multimodal.items import Features, MediaItem
from sensorium.params import SamplingParams

REQUEST = EngineRequest("a", (1,), SamplingParams(), 1)
ITEM = MediaItem("image", b"digest", Features("image", {}, 1, {}))


@pytest.mark.parametrize("script", ["exit 3", "kill -9 $$"])
async def test_a_process_that_ends_at_once_is_no_hang(
    script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    client = EngineClient(engine_config())
    folders = [Path(client._folder), client._segments.folder]
    with pytest.raises(EngineDeadError, match="status"):
        await asyncio.wait_for(client.start(), 30)
    await client.stop()
    assert not any(folder.exists() for folder in folders)


class FakeProcess:
    """Ends when it is killed."""

    def __init__(self) -> None:
        self.returncode: int | None = None
        self._ended = asyncio.Event()

    def kill(self) -> None:
        self.returncode = -9
        self._ended.set()

    async def wait(self) -> int | None:
        await self._ended.wait()
        return self.returncode


class FakeSocket:
    """Receives what is put into ``inbox``; what was sent is in ``sent``."""

    def __init__(self) -> None:
        self.inbox: asyncio.Queue[bytes] = asyncio.Queue()
        self.sent: list[Any] = []

    async def recv(self) -> bytes:
        return await self.inbox.get()

    def send(self, data: bytes) -> None:
        self.sent.append(wire.decode_to_engine(data))

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
async def started() -> Any:
    """A client as after ``start``, with a fake process behind a fake socket."""
    client = EngineClient(engine_config())
    client._socket.close()
    socket, process = FakeSocket(), FakeProcess()
    client._socket, client._process, client._alive = socket, process, True  # type: ignore[assignment]
    client._tasks = [
        asyncio.create_task(client._receive()),
        asyncio.create_task(client._watch(asyncio.ensure_future(process.wait()))),  # type: ignore[arg-type]
    ]
    yield client, socket, process
    process.kill()
    await client.stop()
    assert client.num_open == 0
    assert client.num_segments_in_use == 0
    assert not os.path.exists(client._folder)


async def test_a_message_that_cannot_be_read_ends_everything_with_an_error(
    started: tuple[EngineClient, FakeSocket, FakeProcess],
) -> None:
    client, socket, process = started
    inbox: Inbox = asyncio.Queue()
    client.submit(REQUEST, [ITEM], inbox)
    waiting = asyncio.create_task(client.stats())
    socket.inbox.put_nowait(b"\xc1")
    assert isinstance(await asyncio.wait_for(inbox.get(), 10), EngineDeadError)
    with pytest.raises(EngineDeadError):
        await asyncio.wait_for(waiting, 10)
    assert process.returncode is not None
    assert not client.alive
    with pytest.raises(EngineDeadError):
        client.submit(REQUEST, [], inbox)


async def test_news_go_to_their_request_until_it_ends(
    started: tuple[EngineClient, FakeSocket, FakeProcess],
) -> None:
    client, socket, _ = started
    inbox: Inbox = asyncio.Queue()
    client.submit(REQUEST, [ITEM, ITEM], inbox)
    assert client.num_segments_in_use == 1
    client.abort(["a", "unknown"])
    assert client.num_segments_in_use == 0
    client.abort(["a"])
    assert [type(message) for message in socket.sent] == [wire.Submit, wire.Abort]
    client.submit(REQUEST, [], inbox)
    refused = wire.Refused("a", "no", "overloaded")
    for message in (refused, wire.Refused("other", "no", "overloaded")):
        socket.inbox.put_nowait(wire.encode(message))
    assert isinstance(await asyncio.wait_for(inbox.get(), 10), OverloadedError)
    assert client.num_open == 0
    assert inbox.empty()


async def test_no_room_for_media_is_an_overload_and_holds_nothing(
    started: tuple[EngineClient, FakeSocket, FakeProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, socket, _ = started
    other = MediaItem("image", b"other", ITEM.features)
    write = client._segments._write

    def full(features: Features) -> Any:
        if client.num_segments_in_use:
            raise OSError("no space left on device")
        return write(features)

    monkeypatch.setattr(client._segments, "_write", full)
    logging.getLogger(client_module.__name__).setLevel(logging.CRITICAL)
    with pytest.raises(OverloadedError):
        client.submit(REQUEST, [ITEM, other], asyncio.Queue())
    logging.getLogger(client_module.__name__).setLevel(logging.NOTSET)
    assert client.num_segments_in_use == 0
    assert client.num_open == 0
    assert not socket.sent
