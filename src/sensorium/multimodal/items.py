"""Media items at each stage: reference, encoded file, decoded data, features."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from sensorium.errors import MediaTooLargeError
from sensorium.multimodal.shared_memory import SharedArrays

Modality = Literal["image", "video", "audio"]
MODALITIES: tuple[Modality, ...] = ("image", "video", "audio")

FetchKind = Literal["image", "video", "audio", "document"]
"""An item, or a file whose content says what it is."""

SourceKind = Literal["url", "bytes", "page", "object", "embeds", "cached"]

EMBEDS_DTYPE = "embeds_dtype"
"""Key of ``Features.meta``: dtype of embeddings that an encoder made, whose bits are in
``arrays["embeds"]``, uint8 (num_embeds, bytes of one)."""

FRAMES = "frames"
"""Key of a video's ``Features.meta``: ``indices`` in the source of the frames that the model sees,
the source's ``fps`` and ``num_source_frames``."""


@dataclass(frozen=True, slots=True)
class MediaRef:
    """Reference to an item that is not loaded yet.

    Attributes:
        modality: What the item should be.
        kind: What ``source`` is.

            - ``url``: a string (``http(s):``, ``data:``, ``file:`` or a local path).
            - ``bytes``: an encoded file.
            - ``page``: a ``Page`` of a PDF.
            - ``object``: a PIL image, numpy array or torch tensor; for videos also a list of such
              frames or a pair of frames and metadata, for audio a pair of samples and sampling
              rate.
            - ``embeds``: a torch tensor or a mapping of tensors, or base64 text in place of a
              tensor, possibly of several items.
            - ``cached``: None; the item is cached under ``uuid``.
        source: The item, or where it is.
        uuid: The caller's id.
        param: Place in the request, for error messages.
        uuids: One id per item, in place of ``uuid``, for ``embeds`` of several items.
        alone: The reference is a part of a message: one item, also if it holds embeddings.
        processing: Options of this item alone, over those in ``mm_processor_kwargs``.
        loading: Options of this item alone, in place of all of its modality in ``media_io_kwargs``
            (of an image: beside them).
    """

    modality: Modality
    kind: SourceKind
    source: Any
    uuid: str | None = None
    param: str = ""
    uuids: tuple[str | None, ...] = ()
    alone: bool = False
    processing: Mapping[str, Any] = field(default_factory=dict)
    loading: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRef:
    """Reference to a file whose content says what it is: an image, a video, audio or a PDF.

    Attributes:
        source: A string as of a ``MediaRef`` of kind ``url``; None for an upload.
        file_id: Id of an upload.
        read: Returns the content of the upload, once it is known where that lies.
        num_bytes: Size of the upload.
        filename: The caller's name for the file.
        uuid: The caller's id.
        param: Place in the request, for error messages.
    """

    source: str | None = None
    file_id: str | None = None
    read: Callable[[], bytes] | None = None
    num_bytes: int = 0
    filename: str = ""
    uuid: str | None = None
    param: str = ""


@dataclass(slots=True, eq=False)
class Document:
    """A PDF: its bytes, their digest, and width and height in pixels of each page.

    ``seconds``: time that its pages have taken so far.
    """

    data: bytes
    digest: bytes
    sizes: tuple[tuple[int, int], ...]
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Page:
    """One page of a PDF; ``index`` counts from 0."""

    document: Document
    index: int

    def check_time(self, most: float) -> None:
        """Raise MediaTooLargeError when the pages of the PDF have taken ``most`` seconds."""
        check_document_time(self.document.seconds, most)


class PageFacts(NamedTuple):
    """One page of a PDF: width and height in pixels of its image, and its text."""

    width: int
    height: int
    text: str = ""


def check_document_time(seconds: float, most: float) -> None:
    """Raise MediaTooLargeError when reading the pages of a PDF has taken ``most`` seconds."""
    if seconds > most:
        raise document_takes_too_long(most)


