"""Worker processes: what a file does to a decoder costs that file's request an error, and
nothing else.
"""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
import pytest

from sensorium.config import MediaConfig
from sensorium.errors import (
    InvalidRequestError,
    MediaTooLargeError,
    MediaUndecodableError,
    OverloadedError,
    UnavailableError,
)
from sensorium.multimodal import shared_memory
from sensorium.multimodal.decode.image import ImageOptions
from sensorium.multimodal.decode.loaders import DecodeJob, InspectJob, Prepared
from sensorium.multimodal.decode.video import video_frames
from sensorium.multimodal.decode.video.loading import VideoOptions
from sensorium.multimodal.items import PageFacts
from sensorium.multimodal.shared_memory import ArraySpec, SharedArrays, SharedArraysFolder, write
from sensorium.multimodal.workers import crew, decode_worker, messages
from sensorium.multimodal.workers.pool import DecoderStats, ProcessDecoders
from sensorium.processes.fork_server import ForkServerCommand
from sensorium.processes.start import child_environment
from tests.multimodal.hostile_worker import FULL
from tests.multimodal.support import FakeProcessor, encoded, picture

DATA = encoded(picture(6, 4))
Start = Callable[..., ProcessDecoders]


@pytest.fixture
def start() -> Iterator[Start]:
    """Makes decoders, which are closed at the end; nothing of them may be left then."""
    made: list[tuple[ProcessDecoders, SharedArraysFolder]] = []

    def start(environment: Mapping[str, str] | None = None, **config: Any) -> ProcessDecoders:
        media = MediaConfig(**{"num_media_workers": 1, "media_worker_memory_gb": 1.0} | config)
        folder = SharedArraysFolder()
        command = ForkServerCommand(
            (sys.executable, "-m", "tests.multimodal.hostile_worker", str(folder.path)),
            child_environment() | (environment or {}),
            msgspec.msgpack.encode(media),
        )
        decoders = ProcessDecoders(command, media, folder)
        made.append((decoders, folder))
        return decoders

    yield start
    for decoders, folder in made:
        process_id = decoders.server.process_id
        decoders.close()
        assert not folder.path.exists()
        assert process_id is None or not psutil.pid_exists(process_id)


def job(do: object = None) -> DecodeJob:
    return DecodeJob("image", ImageOptions(), {} if do is None else {"do": do})


def process_of(prepared: Prepared) -> int:
    return int(prepared.features.meta["process"])


def path_of(prepared: Prepared) -> Path:
    assert isinstance(prepared.features.arrays, SharedArrays)
    return Path(prepared.features.arrays.path)


def files_beside(prepared: Prepared) -> list[str]:
    return os.listdir(path_of(prepared).parent)


