"""Worker processes: what a file does to a decoder costs that file's request an error, and nothing else."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import gc
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import numpy as np
import pytest

from sensorium.config import MediaConfig
from sensorium.errors import (
    InvalidRequestError,
    MediaTooLargeError,
    MediaUndecodableError,
    OverloadedError,
    UnavailableError,
)
from sensorium.multimodal.decode.image import ImageOptions
from sensorium.multimodal.decode.loaders import Prepared, Work
from sensorium.multimodal.decode.video import video_frames
from sensorium.multimodal.decode.video.loading import VideoOptions
from sensorium.multimodal.shared_memory import ArraySpec, SharedArrays, SharedArraysFolder, write
from sensorium.multimodal.workers import decode_worker as child_process
from sensorium.multimodal.workers import pool as module
from sensorium.multimodal.workers.pool import ForkServerCommand, ProcessDecoders
from tests.multimodal.support import FakeProcessor, encoded, picture

DATA = encoded(picture(6, 4))
Start = Callable[..., ProcessDecoders]


@pytest.fixture
def start() -> Iterator[Start]:
    """Makes decoders, which are closed at the end; nothing of them may be left then."""
    made: list[tuple[ProcessDecoders, SharedArraysFolder]] = []

    def start(**config: Any) -> ProcessDecoders:
        media = MediaConfig(**{"num_media_workers": 1, "media_worker_memory_gb": 1.0} | config)
        folder = SharedArraysFolder()
        command = ForkServerCommand(
            (sys.executable, "-m", "tests.multimodal.hostile_worker", str(folder.path)),
            os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            msgspec.msgpack.encode(media),
        )
        decoders = ProcessDecoders(command, media, folder)
        made.append((decoders, folder))
        return decoders

    yield start
    for decoders, folder in made:
        process = decoders._server._process
        decoders.close()
        assert not folder.path.exists()
        assert process is None or process.returncode is not None


def work(do: str | None = None, data: bytes = DATA) -> Work:
    return Work("image", data, ImageOptions(), {} if do is None else {"do": do}, 1)


def process_of(prepared: Prepared) -> int:
    return int(prepared.features.meta["process"])


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
            await asyncio.sleep(0)


async def ends(process_id: int) -> None:
    async with asyncio.timeout(60):
        while runs(process_id):
            await asyncio.sleep(0.005)


async def test_features_come_back_in_a_segment(start: Start) -> None:
    decoders = start()
    prepared = await decoders.prepare(work())
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
    monkeypatch.setattr(module, "JOBS_PER_PROCESS", 2)
    decoders = start()
    processes = [process_of(await decoders.prepare(work())) for _ in range(5)]
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
    await decoders.prepare(work())
    with pytest.raises(error, match=says) as raised:
        await decoders.prepare(work(do))
    assert "0x" not in str(raised.value)
    assert getattr(raised.value, "param", None) == (
        "mm_processor_kwargs.do" if do == "refuse" else None
    )
    prepared = await decoders.prepare(work())
    dies = do in ("spin", "sleep", "crash", "exit")
    assert decoders.stats() == module.DecoderStats(0, 0, int(dies))
    assert os.listdir(decoders._folder.path) == [Path(prepared.features.arrays.path).name]  # type: ignore[attr-defined]


async def test_the_others_go_on_while_one_hangs(start: Start) -> None:
    decoders = start(num_media_workers=2)
    hanging = asyncio.create_task(decoders.prepare(work("sleep")))
    for _ in range(5):
        await decoders.prepare(work())
    assert decoders.stats().num_busy == 1
    hanging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hanging


async def test_a_picture_does_not_wait_for_a_video(start: Start) -> None:
    decoders = start()
    video = Work("video", video_frames.pack([DATA]), VideoOptions(), {"do": "sleep"}, 1)
    hanging = asyncio.create_task(decoders.prepare(video))
    await until(lambda: decoders.stats().num_busy)
    await decoders.prepare(work())
    hanging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hanging


async def test_a_worker_killed_while_idle_costs_nothing(start: Start) -> None:
    decoders = start()
    process = process_of(await decoders.prepare(work()))
    os.kill(process, signal.SIGKILL)
    await ends(process)
    assert process_of(await decoders.prepare(work())) != process


async def test_a_worker_killed_in_the_middle(start: Start) -> None:
    decoders = start()
    process = process_of(await decoders.prepare(work()))
    hanging = asyncio.create_task(decoders.prepare(work("sleep")))
    await until(lambda: decoders.stats().num_busy)
    os.kill(process, signal.SIGKILL)
    with pytest.raises(MediaUndecodableError, match="ended before"):
        await asyncio.wait_for(hanging, 60)
    assert process_of(await decoders.prepare(work())) != process


async def test_a_caller_that_leaves_frees_the_worker(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ABANDONED_SECONDS", 0.01)
    decoders = start()
    hanging = asyncio.create_task(decoders.prepare(work("sleep")))
    waiting = asyncio.create_task(decoders.prepare(work("sleep")))
    await until(lambda: decoders.stats().num_busy and decoders.stats().num_waiting)
    for task in (waiting, hanging):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await asyncio.wait_for(decoders.prepare(work()), 60)
    assert decoders.stats().num_worker_restarts == 1, "what only waited never began"


async def test_a_short_work_that_nobody_waits_for_is_let_finish(start: Start) -> None:
    decoders = start()
    left = asyncio.create_task(decoders.prepare(work()))
    await until(lambda: decoders._futures)
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    kept = await decoders.prepare(work())
    assert decoders.stats().num_worker_restarts == 0
    assert os.listdir(decoders._folder.path) == [Path(kept.features.arrays.path).name]  # type: ignore[attr-defined]


async def test_the_fork_server_may_die_too(start: Start) -> None:
    decoders = start()
    kept = await decoders.prepare(work())
    hanging = asyncio.create_task(decoders.prepare(work("sleep")))
    while not decoders.stats().num_busy:
        await asyncio.sleep(0)
    process = decoders._server._process
    assert process is not None
    process.kill()
    with pytest.raises(UnavailableError, match="try again"):  # it was not the file
        await asyncio.wait_for(hanging, 10)
    assert process_of(await decoders.prepare(work())) != process_of(kept)
    np.testing.assert_array_equal(kept.features.arrays["pixels"], np.asarray(picture(6, 4)))


async def test_no_further_process_is_no_damaged_file(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoders = start()
    await decoders.prepare(work())

    def none_left(*_: object) -> bytes:
        return child_process.NO_WORKER.to_bytes(child_process.ID_BYTES, "little")

    decoders._crews["image"].workers[0].discard()
    with monkeypatch.context() as patched:
        patched.setattr(module, "receive_bytes", none_left)
        with pytest.raises(UnavailableError, match="try again"):
            await decoders.prepare(work())
    process = decoders._server._process
    assert process is not None
    assert process.poll() is None


def job() -> module._Job:
    folder = SharedArraysFolder()
    made = module._Job(work(), folder.new_path())
    write(made.path, {"pixels": np.zeros(30, np.uint8)})
    made.folder = folder  # type: ignore[attr-defined]
    return made


def done(spec: ArraySpec, num_embeds: int = 4) -> bytes:
    return child_process.encode(
        child_process.Done({"pixels": spec}, num_embeds, {}, False, 0.1, 3, 0.1)
    )


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
def test_answers_that_cannot_be_are_not_believed(answer: bytes) -> None:
    with pytest.raises((ValueError, TypeError)):
        module._reply(answer, job())
    right = module._reply(done(ArraySpec("|u1", (30,), 0)), job())
    assert isinstance(right, child_process.Done)


def test_a_worker_can_raise_errors_of_items_only() -> None:
    failed = child_process.Failed("x" * 5000, "engine_unavailable")
    error = module._error(failed)
    assert type(error) is MediaUndecodableError
    assert len(error.message) <= module.MOST_MESSAGE_CHARS
    assert type(module._error(child_process.Failed("no", "overloaded"))) is OverloadedError
    assert type(module._error(child_process.Failed("no", "media_too_large"))) is MediaTooLargeError


async def test_an_answer_that_nobody_asked_for_goes_to_nobody(start: Start) -> None:
    decoders = start()
    first = process_of(await decoders.prepare(work()))
    ours, theirs = socket.socketpair()
    worker = decoders._crews["image"].workers[0]
    assert worker._forked is not None
    worker._forked = dataclasses.replace(worker._forked, connection=ours)
    theirs.sendall(b"unasked")
    assert process_of(await decoders.prepare(work())) != first
    theirs.close()


@pytest.mark.parametrize("value", [1 << 70, "\ud800", object()])
async def test_options_that_cannot_be_passed_on(start: Start, value: object) -> None:
    decoders = start()
    with pytest.raises(InvalidRequestError) as raised:
        await decoders.prepare(Work("image", DATA, ImageOptions(), {"do": value}, 1))
    assert raised.value.param == "mm_processor_kwargs"
    await decoders.prepare(work())


async def test_what_waits_lets_go_of_its_file_when_its_caller_leaves(start: Start) -> None:
    decoders = start()
    hanging = asyncio.create_task(decoders.prepare(work("sleep")))
    while not decoders.stats().num_busy:
        await asyncio.sleep(0)
    waiting = asyncio.create_task(decoders.prepare(work("wait")))
    await asyncio.sleep(0)
    jobs = [found for found in gc.get_objects() if isinstance(found, module._Job)]
    [waited] = [found for found in jobs if found.work.options == {"do": "wait"}]
    assert waited.work.source == DATA
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert waited.work.source == b""
    hanging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hanging


async def test_workers_that_cannot_be_started_are_an_error_and_no_hang() -> None:
    folder = SharedArraysFolder()
    command = ForkServerCommand(("/bin/false",), {}, b"")
    decoders = ProcessDecoders(command, MediaConfig(num_media_workers=1), folder)
    with pytest.raises(UnavailableError, match="try again"):
        await asyncio.wait_for(decoders.prepare(work()), 30)
    decoders.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_for_the_features_is_an_overload(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(path: str, arrays: object) -> NoReturn:
        raise OSError(number, "no room")

    monkeypatch.setattr(child_process, "write", full)
    job = child_process.Job("image", {}, {}, 1, "unused", len(DATA))
    answer = child_process._answer(job, DATA, FakeProcessor(), MediaConfig())
    assert isinstance(answer, child_process.Failed)
    assert answer.code == OverloadedError.code
    assert "try again" in answer.message


async def test_libraries_do_not_write_into_the_log(
    start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    await start().prepare(work("shout"))
    assert "library noise" not in capfd.readouterr().err


async def test_when_the_owner_goes_all_go(start: Start) -> None:
    decoders = start(num_media_workers=2)
    worker = process_of(await decoders.prepare(work()))
    server = decoders._server._process
    assert server is not None
    decoders._server._control.close()  # type: ignore[union-attr]
    await asyncio.to_thread(server.wait, 60)
    await ends(worker)
    assert not decoders._folder.path.exists()


async def test_workers_give_way_to_the_process_that_serves(start: Start) -> None:
    decoders = start()
    worker = process_of(await decoders.prepare(work()))
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, worker) == min(19, own + child_process._NICENESS)
