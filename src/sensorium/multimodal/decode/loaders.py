"""Loading of each modality: its options and decoders.

A new modality is an entry of ``LOADERS``.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from sensorium import tracing
from sensorium.config import MediaConfig, suggestion
from sensorium.errors import (
    InvalidRequestError,
    MediaUndecodableError,
    RequestError,
    SensoriumError,
)
from sensorium.multimodal.decode import audio, document, image
from sensorium.multimodal.decode.shortage import check_shortage
from sensorium.multimodal.decode.video import loading as video
from sensorium.multimodal.items import (
    FRAMES,
    Decoded,
    Features,
    Modality,
    Video,
    document_takes_too_long,
)
from sensorium.multimodal.processor import Processor

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Loader:
    """The functions of one modality.

    ``options`` holds the modality's part of ``media_io_kwargs``, which ``options.parse(given,
    param)`` checks. ``decode(data, options, config, decoding)`` reads an encoded file,
    ``decode_object(source, …)`` an object of the caller's; both return what ``Processor.process``
    takes. ``decoding`` comes from ``Processor.decoding``.
    """

    options: type[image.ImageOptions] | type[video.VideoOptions] | type[audio.AudioOptions]
    decode: Callable[[bytes, Any, MediaConfig, Any], Decoded]
    decode_object: Callable[[Any, Any, MediaConfig, Any], Decoded]


def _decode_image(
    data: bytes, options: image.ImageOptions, config: MediaConfig, decoding: None
) -> np.ndarray:
    return image.decode(data, options, max_pixels=config.max_image_pixels)


def _decode_image_object(
    source: Any, options: image.ImageOptions, config: MediaConfig, decoding: None
) -> np.ndarray:
    return image.decode_object(source, options, max_pixels=config.max_image_pixels)


LOADERS: dict[Modality, Loader] = {
    "image": Loader(image.ImageOptions, _decode_image, _decode_image_object),
    "video": Loader(video.VideoOptions, video.decode, video.decode_object),
    "audio": Loader(audio.AudioOptions, audio.decode, audio.decode_object),
}


def check_loading_options(given: Mapping[str, Any], modalities: Sequence[Modality]) -> None:
    """Raise InvalidRequestError for wrong ``media_io_kwargs`` of these ``modalities``."""
    known: dict[str, Loader] = {modality: LOADERS[modality] for modality in modalities}
    for name, options in given.items():
        param = f"media_io_kwargs.{str(name)[:80]}"
        if name not in known:
            raise InvalidRequestError(
                f"media_io_kwargs has no options for {str(name)[:80]!r}; this model takes "
                f"{', '.join(known) or 'text only'}.{suggestion(str(name), list(known))}",
                param=param,
            )
        known[name].options.parse(options, param)


class DecodeJob(msgspec.Struct, frozen=True, tag=True):
    """Job of decoding and preprocessing one item, in this process or in a worker.

    ``loading``: an object of the modality's ``Loader.options``. ``options``:
    ``mm_processor_kwargs``. ``num_items``: how many items of the modality the prompt has.
    ``page``: index of the page that is the item, where the file is a PDF.
    """

    modality: Modality
    loading: Any
    options: Mapping[str, Any]
    num_items: int = 1
    page: int | None = None

    @property
    def noun(self) -> str:
        """Name of the item for messages."""
        return self.modality if self.page is None else f"page {self.page + 1} of the PDF"

    def most_seconds(self, config: MediaConfig) -> float:
        """Return the time that the job may take."""
        return config.media_decode_timeout

    def too_long(self, config: MediaConfig) -> RequestError:
        """Return the error of a job that took more."""
        return MediaUndecodableError(
            f"Decoding and preprocessing the {self.noun} took longer than "
            f"{config.media_decode_timeout:g} s, the limit (--media-decode-timeout); send a "
            "smaller or shorter one."
        )


class InspectJob(msgspec.Struct, frozen=True, tag=True):
    """Job of reading sizes and texts of a PDF's pages."""

    @property
    def noun(self) -> str:
        """Name of the file for messages."""
        return "PDF"

    def most_seconds(self, config: MediaConfig) -> float:
        """See ``DecodeJob.most_seconds``."""
        return config.document_timeout

    def too_long(self, config: MediaConfig) -> RequestError:
        """See ``DecodeJob.too_long``."""
        return document_takes_too_long(config.document_timeout)


@dataclass(frozen=True, slots=True)
class Prepared:
    """Features of an item, and what they cost."""

    features: Features
    decode_seconds: float
    decoded_bytes: int
    preprocess_seconds: float

    def trace(self, place: str, modality: Modality) -> None:
        """Record for the traced request that its item at ``place`` was decoded and processed."""
        end = time.monotonic()
        middle = end - self.preprocess_seconds
        began = middle - self.decode_seconds
        tracing.station("decoded", began, middle, item=place, modality=modality)
        tracing.station("processed", middle, end, item=place, modality=modality)


def prepare(job: DecodeJob, source: Any, config: MediaConfig, processor: Processor) -> Prepared:
    """Decode and preprocess one item: the bytes of an encoded file, or a caller's object.

    Raises RequestError, and MemoryError where memory is limited.
    """
    modality, loader = job.modality, LOADERS[job.modality]
    started = time.perf_counter()
    decoding = processor.decoding(modality, job.options)
    if job.page is not None:
        data: Decoded = document.render_page(source, job.page, config)
    else:
        decode = loader.decode if isinstance(source, bytes) else loader.decode_object
        data = decode(source, job.loading, config, decoding)
    decoded = time.perf_counter()
    try:
        features = processor.process(modality, data, job.options, job.num_items)
    except (SensoriumError, MemoryError):
        raise
    except Exception as error:
        check_shortage(error)
        _logger.exception("the processor failed on an item (%s) of shape %s", modality, data.shape)
        raise MediaUndecodableError(
            f"The model's processor cannot take this {modality} (decoded shape {data.shape})."
        ) from None
    if isinstance(data, Video):
        features = _with_frames(features, data)
    return Prepared(features, decoded - started, data.nbytes, time.perf_counter() - decoded)


def _with_frames(features: Features, video: Video) -> Features:
    """Return the features of a video with the frames that the model sees in their ``meta``."""
    frames = {
        "indices": list(map(int, video.indices)),
        "fps": None if video.fps is None else float(video.fps),
        "num_source_frames": int(video.num_source_frames),
    }
    return dataclasses.replace(features, meta={**features.meta, FRAMES: frames})
