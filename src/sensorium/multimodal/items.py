"""What a media item is at each station: a reference, decoded data, features with their length."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from sensorium.multimodal.shared_memory import SharedArrays

Modality = Literal["image", "video", "audio"]
MODALITIES: tuple[Modality, ...] = ("image", "video", "audio")

SourceKind = Literal["url", "bytes", "object", "embeds", "cached"]


@dataclass(frozen=True, slots=True)
class MediaRef:
    """Where an item is, and of what kind it should be. Nothing is loaded yet.

    kind ``url``: ``source`` is a string (``http(s):``, ``data:``, ``file:`` or a local path); ``bytes``: an encoded
    file; ``object``: a PIL image, numpy array or torch tensor, for videos also a list of such frames or a pair of
    frames and metadata, for sounds a pair of array and sampling rate; ``embeds``: a torch tensor or a mapping of
    tensors, or base64 text in place of a tensor, possibly of several items; ``cached``: None, to be found under
    ``uuid``. ``param`` is the place in the request, for error messages. ``uuids``: only for ``embeds`` of several
    items, one per item, in place of ``uuid``. ``alone``: the reference is a part of a message, which stands for one
    item even where it holds embeddings. ``processing``, ``loading``: options of this item alone, in place of those of
    the same names in ``mm_processor_kwargs``, and of all that ``media_io_kwargs`` says of its modality.
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
    """A decoded video, as far as it was sampled.

    ``frames``: (T, H, W, 3) uint8 RGB, T from 1. ``indices``: the number of each frame in its source, ascending.
    ``num_source_frames``: how many the source has. ``fps``: frames per second of the source, None when nobody knows (a
    list of pictures without metadata).
    """

    frames: np.ndarray
    indices: tuple[int, ...]
    num_source_frames: int
    fps: float | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the frames."""
        return self.frames.shape

    @property
    def nbytes(self) -> int:
        """Of the frames."""
        return self.frames.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class Audio:
    """A decoded sound: ``samples`` (N,) float32 of one channel, from -1 to 1, ``rate`` of them per second."""

    samples: np.ndarray
    rate: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the samples."""
        return self.samples.shape

    @property
    def nbytes(self) -> int:
        """Of the samples."""
        return self.samples.nbytes


Decoded = np.ndarray | Video | Audio
"""What a processor takes: an image (H, W, 3) uint8 RGB, a clip, a sound."""


@dataclass(frozen=True, slots=True)
class Features:
    """What a processor makes of one item: plain arrays, ready for the model's encoder.

    ``arrays`` are C-contiguous numpy arrays (for images: uint8 pixels after resizing, cropping and
    padding; scaling and normalising is the encoder's first operation, so that little memory moves),
    or the ``SharedArrays`` that they lie in. ``num_embeds`` is the number of embeddings that the
    encoder will make of them. ``meta`` holds small plain values (grid sizes, original size).
    ``precomputed``: ``arrays["embeds"]`` already holds the embeddings (num_embeds, hidden),
    float32.
    """

    modality: Modality
    arrays: Mapping[str, np.ndarray]
    num_embeds: int
    meta: Mapping[str, Any] = field(default_factory=dict)
    precomputed: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of all arrays."""
        if isinstance(self.arrays, SharedArrays):
            return self.arrays.num_bytes
        return sum(a.nbytes for a in self.arrays.values())


@dataclass(frozen=True, slots=True)
class MediaItem:
    """A loaded item: its identity and its features.

    ``digest``: 32 bytes over content, processing options and the processor's identity
    (``multimodal.cache.digest``). Two items with the same digest have the same embeddings.
    """

    modality: Modality
    digest: bytes
    features: Features


def is_tensor(value: object) -> bool:
    """Return whether a value is a torch tensor, without importing torch for the question.

    While another thread imports torch, its module is there without its classes: nothing can be a tensor yet.
    """
    tensor = getattr(sys.modules.get("torch"), "Tensor", None)
    return tensor is not None and isinstance(value, tensor)
