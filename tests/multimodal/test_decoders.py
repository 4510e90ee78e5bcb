"""Worker processes: what a file does to a decoder costs that file's request an error, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
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
from sensorium.multimodal import decoder_process, frames
from sensorium.multimodal import decoders as module
from sensorium.multimodal.decoders import ForkServerCommand, ProcessDecoders
from sensorium.multimodal.image import ImageOptions
from sensorium.multimodal.loaders import Prepared, Work
from sensorium.multimodal.segments import Segment, SegmentFolder
from sensorium.multimodal.video import VideoOptions
from tests.multimodal.support import FakeProcessor, encoded, picture

DATA = encoded(picture(6, 4))
Start = Callable[..., ProcessDecoders]


@pytest.fixture
def start() -> Iterator[Start]:
    """Makes decoders, which are closed at the end; nothing of them may be left then."""
    made: list[tuple[ProcessDecoders, SegmentFolder]] = []

    def start(**config: Any) -> ProcessDecoders:
        media = MediaConfig(**{"num_media_workers": 1, "media_worker_memory_gb": 1.0} | config)
        folder = SegmentFolder()
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


async def ends(process_id: int) -> None:
    while runs(process_id):
        await asyncio.sleep(0.005)


async def test_features_come_back_in_a_segment(start: Start) -> None:
    decoders = start()
    prepared = await decoders.prepare(work())
    features = prepared.features
    assert isinstance(features.arrays, Segment)
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
    await asyncio.wait_for(ends(processes[0]), 10)
    assert decoders.stats().num_worker_restarts == 0, "nothing died"


@pytest.mark.parametrize(
    ("do", "error", "says"),
    [
        ("spin", MediaUndecodableError, "longer than 0.5 s"),
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
    decoders = start(media_decode_timeout=0.5 if do in ("spin", "sleep") else 60.0)
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
    video = Work("video", frames.pack([DATA]), VideoOptions(), {"do": "sleep"}, 1)
    hanging = asyncio.create_task(decoders.prepare(video))
    while not decoders.stats().num_busy:
        await asyncio.sleep(0)
    await decoders.prepare(work())
    hanging.cancel()
    with pytest.raises(asyncio.CancelledError):
        await hanging


async def test_a_worker_killed_while_idle_costs_nothing(start: Start) -> None:
    decoders = start()
    process = process_of(await decoders.prepare(work()))
    os.kill(process, signal.SIGKILL)
    await asyncio.wait_for(ends(process), 10)
    assert process_of(await decoders.prepare(work())) != process


async def test_a_worker_killed_in_the_middle(start: Start) -> None:
    decoders = start()
    process = process_of(await decoders.prepare(work()))
    hanging = asyncio.create_task(decoders.prepare(work("sleep")))
    while not decoders.stats().num_busy:
        await asyncio.sleep(0)
    os.kill(process, signal.SIGKILL)
    with pytest.raises(MediaUndecodableError, match="ended before"):
        await asyncio.wait_for(hanging, 10)
    assert process_of(await decoders.prepare(work())) != process


async def test_a_caller_that_leaves_frees_the_worker(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ABANDONED_SECONDS", 0.01)
    decoders = start()
    hanging = asyncio.create_task(decoders.prepare(work("sleep")))
    waiting = asyncio.create_task(decoders.prepare(work("sleep")))
    while not decoders.stats().num_busy or not decoders.stats().num_waiting:
        await asyncio.sleep(0)
    for task in (waiting, hanging):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await asyncio.wait_for(decoders.prepare(work()), 10)
    assert decoders.stats().num_worker_restarts == 1, "what only waited never began"


async def test_a_short_work_that_nobody_waits_for_is_let_finish(start: Start) -> None:
    decoders = start()
    left = asyncio.create_task(decoders.prepare(work()))
    while not decoders._futures:
        await asyncio.sleep(0)
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    kept = await decoders.prepare(work())
    assert decoders.stats().num_worker_restarts == 0
    assert os.listdir(decoders._folder.path) == [Path(kept.features.arrays.path).name]  # type: ignore[attr-defined]


async def test_the_fork_server_may_die_too(start: Start) -> None:
    decoders = start()
    worker = process_of(await decoders.prepare(work()))
    process = decoders._server._process
    assert process is not None
    process.kill()
    await asyncio.wait_for(ends(worker), 10)
    with contextlib.suppress(MediaUndecodableError):  # the one that was with the worker
        await decoders.prepare(work())
    assert process_of(await decoders.prepare(work())) != worker


async def test_workers_that_cannot_be_started_are_an_error_and_no_hang() -> None:
    folder = SegmentFolder()
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

    monkeypatch.setattr(decoder_process, "write", full)
    job = decoder_process.Job("image", {}, {}, 1, "unused", len(DATA))
    answer = decoder_process._answer(job, DATA, FakeProcessor(), MediaConfig())
    assert isinstance(answer, decoder_process.Failed)
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
    await asyncio.to_thread(server.wait, 10)
    await asyncio.wait_for(ends(worker), 10)
    assert not decoders._folder.path.exists()


async def test_workers_give_way_to_the_process_that_serves(start: Start) -> None:
    decoders = start()
    worker = process_of(await decoders.prepare(work()))
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert os.getpriority(os.PRIO_PROCESS, worker) == min(19, own + decoder_process._NICENESS)