def runs(process_id: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def until(happened: Callable[[], Any]) -> None:
    """Wait until something is the case."""
    async with asyncio.timeout(60):
        while not happened():
            await asyncio.sleep(0.002)


async def ends(process_id: int) -> None:
    async with asyncio.timeout(60):
        while runs(process_id):
            await asyncio.sleep(0.005)


async def test_features_come_back_in_a_segment(start: Start) -> None:
    decoders = start()
    prepared = await decoders.prepare(job(), DATA)
    features = prepared.features
    assert isinstance(features.arrays, SharedArrays)
    np.testing.assert_array_equal(features.arrays["pixels"], np.asarray(picture(6, 4)))
    assert features.arrays["none"].shape == (0, 3)
    assert (features.modality, features.num_embeds, features.num_bytes) == ("image", 4, 72)
    assert list(features.meta["grid"]) == [1, 2]
    assert features.meta["scale"] == 0.5
    assert prepared.decoded_bytes == 72
    assert prepared.decode_seconds > 0
    path = Path(features.arrays.path)
    assert path.exists()
    del features, prepared
    assert not path.exists(), "the last reference has gone"


async def test_one_process_works_for_many_and_is_replaced_in_time(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "JOBS_PER_PROCESS", 2)
    decoders = start()
    processes = [process_of(await decoders.prepare(job(), DATA)) for _ in range(5)]
    assert len(set(processes[:2])) == len(set(processes[2:4])) == 1
    assert len(set(processes)) == 3
    await ends(processes[0])
    assert decoders.stats().num_worker_restarts == 0, "nothing died"


@pytest.mark.parametrize(
    ("do", "error", "says"),
    [
        ("spin", MediaUndecodableError, "longer than 2 s"),
        ("sleep", MediaUndecodableError, "--media-decode-timeout"),
        ("crash", MediaUndecodableError, "ended before it was done"),
        ("exit", MediaUndecodableError, "ended before it was done"),
        ("allocate", MediaTooLargeError, "--media-worker-memory-gb"),
        ("refuse", InvalidRequestError, "no such size"),
        ("fail", MediaUndecodableError, "decoded shape"),
    ],
)
async def test_a_bad_item_costs_itself_an_error(
    start: Start, do: str, error: type[Exception], says: str
) -> None:
    decoders = start(media_decode_timeout=2.0 if do in ("spin", "sleep") else 60.0)
    await decoders.prepare(job(), DATA)
    with pytest.raises(error, match=says) as raised:
        await decoders.prepare(job(do), DATA)
    assert "0x" not in str(raised.value)
    assert getattr(raised.value, "param", None) == (
        "mm_processor_kwargs.do" if do == "refuse" else None
    )
    prepared = await decoders.prepare(job(), DATA)
    dies = do in ("spin", "sleep", "crash", "exit")
    assert decoders.stats() == DecoderStats(0, 0, int(dies))
    assert files_beside(prepared) == [path_of(prepared).name]


async def test_reading_a_document_has_the_time_of_documents(start: Start) -> None:
    decoders = start(document_timeout=0.5, media_decode_timeout=0.25)
    with pytest.raises(MediaTooLargeError, match=r"longer than 0.5 s.*--document-timeout"):
        await decoders.inspect(b"%PDF-")


async def test_the_others_go_on_while_one_hangs(start: Start) -> None:
    decoders = start(num_media_workers=2)
    hanging = asyncio.create_task(decoders.prepare(job("sleep"), DATA))
    for _ in range(5):
        await decoders.prepare(job(), DATA)
    assert decoders.stats().num_busy == 1
    hanging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hanging


async def test_a_picture_does_not_wait_for_a_video(start: Start) -> None:
    decoders = start()
    video = DecodeJob("video", VideoOptions(), {"do": "sleep"})
    hanging = asyncio.create_task(decoders.prepare(video, video_frames.pack([DATA])))
    await until(lambda: decoders.stats().num_busy)
    await decoders.prepare(job(), DATA)
    hanging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hanging


async def test_a_worker_killed_while_idle_costs_nothing(start: Start) -> None:
    decoders = start()
    process = process_of(await decoders.prepare(job(), DATA))
    os.kill(process, signal.SIGKILL)
    await ends(process)
    assert process_of(await decoders.prepare(job(), DATA)) != process


async def test_a_worker_killed_in_the_middle(start: Start) -> None:
    decoders = start()
    process = process_of(await decoders.prepare(job(), DATA))
    hanging = asyncio.create_task(decoders.prepare(job("sleep"), DATA))
    await until(lambda: decoders.stats().num_busy)
    os.kill(process, signal.SIGKILL)
    with pytest.raises(MediaUndecodableError, match="ended before"):
        await asyncio.wait_for(hanging, 60)
    assert process_of(await decoders.prepare(job(), DATA)) != process


async def test_a_caller_that_leaves_frees_the_worker(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "ABANDONED_SECONDS", 0.01)
    decoders = start()
    hanging = asyncio.create_task(decoders.prepare(job("sleep"), DATA))
    waiting = asyncio.create_task(decoders.prepare(job("sleep"), DATA))
    await until(lambda: decoders.stats().num_busy and decoders.stats().num_waiting)
    for task in (waiting, hanging):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await asyncio.wait_for(decoders.prepare(job(), DATA), 60)
    assert decoders.stats().num_worker_restarts == 1, "what only waited never began"


async def test_a_short_work_that_nobody_waits_for_is_let_finish(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "ABANDONED_SECONDS", 60)
    decoders = start()
    left = asyncio.create_task(decoders.prepare(job(), DATA))
    await until(lambda: decoders.stats().num_busy + decoders.stats().num_waiting)
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    kept = await decoders.prepare(job(), DATA)
    assert decoders.stats().num_worker_restarts == 0
    assert files_beside(kept) == [path_of(kept).name]


async def test_the_fork_server_may_die_too(start: Start) -> None:
    decoders = start()
    kept = await decoders.prepare(job(), DATA)
    hanging = asyncio.create_task(decoders.prepare(job("sleep"), DATA))
    while not decoders.stats().num_busy:
        await asyncio.sleep(0)
    process_id = decoders.server.process_id
    assert process_id is not None
    os.kill(process_id, signal.SIGKILL)
    with pytest.raises(UnavailableError, match="try again"):  # it was not the file
        await asyncio.wait_for(hanging, 60)
    assert process_of(await decoders.prepare(job(), DATA)) != process_of(kept)
    np.testing.assert_array_equal(kept.features.arrays["pixels"], np.asarray(picture(6, 4)))


async def test_no_further_process_is_no_damaged_file(start: Start) -> None:
    decoders = start({FULL: "1"})
    process_ids = set()
    for _ in range(2):
        with pytest.raises(UnavailableError, match="try again"):
            await decoders.prepare(job(), DATA)
        process_ids.add(decoders.server.process_id)
    assert len(process_ids) == 1, "the fork server can go on"


def done(spec: ArraySpec, num_embeds: int = 4) -> bytes:
    return messages.encode(messages.Done({"pixels": spec}, num_embeds, {}, False, 0.1, 3, 0.1))


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\xc1",
        b"garbage",
        done(ArraySpec("|u1", (1 << 40,), 0)),
        done(ArraySpec("garbage", (1,), 0)),
        done(ArraySpec("|u1", (1,), 0), num_embeds=-1),
        done(ArraySpec("|u1", (1,), 0), num_embeds=10**12),
    ],
)
def test_answers_that_cannot_be_are_not_believed(answer: bytes, tmp_path: Path) -> None:
    path = str(tmp_path / "features")
    write(path, {"pixels": np.zeros(30, np.uint8)})
    with pytest.raises((ValueError, TypeError)):
        messages.decode_reply(answer, path, job())
    right = messages.decode_reply(done(ArraySpec("|u1", (30,), 0)), path, job())
    assert isinstance(right, messages.Done)
    with pytest.raises(TypeError):  # an answer to another job
        messages.decode_reply(done(ArraySpec("|u1", (30,), 0)), path, InspectJob())
    for page in (PageFacts(3, 0), PageFacts(3, 3, "x" * (messages.MOST_PAGE_CHARS + 1))):
        pages = messages.encode(messages.Inspected([page]))
        with pytest.raises(ValueError, match="pages"):
            messages.decode_reply(pages, path, InspectJob())


