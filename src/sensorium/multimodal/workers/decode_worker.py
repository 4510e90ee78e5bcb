"""The processes that decode: a fork server, which has imported everything, and the workers that it forks.

The fork server holds the processor and does nothing but fork and kill; a worker decodes and preprocesses one item after
the other, within limits of memory and processor time. Whatever a file does to a decoder, it does it there. Features go
into a segment; only shapes and small values go back through the socket. ``multimodal.workers.pool`` is the other side.

Control protocol, on a stream socket: ``SPAWN`` with the descriptor of the new worker's own socket, answered with its
process id (4 bytes, little-endian); ``KILL`` with a process id. When the other side closes, all ends; after ``RETIRE``
the folder of segments stays, for another fork server takes over.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import logging
import math
import os
import resource
import shutil
import signal
import socket
from typing import Any

import msgspec
from PIL import AvifImagePlugin, Image

from sensorium.config import GIB, MediaConfig
from sensorium.errors import (
    MediaTooLargeError,
    MediaUndecodableError,
    OverloadedError,
    SensoriumError,
)
from sensorium.multimodal.decode import heif
from sensorium.multimodal.decode.loaders import LOADERS, Work, prepare
from sensorium.multimodal.decode.shortage import check_shortage
from sensorium.multimodal.items import Modality
from sensorium.multimodal.processor import Processor
from sensorium.multimodal.shared_memory import ArraySpec, write
from sensorium.multimodal.workers.packing import decode_extension, encode_other
from sensorium.processes.framing import receive_bytes, receive_frame, send_frame
from sensorium.processes.limits import limit_memory, lower
from sensorium.processes.start import end_with, silence_libraries

SPAWN, KILL, RETIRE = b"s", b"k", b"r"
ID_BYTES = 4
NO_WORKER = 0
"""The answer in place of a process id when there can be no further process."""
NO_ROOM = "There is no room for the media of this request now; try again later."

_LIBRARIES: dict[Modality, tuple[str, ...]] = {
    "image": (),
    "video": ("av",),
    "audio": ("av", "soundfile", "soxr"),
}
_MAX_FILES = 256
_NICENESS = 5
"""Workers give way to the server's event loop, which needs little time but needs it at once."""
_FIRST_TO_GO = "500"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.ENOENT)
"""Where a segment cannot be written: the last one when somebody has tidied up its folder."""

logger = logging.getLogger(__name__)


class Job(msgspec.Struct):
    """To a worker: what ``Work`` says, the path of the segment to write, and how many bytes of the file follow."""

    modality: str
    loading: dict[str, Any]
    options: dict[str, Any]
    num_items: int
    path: str
    num_bytes: int


class Done(msgspec.Struct, tag=True):
    """From a worker: the features, whose arrays lie in the job's segment, and what they cost."""

    specs: dict[str, ArraySpec]
    num_embeds: int
    meta: dict[str, Any]
    precomputed: bool
    decode_seconds: float
    decoded_bytes: int
    preprocess_seconds: float


class Failed(msgspec.Struct, tag=True):
    """From a worker: the error of the item; ``code`` is that of its class."""

    message: str
    code: str
    param: str | None = None


encode = msgspec.msgpack.Encoder(enc_hook=encode_other).encode
decode_reply = msgspec.msgpack.Decoder(Done | Failed, ext_hook=decode_extension).decode
_decode_job = msgspec.msgpack.Decoder(Job, ext_hook=decode_extension).decode