def document_takes_too_long(most: float) -> MediaTooLargeError:
    """Return the error of a PDF whose pages take more than ``most`` seconds to read."""
    return MediaTooLargeError(
        f"Reading the pages of the PDF took longer than {most:g} s, the limit "
        "(--document-timeout); send fewer or simpler pages."
    )


@dataclass(frozen=True, slots=True, eq=False)
class Fetched:
    """An encoded file: its bytes and its content digest.

    Attributes:
        data: The bytes.
        digest: ``cache.digest.encoded_digest`` of them.
        cached: They come from the disk cache of downloads.
        reusable: They may serve requests that come right after. A local file never is: it may have
            changed by then.
    """

    data: bytes
    digest: bytes
    cached: bool = False
    reusable: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Video:
    """The sampled frames of a decoded video.

    Attributes:
        frames: (T, H, W, 3) uint8 RGB, T from 1.
        indices: Index of each frame in its source, ascending.
        num_source_frames: Number of frames of the source.
        fps: Frames per second of the source; None if unknown (a list of images without metadata).
    """

    frames: np.ndarray
    indices: tuple[int, ...]
    num_source_frames: int
    fps: float | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the frames."""
        return self.frames.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the frames."""
        return self.frames.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class Audio:
    """Decoded audio: ``samples`` (N,) float32 of one channel, from -1 to 1, ``rate`` per second."""

    samples: np.ndarray
    rate: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the samples."""
        return self.samples.shape

    @property
    def nbytes(self) -> int:
        """Bytes of the samples."""
        return self.samples.nbytes


Decoded = np.ndarray | Video | Audio
"""Input of a processor: an image (H, W, 3) uint8 RGB, a video, or audio."""


@dataclass(frozen=True, slots=True)
class Features:
    """Preprocessed input of one item for the model's encoder.

    Attributes:
        modality: The item's modality.
        arrays: C-contiguous numpy arrays, or the ``SharedArrays`` that hold them. For images: uint8
            pixels after resizing, cropping and padding; scaling and normalising is the encoder's
            first operation, so that little memory moves.
        num_embeds: Number of embeddings that the encoder will make of them.
        meta: Small plain values, such as grid sizes and the original size.
        precomputed: ``arrays["embeds"]`` holds the embeddings (num_embeds, hidden), float32, or
            their bits with ``EMBEDS_DTYPE``.
        content: Digest of what they were made of; empty where that was not hashed, as a caller's id
            stands for it.
    """

    modality: Modality
    arrays: Mapping[str, np.ndarray]
    num_embeds: int
    meta: Mapping[str, Any] = field(default_factory=dict)
    precomputed: bool = False
    content: bytes = b""

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        if isinstance(self.arrays, SharedArrays):
            return self.arrays.num_bytes
        return sum(a.nbytes for a in self.arrays.values())


@dataclass(frozen=True, slots=True)
class LoadCost:
    """Cost of loading an item in one request.

    Attributes:
        place: Place of the item in the request, such as ``messages[0].content[1]``.
        fetch_seconds: Reading or downloading its file.
        decode_seconds: Decoding it.
        preprocess_seconds: The model's processor.
        cached: Its features were in the cache; nothing was decoded.
    """

    place: str = ""
    fetch_seconds: float = 0.0
    decode_seconds: float = 0.0
    preprocess_seconds: float = 0.0
    cached: bool = False


@dataclass(frozen=True, slots=True)
class MediaItem:
    """A loaded item.

    Attributes:
        modality: The item's modality.
        digest: 32 bytes over content, processing options and the processor's identity
            (``multimodal.cache.digest``). Items with equal digests have equal embeddings.
        features: Its preprocessed input.
        cost: That of loading it.
    """

    modality: Modality
    digest: bytes
    features: Features
    cost: LoadCost = field(default_factory=LoadCost, compare=False)


def is_tensor(value: object) -> bool:
    """Return whether a value is a torch tensor, without importing torch for the question.

    While another thread imports torch, its module is there without its classes: nothing can be a
    tensor yet.
    """
    tensor = getattr(sys.modules.get("torch"), "Tensor", None)
    return tensor is not None and isinstance(value, tensor)
