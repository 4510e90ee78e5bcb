"""A process that decodes what it is given and tells what came of it.

It may be killed by what it decodes.

``python -m tests.fuzz.decoding``: on standard input a line of JSON and then as many bytes as it
says, again and again; on standard output a line of JSON for each. ``Decoder`` is the other side.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import traceback
from dataclasses import dataclass
from typing import Any

import numpy as np

from sensorium.config import MediaConfig
from sensorium.errors import MediaTooLargeError, RequestError
from sensorium.models import loader
from sensorium.models.registry import resolve
from sensorium.multimodal.decode.loaders import LOADERS
from sensorium.multimodal.items import Audio, Decoded, Modality, Video
from tests.fuzz.memory import Height

LIMITS = MediaConfig(
    max_image_pixels=1 << 20,
    max_video_frames=400,
    max_video_pixels=1 << 22,
    max_audio_seconds=10,
    max_audio_decoded_bytes=1 << 23,
)
"""Small, so that it shows when one of them is not held."""
MOST_GROWTH = {"image": 64 << 20, "video": 192 << 20, "audio": 64 << 20}
"""Bytes that one decoding may add to the process at its height, given ``LIMITS``."""
HANG_SECONDS = 60.0
_MODELS = {"image": "demo", "video": "demo", "audio": "demo-audio"}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one file: ``shape`` of what was decoded, or the error.

    ``grown``: bytes at the height of it.
    """

    shape: tuple[int, ...] = ()
    code: str = ""
    message: str = ""
    grown: int = 0
    fault: str = ""

    @property
    def refused(self) -> bool:
        """Whether there was an error of the kind that there should be."""
        return bool(self.code)


class Decoder:
    """A child that decodes.

    When it dies, or answers nothing for ``HANG_SECONDS``, that is the file's fault, and the next
    file gets a new child.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[bytes] | None = None
        self.num_started = 0

    def decode(self, modality: Modality, data: bytes) -> Outcome:
        """Decode and preprocess a file."""
        child = self._child or self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        head = json.dumps({"modality": modality, "num_bytes": len(data)}).encode() + b"\n"
        try:
            child.stdin.write(head + data)
            child.stdin.flush()
        except BrokenPipeError:
            return self._lost("died")
        ready, _, _ = select.select([child.stdout], [], [], HANG_SECONDS)
        line = child.stdout.readline() if ready else b""
        if not line:
            return self._lost("died" if ready else f"said nothing for {HANG_SECONDS:g} seconds")
        answer = json.loads(line)
        return Outcome(**{**answer, "shape": tuple(answer["shape"])})

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _start(self) -> subprocess.Popen[bytes]:
        self.num_started += 1
        self._child = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return self._child

    def _lost(self, what: str) -> Outcome:
        child = self._child
        assert child is not None
        self.close()
        return Outcome(fault=f"the decoding process {what} (status {child.returncode})")


# --- the child ------------------------------------------------------------------------------------


def main() -> None:
    """Decode until the other side closes. What libraries print goes nowhere."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    processors = {}
    for modality, model in _MODELS.items():
        loaded = loader.read_config(model)
        processors[modality] = resolve(loaded.config).build_processor(loaded)
    while line := sys.stdin.buffer.readline():
        task = json.loads(line)
        data = sys.stdin.buffer.read(task["num_bytes"])
        outcome = _decode(task["modality"], data, processors[task["modality"]])
        answers.write(json.dumps(outcome).encode() + b"\n")
        answers.flush()


def _decode(modality: Modality, data: bytes, processor: Any) -> dict[str, Any]:
    height = Height()
    answer: dict[str, Any] = {"shape": ()}
    try:
        shape, fault = _try(modality, data, processor)
        answer |= {"shape": shape, "fault": fault}
    except RequestError as error:
        answer |= {"code": error.code, "message": error.message}
    except (
        MemoryError
    ):  # FFmpeg's, for tables that promise too much; media workers make an error of it
        answer |= {"code": MediaTooLargeError.code, "message": "too much memory"}
    except BaseException:
        answer["fault"] = traceback.format_exc()
    return {**answer, "grown": height.grown()}


def _try(modality: Modality, data: bytes, processor: Any) -> tuple[tuple[int, ...], str]:
    loading = LOADERS[modality].options.parse({}, "")
    decoding = processor.decoding(modality, {})
    decoded = LOADERS[modality].decode(data, loading, LIMITS, decoding)
    fault = what_is_wrong(decoded)
    features = processor.process(modality, decoded, {}, 1)
    return decoded.shape, fault or ("" if features.num_embeds else "there are no embeddings")


def what_is_wrong(decoded: Decoded) -> str:
    """Empty when this may come of a file, given ``LIMITS``."""
    if isinstance(decoded, Audio):
        samples = decoded.samples
        fine = samples.dtype == np.float32 and samples.ndim == 1 and samples.size > 0
        fine = fine and bool(np.isfinite(samples).all())
        fine = fine and samples.size <= (LIMITS.max_audio_seconds + 1) * decoded.rate
        return "" if fine else f"a sound of shape {samples.shape} and type {samples.dtype}"
    pixels = decoded.frames if isinstance(decoded, Video) else decoded
    most = LIMITS.max_video_pixels if isinstance(decoded, Video) else LIMITS.max_image_pixels
    fine = pixels.dtype == np.uint8 and pixels.shape[-1] == 3 and 0 not in pixels.shape
    fine = fine and pixels.ndim == (4 if isinstance(decoded, Video) else 3)
    fine = fine and pixels.size <= 3 * most
    if fine and isinstance(decoded, Video):
        numbers = decoded.indices
        fine = len(numbers) == len(pixels) and list(numbers) == sorted(numbers)
        fine = fine and numbers[0] >= 0 and numbers[-1] < decoded.num_source_frames
        fine = fine and (decoded.fps is None or 0 < decoded.fps < float("inf"))
    return "" if fine else f"pixels of shape {pixels.shape} and type {pixels.dtype}"


if __name__ == "__main__":
    main()
