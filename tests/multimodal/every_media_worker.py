"""A fork server whose processor takes images, videos and sounds as they come out of the decoders.

``python -m tests.multimodal.every_media_worker FOLDER DESCRIPTOR``. The first message is a
``MediaConfig``.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from sensorium.config import MediaConfig
from sensorium.multimodal.items import MODALITIES, Audio, Decoded, Features, Modality, Video
from sensorium.multimodal.workers.decode_worker import serve
from sensorium.processes.fork_server import begin_server
from tests.multimodal.support import FakeProcessor

RATE = 16000


class EveryProcessor(FakeProcessor):
    """Features are what was decoded; ``meta`` says by which process."""

    modalities: tuple[Modality, ...] = MODALITIES

    def decoding(self, modality: Modality, options: Mapping[str, Any]) -> Any:
        return RATE if modality == "audio" else None

    def process(  # type: ignore[override]
        self, modality: Modality, data: Decoded, options: Mapping[str, Any], num_items: int = 1
    ) -> Features:
        array = data if isinstance(data, np.ndarray) else None
        if isinstance(data, Video):
            array = data.frames
        elif isinstance(data, Audio):
            array = data.samples
        assert array is not None
        return Features(modality, {"decoded": array}, 4, {"process": os.getpid()})


if __name__ == "__main__":
    control, first = begin_server(sys.argv[2])
    config = msgspec.msgpack.decode(first or b"", type=MediaConfig)
    serve(control, EveryProcessor(), config, sys.argv[1])
