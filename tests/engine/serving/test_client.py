"""The client of an engine process that does not do what it should."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sensorium.config import engine_config
from sensorium.core.request import EngineRequest, SequenceUpdate
from sensorium.engine import wire
from sensorium.engine.serving.client import DELIVERED_AT_ONCE, EngineClient, OutputQueue
from sensorium.errors import (
    ENDED,
    ENDED_ALONE,
    EngineDeadError,
    OverloadedError,
    SensoriumError,
)
from sensorium.multimodal.items import Features, MediaItem
from sensorium.multimodal.shared_memory import SharedArraysFolder
from sensorium.params import SamplingParams

REQUEST = EngineRequest("a", (1,), SamplingParams(), 1)
ITEM = MediaItem("image", b"digest", Features("image", {}, 1, {}))


@pytest.mark.parametrize(
    ("script", "how"), [("exit 3", "ended with status 3"), ("kill -9 $$", "was ended by SIGKILL")]
)
async def test_a_process_that_ends_at_once_is_no_hang(
    script: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    client = EngineClient(engine_config())
    folder = Path(client._process.folder)
    with pytest.raises(EngineDeadError, match=how):
        await asyncio.wait_for(client.start(), 60)
    await client.stop()
    assert not folder.exists()


async def test_a_start_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexec sleep 1000\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    client = EngineClient(engine_config(engine_start_timeout=0.2))
    with pytest.raises(EngineDeadError, match="--engine-start-timeout"):
        await asyncio.wait_for(client.start(), 60)
    await client.stop()
    assert client._process.returncode == -9


def test_a_client_that_cannot_be_made_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def failing(*_: object) -> None:
        raise OSError("too many open files")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="open files"):
        patch.setattr("zmq.asyncio.Context.socket", failing)
        EngineClient(engine_config())
    assert not list(tmp_path.iterdir())


class FakeProcess:
    """Ends when it is killed."""

    started = True

    def __init__(self) -> None:
        self.returncode: int | None = None
        self._ended = asyncio.Event()

    def kill(self) -> None:
        self.returncode = -9
        self._ended.set()

    async def wait(self) -> int | None:
        await self._ended.wait()
        return self.returncode

    def close(self) -> None:
        """Nothing is left."""


class FakeSocket:
    """Receives what is put into ``incoming``; what was sent is in ``sent``."""

    def __init__(self) -> None:
        self.incoming: asyncio.Queue[bytes] = asyncio.Queue()
        self.sent: list[Any] = []

    async def recv(self) -> bytes:
        return await self.incoming.get()

    def send(self, data: bytes) -> None:
        self.sent.append(wire.decode_to_engine(data))

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
async def started() -> Any:
    """A client as after ``start``, with a fake process behind a fake socket."""
    client = EngineClient(engine_config())
    client._socket.close()
    client._process.close()
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


async def test_a_message_that_cannot_be_read_ends_everything_with_an_error(
    started: tuple[EngineClient, FakeSocket, FakeProcess],
) -> None:
    client, socket, process = started
    output_queue: OutputQueue = asyncio.Queue()
    client.submit(REQUEST, [], output_queue)
    waiting = asyncio.create_task(client.stats())
    socket.incoming.put_nowait(b"\xc1")
    assert isinstance(await asyncio.wait_for(output_queue.get(), 60), EngineDeadError)
    with pytest.raises(EngineDeadError):
        await asyncio.wait_for(waiting, 60)
    assert process.returncode is not None
    assert not client.alive
    with pytest.raises(EngineDeadError):
        client.submit(REQUEST, [], output_queue)


async def test_news_go_to_their_request_until_it_ends(
    started: tuple[EngineClient, FakeSocket, FakeProcess],
) -> None:
    client, socket, _ = started
    output_queue: OutputQueue = asyncio.Queue()
    client.submit(REQUEST, [], output_queue)
    client.abort(["a", "unknown"])
    client.abort(["a"])
    assert [type(message) for message in socket.sent] == [wire.Submit, wire.Abort]
    client.submit(REQUEST, [], output_queue)
    refused = wire.Refused("a", "no", "overloaded")
    for message in (refused, wire.Refused("other", "no", "overloaded")):
        socket.incoming.put_nowait(wire.encode(message))
    assert isinstance(await asyncio.wait_for(output_queue.get(), 60), OverloadedError)
    assert client.num_open == 0
    assert output_queue.empty()


async def test_what_an_unknown_code_means_is_not_the_callers_fault(
    started: tuple[EngineClient, FakeSocket, FakeProcess],
) -> None:
    client, socket, _ = started
    output_queue: OutputQueue = asyncio.Queue()
    client.submit(REQUEST, [], output_queue)
    socket.incoming.put_nowait(wire.encode(wire.Refused("a", "no", "never heard of")))
    news = await asyncio.wait_for(output_queue.get(), 60)
    assert isinstance(news, SensoriumError)
    assert news.status == 503


async def test_features_of_an_open_sequence_stay(
    started: tuple[EngineClient, FakeSocket, FakeProcess],
) -> None:
    client, socket, process = started
    folder = SharedArraysFolder()
    output_queue: OutputQueue = asyncio.Queue()
    for request_id in ("aborted", "refused", "died"):
        arrays = folder.write({"pixels": np.zeros((2, 2), np.uint8)})
        features = Features("image", arrays, 1)
        request = dataclasses.replace(REQUEST, request_id=request_id)
        client.submit(request, [MediaItem("image", b"digest", features)], output_queue)
        del arrays, features
    assert len(os.listdir(folder.path)) == 3
    assert [len(sent.features[0].open().arrays) for sent in socket.sent] == [1, 1, 1]
    client.abort(["aborted"])
    assert len(os.listdir(folder.path)) == 2
    socket.incoming.put_nowait(wire.encode(wire.Refused("refused", "no", "overloaded")))
    await output_queue.get()
    assert len(os.listdir(folder.path)) == 1
    process.kill()
    await output_queue.get()
    assert not os.listdir(folder.path)
    folder.close()


async def test_features_must_lie_in_a_segment(
    started: tuple[EngineClient, FakeSocket, FakeProcess],
) -> None:
    client, socket, _ = started
    with pytest.raises(TypeError):
        client.submit(REQUEST, [ITEM], asyncio.Queue())
    assert client.num_open == 0
    assert not socket.sent


async def test_a_process_that_dies_gives_each_request_an_error_of_its_own(
    started: tuple[EngineClient, FakeSocket, FakeProcess], caplog: pytest.LogCaptureFixture
) -> None:
    client, _, process = started
    client._start_seconds = 2.5
    output_queues: list[OutputQueue] = [asyncio.Queue() for _ in range(3)]
    for number, output_queue in enumerate(output_queues):
        client.submit(dataclasses.replace(REQUEST, request_id=str(number)), [], output_queue)
    process.kill()
    await asyncio.wait_for(client.wait_ended(), 60)
    errors = [output_queue.get_nowait() for output_queue in output_queues]
    assert len(set(map(id, errors))) == 3
    for error in errors:
        assert isinstance(error, EngineDeadError)
        assert error.retry_after == 3
        assert "being restarted; try again" in error.message
        assert ENDED in error.message
        assert ENDED_ALONE not in error.message
    assert client.num_open == 0
    assert "was ended by SIGKILL (out of memory?); 3 running" in caplog.text


async def test_a_request_that_ran_alone_is_told_so(
    started: tuple[EngineClient, FakeSocket, FakeProcess],
) -> None:
    client, _, process = started
    output_queue: OutputQueue = asyncio.Queue()
    for number in range(2):  # two samples of it
        client.submit(dataclasses.replace(REQUEST, request_id=str(number)), [], output_queue)
    process.kill()
    await asyncio.wait_for(client.wait_ended(), 60)
    error = output_queue.get_nowait()
    assert isinstance(error, EngineDeadError)
    assert ENDED_ALONE in error.message


async def test_stopping_says_that_the_server_stops(
    started: tuple[EngineClient, FakeSocket, FakeProcess],
) -> None:
    client, socket, process = started
    output_queue: OutputQueue = asyncio.Queue()
    client.submit(REQUEST, [], output_queue)
    stopping = asyncio.create_task(client.stop())
    while wire.Stop not in map(type, socket.sent):
        await asyncio.sleep(0)
    process.kill()
    await stopping
    error = output_queue.get_nowait()
    assert isinstance(error, EngineDeadError)
    assert "shutting down" in error.message
    assert output_queue.empty()


async def test_the_news_of_many_sequences_leave_the_loop_time_for_others(
    started: tuple[EngineClient, FakeSocket, FakeProcess],
) -> None:
    client, socket, _ = started
    output_queues: list[OutputQueue] = [asyncio.Queue() for _ in range(3 * DELIVERED_AT_ONCE)]
    for number, output_queue in enumerate(output_queues):
        client.submit(dataclasses.replace(REQUEST, request_id=str(number)), [], output_queue)
    updates = [SequenceUpdate(str(n), finish_reason="stop") for n in range(len(output_queues))]
    socket.incoming.put_nowait(wire.encode(wire.Updates(updates)))
    seen = [0]
    while seen[-1] < len(output_queues):
        await asyncio.sleep(0)
        seen.append(sum(not output_queue.empty() for output_queue in output_queues))
    steps = [later - earlier for earlier, later in itertools.pairwise(seen)]
    assert max(steps) == DELIVERED_AT_ONCE
    assert [output_queue.get_nowait().request_id for output_queue in output_queues] == [
        u.request_id for u in updates
    ]
    assert client.num_open == 0
