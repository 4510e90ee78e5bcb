"""The worker processes that decode, forked from a fork server.

The fork server has imported what they need and holds the processor.

A worker decodes and preprocesses one item after the other, within limits of memory and processor
time: whatever a file does to a decoder, it does it there. ``multimodal.workers.pool`` is the other
side.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib
import logging
import math
import os
import resource
import shutil
import socket

import msgspec
from PIL import AvifImagePlugin, Image

from sensorium.config import GIB, MediaConfig
from sensorium.errors import (
    MediaTooLargeError,
    MediaUndecodableError,
    OverloadedError,
    SensoriumError,
)
from sensorium.multimodal.decode import document, heif
from sensorium.multimodal.decode.loaders import LOADERS, DecodeJob, InspectJob, prepare
from sensorium.multimodal.decode.shortage import check_shortage
from sensorium.multimodal.items import Modality
from sensorium.multimodal.processor import Processor
from sensorium.multimodal.shared_memory import NoRoomError, write
from sensorium.multimodal.workers.messages import (
    DecodeRequest,
    Done,
    Failed,
    Inspected,
    NoRoom,
    Reply,
    decode_request,
    encode,
)
from sensorium.processes import cores, fork_server
from sensorium.processes.framing import receive_bytes, receive_frame, send_frame
from sensorium.processes.limits import limit_memory, lower
from sensorium.processes.start import silence_libraries

NO_ROOM = "There is no room for the media of this request now; try again later."

_LIBRARIES: dict[Modality, tuple[str, ...]] = {
    "image": (),
    "video": ("av",),
    "audio": ("av", "soundfile", "soxr"),
}
_MAX_FILES = 256
NICENESS = 5
"""Workers give way to the server's event loop, which needs little time but needs it at once."""
_FIRST_TO_GO = "500"

logger = logging.getLogger(__name__)


def serve(control: socket.socket, processor: Processor, config: MediaConfig, folder: str) -> None:
    """Fork workers until the parent hangs up, then remove ``folder``.

    Call this in a process with one thread.
    """
    for modality in processor.modalities:
        for library in _LIBRARIES[modality]:
            importlib.import_module(library)
    # The configured limit holds, which is checked before anything is decoded.
    Image.MAX_IMAGE_PIXELS = None
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # else one per core
    heif.register()
    if fork_server.serve(control, functools.partial(_work, processor=processor, config=config)):
        shutil.rmtree(folder, ignore_errors=True)


def _work(requests: socket.socket, *, processor: Processor, config: MediaConfig) -> int:
    """Answer requests in a forked process until the other side closes."""
    _silence()
    _limit(config)
    while (frame := receive_frame(requests)) is not None:
        request = decode_request(frame)
        data = receive_bytes(requests, request.num_bytes)
        if data is None:
            break
        _limit_seconds(request.job.most_seconds(config))
        send_frame(requests, encode(answer(request, data, processor, config)))
    return 0


def answer(request: DecodeRequest, data: bytes, processor: Processor, config: MediaConfig) -> Reply:
    """Decode and preprocess an encoded file, and write its features into the request's file.

    Of a PDF to be inspected, the reply has the facts of its pages.
    """
    job = request.job
    try:
        if isinstance(job, InspectJob):
            return Inspected(document.inspect_pages(data, config))
        return _decoded(job, request.path, data, processor, config)
    except SensoriumError as error:
        return Failed(error.message, error.code, error.param)
    except NoRoomError as error:
        return NoRoom(error.num_bytes, error.total_bytes)
    except Exception as error:
        return _failed(error, job.noun, config)


def _decoded(
    job: DecodeJob, path: str, data: bytes, processor: Processor, config: MediaConfig
) -> Done:
    loading = msgspec.convert(job.loading, LOADERS[job.modality].options)
    prepared = prepare(msgspec.structs.replace(job, loading=loading), data, config, processor)
    features = prepared.features
    return Done(
        write(path, features.arrays),
        features.num_embeds,
        dict(features.meta),
        features.precomputed,
        prepared.decode_seconds,
        prepared.decoded_bytes,
        prepared.preprocess_seconds,
    )


def _failed(error: Exception, noun: str, config: MediaConfig) -> Failed:
    """Return what the caller gets to know of an error that no decoder foresaw."""
    if isinstance(error, OSError) and error.errno == errno.ENOENT:
        return Failed(NO_ROOM, OverloadedError.code)  # the folder was removed
    try:
        check_shortage(error)
    except MemoryError:
        return _too_large(noun, config)
    except OverloadedError as short:
        return Failed(short.message, short.code)
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return _too_large(noun, config)
    logger.exception("an item (%s) could not be decoded", noun)
    return Failed(f"The {noun} cannot be decoded.", MediaUndecodableError.code)


def _too_large(noun: str, config: MediaConfig) -> Failed:
    return Failed(
        f"The {noun} takes more than {config.media_worker_memory_gb:g} GiB of memory to decode "
        "and preprocess, the limit (--media-worker-memory-gb); send a smaller one.",
        MediaTooLargeError.code,
    )


def _silence() -> None:
    """Discard what libraries write to standard error."""
    log = silence_libraries()
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(log)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)


def _limit(config: MediaConfig) -> None:
    """Memory beyond what the fork server's libraries take, the size of a segment, open files.

    Addresses are not limited: threads reserve many that they never use. Where the system's memory
    ends before these limits, it is this process that goes, and not the engine.
    """
    memory = int(config.media_worker_memory_gb * GIB)
    limit_memory(memory)
    lower(resource.RLIMIT_FSIZE, memory)
    lower(resource.RLIMIT_NOFILE, _MAX_FILES)
    os.nice(NICENESS)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(_FIRST_TO_GO)


def _limit_seconds(seconds: float) -> None:
    """Processor time until the kernel ends this process.

    What a job may take on all cores, should nobody be there any more to look at the clock.
    """
    usage = resource.getrusage(resource.RUSAGE_SELF)
    num_cpus = len(cores.find().allowed)
    most = math.ceil(usage.ru_utime + usage.ru_stime + seconds * num_cpus) + 1
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard == resource.RLIM_INFINITY or most < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (most, hard))