def serve(control: socket.socket, processor: Processor, config: MediaConfig, folder: str) -> None:
    """The fork server: fork and kill workers until the other side of ``control`` closes, then remove ``folder``.

    To be called in a process with one thread.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # of the whole group; the frontend decides
        signal.signal(number, signal.SIG_IGN)
    for modality in processor.modalities:
        for library in _LIBRARIES[modality]:
            importlib.import_module(library)
    # Ours is the configured limit, which is looked at before anything is decoded.
    Image.MAX_IMAGE_PIXELS = None
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # else one per core
    heif.register()
    gc.collect()
    gc.freeze()  # pages of objects that nobody changes stay shared with the workers
    children: set[int] = set()
    parent = os.getpid()
    while True:
        command, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        children.difference_update(_ended())
        if command == SPAWN:
            child = _fork()
            if child == 0:
                control.close()
                _run_worker(socket.socket(fileno=descriptors[0]), parent, processor, config)
            os.close(descriptors[0])
            if child is not None:
                children.add(child)
            control.sendall((child or NO_WORKER).to_bytes(ID_BYTES, "little"))
        elif command == KILL:
            child = int.from_bytes(receive_bytes(control, ID_BYTES) or b"", "little")
            if child in children:  # not waited for yet, so that the number is still its own
                os.kill(child, signal.SIGKILL)
        else:
            break
    for child in children:
        os.kill(child, signal.SIGKILL)
    if command != RETIRE:
        shutil.rmtree(folder, ignore_errors=True)


def _fork() -> int | None:
    """As ``os.fork``; None when the system has no more processes or memory for one."""
    try:
        return os.fork()
    except OSError as error:
        logger.error("a media worker could not be forked: %s", error.strerror)
        return None


def _ended() -> list[int]:
    ended = []
    try:
        while (child := os.waitpid(-1, os.WNOHANG)[0]) != 0:
            ended.append(child)
    except ChildProcessError:
        pass  # there is none left
    return ended


def _run_worker(
    jobs: socket.socket, parent_id: int, processor: Processor, config: MediaConfig
) -> None:
    """A worker's whole life; it never returns into the fork server's code."""
    try:
        end_with(parent_id)
        _quieten()
        _limit(config)
        while (frame := receive_frame(jobs)) is not None:
            job = _decode_job(frame)
            data = receive_bytes(jobs, job.num_bytes)
            if data is None:
                break
            _limit_seconds(config.media_decode_timeout)
            send_frame(jobs, encode(_answer(job, data, processor, config)))
    except Exception:
        logger.exception("a media worker failed")
    finally:
        os._exit(0)


def _answer(job: Job, data: bytes, processor: Processor, config: MediaConfig) -> Done | Failed:
    modality: Modality = job.modality  # type: ignore[assignment]
    try:
        loading = LOADERS[modality].parse_options(job.loading, "media_io_kwargs")
        work = Work(modality, data, loading, job.options, job.num_items)
        prepared = prepare(work, config, processor)
        features = prepared.features
        return Done(
            write(job.path, features.arrays),
            features.num_embeds,
            dict(features.meta),
            features.precomputed,
            prepared.decode_seconds,
            prepared.decoded_bytes,
            prepared.preprocess_seconds,
        )
    except SensoriumError as error:
        return Failed(error.message, error.code, error.param)
    except MemoryError:
        return _too_large(modality, config)
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.EFBIG:
            return _too_large(modality, config)
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return Failed(NO_ROOM, OverloadedError.code)
        try:
            check_shortage(error)
        except MemoryError:
            return _too_large(modality, config)
        except OverloadedError as short:
            return Failed(short.message, short.code)
        logger.exception("an item of modality %s could not be decoded", modality)
        return Failed(f"The {modality} cannot be decoded.", MediaUndecodableError.code)


def _too_large(modality: str, config: MediaConfig) -> Failed:
    return Failed(
        f"The {modality} takes more than {config.media_worker_memory_gb:g} GiB of memory to decode and preprocess, "
        "the limit (--media-worker-memory-gb); send a smaller one.",
        MediaTooLargeError.code,
    )


def _quieten() -> None:
    """Keep what the decoders' libraries write about damaged files, warnings and ignored exceptions of Python's among
    it, out of the log; our own lines still go there."""
    log = silence_libraries()
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(log)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)


def _limit(config: MediaConfig) -> None:
    """Memory beyond what the fork server's libraries take, the size of a segment, open files. Addresses are not
    limited: threads reserve many that they never use. Where the system's memory
    ends before these limits, it is this process that goes, and not the engine."""
    memory = int(config.media_worker_memory_gb * GIB)
    limit_memory(memory)
    lower(resource.RLIMIT_FSIZE, memory)
    lower(resource.RLIMIT_NOFILE, _MAX_FILES)
    os.nice(_NICENESS)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(_FIRST_TO_GO)


def _limit_seconds(seconds: float) -> None:
    """Processor time until the kernel ends this process: what a job may take on all cores, should nobody be there any
    more to look at the clock."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cores = len(os.sched_getaffinity(0))
    most = math.ceil(usage.ru_utime + usage.ru_stime + seconds * cores) + 1
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if hard == resource.RLIM_INFINITY or most < hard:
        resource.setrlimit(resource.RLIMIT_CPU, (most, hard))
