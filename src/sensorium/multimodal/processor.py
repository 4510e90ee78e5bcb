"""The protocol between the media pipeline and a model family: how pictures become features and placeholders tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from sensorium.multimodal.items import Decoded, Features, MediaItem, Modality


@dataclass(frozen=True, slots=True)
class Replacement:
    """What one placeholder expands to.

    ``token_ids`` replace the placeholder; ``runs`` are ``(start, length)`` pairs relative to them: the positions that
    embeddings fill. Usually all of them: ``runs == ((0, len(token_ids)),)``. ``joins``: pairs of ids that are one token
    when they meet at an edge of the replacement, as line ends do for some tokenizers, and that token.
    """

    token_ids: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]
    joins: Mapping[tuple[int, int], int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlacedItem:
    """An item in an expanded prompt; its embeddings fill ``runs`` of absolute ``(start, length)`` positions."""

    item: MediaItem
    runs: tuple[tuple[int, int], ...]

    @property
    def features(self) -> Features:
        """The item's features."""
        return self.item.features


@dataclass(frozen=True, slots=True)
class VideoFacts:
    """What is known of a video before its frames are decoded.

    ``num_frames``: how many it has. ``fps``: its frames per second; None for a list of pictures without metadata.
    """

    num_frames: int
    fps: float | None


@dataclass(frozen=True, slots=True)
class FrameChoice:
    """What the caller asked for, each None when not: so many frames, uniformly; or so many per second.

    ``at_most``: the limit of ``limit_mm_per_prompt``, which no sampling exceeds. ``given``: the frames are the caller's
    own choice already, not a file's; all of them are used unless the caller asks for fewer.
    """

    num_frames: int | None = None
    fps: float | None = None
    at_most: int | None = None
    given: bool = False


FrameSampler = Callable[[VideoFacts, FrameChoice], np.ndarray]
"""Which frames of a video a model sees: ascending int64 indices, at least one; a frame may come twice. Picklable."""


@dataclass(frozen=True, slots=True)
class Markup:
    """Placeholders that the vocabulary does not hold as single tokens: the text is split there before it is tokenized.

    ``patterns``: a regular expression for each modality; where placeholders are numbered, its group ``number`` is the
    item's number, from 1, and one item may stand in several places. In the split ids each is
    ``Processor.placeholder(modality)``, which may then be a ``placeholders.marker`` that no vocabulary holds.
    ``prefix_each``: every stretch of text begins with what the tokenizer puts in front (a BOS), not only the first, as
    the reference's processor has it.
    """

    patterns: Mapping[Modality, str] = field(default_factory=dict)
    prefix_each: bool = False


class Processor(Protocol):
    """One per loaded model; made of its configuration files. Stateless, picklable, cheap to build, without torch.

    It runs in media workers and in the frontend, never in the engine.
    """

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """What the model takes; empty for a text model."""
        ...

    @property
    def markup(self) -> Markup | None:
        """How placeholders look that are no tokens of the vocabulary; None where they all are."""
        ...

    def decoding(self, modality: Modality, options: Mapping[str, Any]) -> Any:
        """What decoding must know of the model: a ``FrameSampler`` for videos, the sampling rate (int, per second) for
        sounds, None for images."""
        ...

    def identity(self, modality: Modality, options: Mapping[str, Any], num_items: int = 1) -> bytes:
        """Everything besides the content that decides the features: class, configuration, ``options`` and, only where
        it makes a difference, how many items of the modality the prompt has."""
        ...

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Validate ``mm_processor_kwargs``. Raises InvalidRequestError naming the option and those that exist."""
        ...

    def process(
        self, modality: Modality, data: Decoded, options: Mapping[str, Any], num_items: int = 1
    ) -> Features:
        """Features of one decoded item: an image (H, W, 3) uint8 RGB, a ``Video`` or a ``Audio``.

        ``num_items``: how many items of the modality the prompt has, for the families whose features depend on it.
        Raises InvalidRequestError or MediaTooLargeError when the model cannot take such an item (aspect ratio, size).
        """
        ...

    def embeddings(self, modality: Modality, source: Any, param: str) -> list[Features]:
        """Check precomputed embeddings (tensor, list or mapping): one ``Features`` per item.

        Raises InvalidEmbeddingsError naming the item for a wrong shape, hidden size, dtype, count, grid, NaN.
        """
        ...

    def placeholder(self, modality: Modality) -> tuple[int, ...]:
        """Token ids of one unexpanded placeholder in a prompt, such as ``(image_token_id,)``."""
        ...

    def fill(self, modality: Modality) -> int | None:
        """The token that stands in an expanded prompt where an item's embeddings go, side by side with no other token
        between those of one image; None where that is not known. What is wrong with the placeholders of a prompt is
        then found before its items are loaded."""
        ...

    def placeholder_text(self, modality: Modality, number: int = 1) -> str:
        """The placeholder of the item of this number (of its modality, from 1) as a user writes it in a raw prompt,
        such as ``<image>`` (what goes *in front* of text when a chat template takes only strings; for Qwen2-VL with its
        vision start and end tokens). Most families do not number them."""
        ...

    def replacement(self, features: Features, index: int = 0) -> Replacement:
        """What the placeholder of this item expands to; ``index``: of the item among those of its modality, from 0."""
        ...

    def positions(
        self, token_ids: Sequence[int], items: Sequence[PlacedItem]
    ) -> tuple[np.ndarray, int] | None:
        """Rotary positions (3, num_tokens) int32 of an expanded prompt and the delta for generated tokens, for models
        with several position axes (M-RoPE); None for plain positions 0, 1, 2 …"""
        ...