def test_a_worker_can_raise_errors_of_items_only() -> None:
    error = messages.Failed("x" * 5000, "engine_unavailable").error()
    assert type(error) is MediaUndecodableError
    assert len(error.message) <= messages.MOST_MESSAGE_CHARS
    assert type(messages.Failed("no", "overloaded").error()) is OverloadedError
    assert type(messages.Failed("no", "media_too_large").error()) is MediaTooLargeError


async def test_an_answer_that_nobody_asked_for_goes_to_nobody(start: Start, tmp_path: Path) -> None:
    worker = crew.Worker(start().server, MediaConfig())
    first = await asyncio.to_thread(worker.start)
    first.connection.close()
    first.connection, theirs = socket.socketpair()
    theirs.sendall(b"unasked")
    task = crew.DecodeTask(job(), DATA, str(tmp_path / "features"))
    done = await asyncio.to_thread(worker.run, task)
    assert done.meta["process"] != first.process_id
    theirs.close()
    worker.discard()


@pytest.mark.parametrize("value", [1 << 70, "\ud800", object()])
async def test_options_that_cannot_be_passed_on(start: Start, value: object) -> None:
    decoders = start()
    with pytest.raises(InvalidRequestError) as raised:
        await decoders.prepare(job(value), DATA)
    assert raised.value.param == "mm_processor_kwargs"
    await decoders.prepare(job(), DATA)


