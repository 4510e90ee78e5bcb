"""Machines with many cores: media take no more threads and memory than on those with few."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
from PIL import Image

from sensorium.config import MediaConfig
from sensorium.errors import MediaTooLargeError, MediaUndecodableError, OverloadedError
from sensorium.multimodal.decode import heif
from sensorium.multimodal.decode.audio import AudioOptions
from sensorium.multimodal.decode.image import ImageOptions
from sensorium.multimodal.decode.loaders import DecodeJob, Prepared
from sensorium.multimodal.decode.video.loading import VideoOptions
from sensorium.multimodal.shared_memory import SharedArraysFolder
from sensorium.multimodal.workers.pool import ProcessDecoders
from sensorium.processes.fork_server import ForkServerCommand
from sensorium.processes.start import child_environment
from tests.cores import environment
from tests.multimodal.clips import make_clip, number_of
from tests.multimodal.decode.test_audio import encoded as sound_file
from tests.multimodal.decode.test_audio import muxed, tone
from tests.multimodal.support import encoded, picture
from tests.reliability import many_cores

CORES = (2, 16, 64, 128)
ROOM_GB = 0.25
"""Far less than the stacks of a thread per core and frame would take."""


@contextmanager
def workers(num_cores: int, memory_gb: float, **how: bool) -> Iterator[ProcessDecoders]:
    """One worker process for each modality on a machine with so many cores."""
    media = MediaConfig(num_media_workers=1, media_worker_memory_gb=memory_gb)
    folder = SharedArraysFolder()
    command = ForkServerCommand(
        (sys.executable, "-m", "tests.multimodal.every_media_worker", str(folder.path)),
        child_environment(one_thread=True) | environment(num_cores, **how),
        msgspec.msgpack.encode(media),
    )
    with contextlib.closing(ProcessDecoders(command, media, folder)) as made:
        yield made


@pytest.fixture(params=CORES, scope="module")
def decoders(request: pytest.FixtureRequest) -> Iterator[ProcessDecoders]:
    with workers(request.param, ROOM_GB) as made:
        yield made


@pytest.fixture
def crowded() -> Iterator[ProcessDecoders]:
    """Workers with little memory, on a machine of 16 cores."""
    with workers(16, 0.0625) as made:
        yield made


@pytest.fixture(scope="module")
def threadless() -> Iterator[ProcessDecoders]:
    """Workers that can start no thread, on a machine of 128 cores."""
    with workers(128, ROOM_GB, threads=False) as made:
        yield made


def process_of(prepared: Prepared) -> psutil.Process:
    return psutil.Process(prepared.features.meta["process"])


async def test_videos_of_any_length_are_decoded_and_leave_no_thread(
    decoders: ProcessDecoders,
) -> None:
    clip = make_clip("mp4", 64)
    started: tuple[int, int] | None = None
    for num_frames in (8, 32, 64, 64):
        job = DecodeJob("video", VideoOptions(num_frames=num_frames), {})
        prepared = await decoders.prepare(job, clip)
        frames = prepared.features.arrays["decoded"]
        assert [number_of(frame) for frame in frames] == [
            i * 64 // num_frames for i in range(num_frames)
        ]
        process = process_of(prepared)
        assert process.num_threads() == 1
        started = started or (process.pid, process.num_fds())
        assert (process.pid, process.num_fds()) == started


@pytest.mark.parametrize("form", ["webm", "av1", "mjpeg", "gif", "hevc"])
async def test_every_codec_is_decoded(decoders: ProcessDecoders, form: str) -> None:
    prepared = await decoders.prepare(
        DecodeJob("video", VideoOptions(num_frames=32), {}), make_clip(form, 32)
    )
    assert prepared.features.arrays["decoded"].shape[0] == 32
    assert process_of(prepared).num_threads() == 1


SOUNDS: dict[str, Callable[[], bytes]] = {
    "wav": lambda: sound_file(tone(), 16000, "WAV"),
    "mp3": lambda: sound_file(tone(), 16000, "MP3"),
    "m4a": lambda: muxed(tone(), 16000, "mp4", "aac"),
    "webm": lambda: muxed(tone(rate=48000), 48000, "webm", "libopus"),
}


@pytest.mark.parametrize("form", SOUNDS)
async def test_audio_is_decoded_and_leaves_no_thread(decoders: ProcessDecoders, form: str) -> None:
    prepared = await decoders.prepare(DecodeJob("audio", AudioOptions(), {}), SOUNDS[form]())
    assert abs(len(prepared.features.arrays["decoded"]) - 8000) < 2500
    assert process_of(prepared).num_threads() == 1


PICTURES = ("PNG", "JPEG", "WEBP", "AVIF", "TIFF", "GIF", "HEIF")


def picture_file(width: int, height: int, form: str) -> bytes:
    """An encoded picture of noise."""
    assert form != "HEIF" or heif.register()
    return encoded(picture(width, height), form)


async def test_images_are_decoded_and_leave_no_thread(decoders: ProcessDecoders) -> None:
    for form in PICTURES:
        data = picture_file(64, 48, form)
        prepared = await decoders.prepare(DecodeJob("image", ImageOptions(), {}), data)
        assert prepared.features.arrays["decoded"].shape == (48, 64, 3)
        assert np.ptp(prepared.features.arrays["decoded"]) > 50
        assert process_of(prepared).num_threads() == 1


# --- what is said when there is no room -----------------------------------------------------------


@pytest.mark.parametrize("form", ["mp4", "webm", "av1"])
async def test_a_video_without_room_for_its_frames_is_too_large_and_not_damaged(
    crowded: ProcessDecoders, form: str
) -> None:
    clip = make_clip(form, 1, size=(2304, 4096))
    with pytest.raises(MediaTooLargeError, match="--media-worker-memory-gb"):
        await crowded.prepare(DecodeJob("video", VideoOptions(num_frames=1), {}), clip)
    small = await crowded.prepare(DecodeJob("video", VideoOptions(), {}), make_clip(form, 6))
    assert len(small.features.arrays["decoded"]) == 6


async def test_an_image_without_room_is_too_large_and_not_damaged(
    crowded: ProcessDecoders,
) -> None:
    image = Image.new("RGB", (5120, 5120))
    for form in ("JPEG", "PNG", "WEBP", "AVIF"):
        data = encoded(image, form)
        with pytest.raises(MediaTooLargeError, match="--media-worker-memory-gb"):
            await crowded.prepare(DecodeJob("image", ImageOptions(), {}), data)


@pytest.mark.parametrize("form", ["mp4", "webm", "av1"])
async def test_a_machine_without_threads_is_not_a_damaged_video(
    threadless: ProcessDecoders, form: str
) -> None:
    with pytest.raises(OverloadedError, match="no threads"):
        await threadless.prepare(DecodeJob("video", VideoOptions(), {}), make_clip(form, 6))


async def test_a_damaged_clip_is_damaged_on_any_machine(decoders: ProcessDecoders) -> None:
    clip = make_clip("mp4", 32)
    with pytest.raises(MediaUndecodableError, match="damaged or truncated"):
        await decoders.prepare(
            DecodeJob("video", VideoOptions(), {}), clip[:40] + bytes(len(clip) - 40)
        )


async def test_a_machine_without_threads_is_not_a_damaged_photo(
    threadless: ProcessDecoders,
) -> None:
    """The decoder of HEIC photos starts a thread however many it may have."""
    photo = picture_file(64, 48, "HEIF")
    with pytest.raises(OverloadedError, match="no threads"):
        await threadless.prepare(DecodeJob("image", ImageOptions(), {}), photo)


@pytest.mark.parametrize("form", sorted({*PICTURES} - {"HEIF"}))
async def test_pictures_need_no_threads(threadless: ProcessDecoders, form: str) -> None:
    data = picture_file(640, 480, form)
    prepared = await threadless.prepare(DecodeJob("image", ImageOptions(), {}), data)
    assert prepared.features.arrays["decoded"].shape == (480, 640, 3)


@pytest.mark.parametrize("form", SOUNDS)
async def test_sounds_need_no_threads(threadless: ProcessDecoders, form: str) -> None:
    prepared = await threadless.prepare(DecodeJob("audio", AudioOptions(), {}), SOUNDS[form]())
    assert len(prepared.features.arrays["decoded"]) > 5000


# --- whole models ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "num_cores", "how"),
    [("demo", 128, "served"), ("demo-audio", 64, "offline")],
)
def test_models_answer_and_leave_nothing_behind(
    model: str, num_cores: int, how: str, tmp_path: Path
) -> None:
    """Threads and descriptors of all processes are the same after each item.

    ``many_cores`` has every family.
    """
    modalities = many_cores.SHIPPED[model]
    if how == "offline":
        done = many_cores.in_child(model, modalities, num_cores)
    else:
        done = many_cores.served(model, modalities, num_cores, tmp_path / "log")
    expected = {"demo": "64 frames of mp4", "demo-audio": "M4A"}
    assert expected[model] in done
