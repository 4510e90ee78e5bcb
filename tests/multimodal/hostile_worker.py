"""A fork server whose processor does what the option ``do`` says.

``python -m tests.multimodal.hostile_worker FOLDER DESCRIPTOR``. The first message is a
``MediaConfig``.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from sensorium.config import MediaConfig
from sensorium.errors import InvalidRequestError
from sensorium.multimodal.decode import document
from sensorium.multimodal.items import Features, Modality, PageFacts
from sensorium.multimodal.workers.decode_worker import serve
from sensorium.processes.fork_server import begin_server
from tests.multimodal.support import FakeProcessor

FULL = "TEST_NO_FORK"
"""Environment variable under which the system has no further process."""


class HostileProcessor(FakeProcessor):
    """As the fake one, and what damaged files may do to a library."""

    def process(
        self, modality: Modality, data: np.ndarray, options: Mapping[str, Any], num_items: int = 1
    ) -> Features:
        match options.get("do"):
            case "spin":
                while True:
                    pass
            case "sleep":
                signal.pause()
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "exit":
                os._exit(3)
            case "allocate":
                np.ones(1 << 30, np.float64)
            case "refuse":
                raise InvalidRequestError("no such size", param="mm_processor_kwargs.do")
            case "fail":
                raise RuntimeError("at 0x7f00dead")
            case "shout":
                os.write(2, b"library noise\n")
        meta = {"grid": (1, 2), "scale": np.float32(0.5), "process": os.getpid()}
        return Features(modality, {"pixels": data, "none": np.zeros((0, 3))}, 4, meta)


def _hangs(data: bytes, config: MediaConfig) -> list[PageFacts]:
    signal.pause()
    return []


def _no_fork() -> int:
    raise BlockingIOError(errno.EAGAIN, "no more processes")


if __name__ == "__main__":
    if FULL in os.environ:
        os.fork = _no_fork
    document.inspect_pages = _hangs
    control, first = begin_server(sys.argv[2])
    config = msgspec.msgpack.decode(first or b"", type=MediaConfig)
    serve(control, HostileProcessor(), config, sys.argv[1])