async def test_what_waits_lets_go_of_its_file_when_its_caller_leaves(start: Start) -> None:
    decoders = start()
    hanging = asyncio.create_task(decoders.prepare(job("sleep"), DATA))
    while not decoders.stats().num_busy:
        await asyncio.sleep(0)
    waiting = asyncio.create_task(decoders.prepare(job("wait"), DATA))
    await asyncio.sleep(0)
    # type(), as isinstance() asks proxies of others' objects, which may be gone, for their class
    tasks = [found for found in gc.get_objects() if type(found) is crew.DecodeTask]
    [waited] = [task for task in tasks if task.job.options == {"do": "wait"}]
    assert waited.source == DATA
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert waited.source == b""
    hanging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hanging


async def test_workers_that_cannot_be_started_are_an_error_and_no_hang() -> None:
    folder = SharedArraysFolder()
    command = ForkServerCommand(("/bin/false",), {}, b"")
    decoders = ProcessDecoders(command, MediaConfig(num_media_workers=1), folder)
    with pytest.raises(UnavailableError, match="try again"):
        await asyncio.wait_for(decoders.prepare(job(), DATA), 60)
    decoders.close()


def test_no_room_for_the_features_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shared_memory, "open", lambda *_: FileIO("/dev/full", "w"), raising=False)
    request = messages.DecodeRequest(job(), str(tmp_path / "1"), len(DATA))
    answer = decode_worker.answer(request, DATA, FakeProcessor(), MediaConfig())
    reply = messages.decode_reply(messages.encode(answer), request.path, job())
    assert isinstance(reply, messages.NoRoom)
    error = reply.error()
    assert error.num_bytes >= 6 * 4 * 3
    assert error.total_bytes == shutil.disk_usage(tmp_path).total
    with pytest.raises(TypeError):
        messages.decode_reply(messages.encode(answer), request.path, InspectJob())


def test_a_folder_that_is_gone_is_an_overload(tmp_path: Path) -> None:
    request = messages.DecodeRequest(job(), str(tmp_path / "gone" / "1"), len(DATA))
    answer = decode_worker.answer(request, DATA, FakeProcessor(), MediaConfig())
    assert isinstance(answer, messages.Failed)
    assert answer.code == OverloadedError.code
    assert "try again" in answer.message


async def test_libraries_do_not_write_into_the_log(
    start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    await start().prepare(job("shout"), DATA)
    assert "library noise" not in capfd.readouterr().err


async def test_when_the_owner_goes_all_go(start: Start) -> None:
    decoders = start(num_media_workers=2)
    prepared = await decoders.prepare(job(), DATA)
    await asyncio.to_thread(decoders.server.close)
    await ends(process_of(prepared))
    assert not path_of(prepared).parent.exists()


async def test_workers_give_way_to_the_process_that_serves(start: Start) -> None:
    decoders = start()
    worker = process_of(await decoders.prepare(job(), DATA))
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, worker) == min(19, own + decode_worker.NICENESS)
