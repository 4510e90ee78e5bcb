"""Protocol between the media pipeline and a model family: features, placeholders, positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from sensorium.multimodal.items import Decoded, Features, MediaItem, Modality


@dataclass(frozen=True, slots=True)
class Replacement:
    """Expansion of one placeholder.

    Attributes:
        token_ids: Tokens in place of the placeholder.
        runs: ``(start, length)`` pairs, relative to ``token_ids``, of the positions that embeddings
            fill; usually all of them, ``((0, len(token_ids)),)``.
        joins: Pairs of ids that become one token where they meet at an edge of the replacement, as
            line ends do for some tokenizers, and that token.
    """

    token_ids: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]
    joins: Mapping[tuple[int, int], int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlacedItem:
    """An item in an expanded prompt; ``runs`` are the ``(start, length)`` of its embeddings."""

    item: MediaItem
    runs: tuple[tuple[int, int], ...]

    @property
    def features(self) -> Features:
        """The item's features."""
        return self.item.features


@dataclass(frozen=True, slots=True)
class VideoFacts:
    """Facts of a video that are known before its frames are decoded.

    Attributes:
        num_frames: Number of frames.
        fps: Frames per second; None for a list of images without metadata.
    """

    num_frames: int
    fps: float | None


@dataclass(frozen=True, slots=True)
class FrameChoice:
    """The caller's options for sampling frames; None where there is none.

    Attributes:
        num_frames: So many frames, evenly spaced.
        fps: So many frames per second.
        at_most: Limit of ``limit_mm_per_prompt``, which no sampling exceeds.
        given: The frames are an object of the caller, not a file: all are used unless
            ``num_frames`` or ``fps`` asks for fewer.
    """

    num_frames: int | None = None
    fps: float | None = None
    at_most: int | None = None
    given: bool = False


FrameSampler = Callable[[VideoFacts, FrameChoice], np.ndarray]
"""Returns the indices of the frames that a model sees, picklable.

Ascending, int64, at least one; a frame may come twice.
"""


@dataclass(frozen=True, slots=True)
class Markup:
    """Placeholders that are not single tokens; text is split at them before it is tokenized.

    In the token ids each becomes ``Processor.placeholder(modality)``, which may then be a
    ``placeholders.marker`` that is in no vocabulary.

    Attributes:
        patterns: A regular expression for each modality. Where placeholders are numbered, its group
            ``number`` is the item's number, from 1, and one item may stand in several places.
        prefix_each: Each piece of text begins with the tokenizer's prefix (a BOS), not only the
            first, as in the reference's processor.
    """

    patterns: Mapping[Modality, str] = field(default_factory=dict)
    prefix_each: bool = False


class Processor(Protocol):
    """Preprocessing of one model, made of its configuration files.

    Stateless, picklable, cheap to build, without torch. It runs in media workers and in the
    frontend, never in the engine.
    """

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """Modalities that the model takes; none for a text model."""
        ...

    @property
    def markup(self) -> Markup | None:
        """Placeholders that are not single tokens; None if all are."""
        ...

    def decoding(self, modality: Modality, options: Mapping[str, Any]) -> Any:
        """Return the model's parameter for decoding.

        A ``FrameSampler`` for videos, the sampling rate (int, per second) for audio, None for
        images.
        """
        ...

    def identity(self, modality: Modality, options: Mapping[str, Any], num_items: int = 1) -> bytes:
        """Return the identity of all that decides the features besides the content.

        Class, configuration, ``options``, and ``num_items`` only where it makes a difference.
        """
        ...

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Validate ``mm_processor_kwargs``. Raises InvalidRequestError with the known options."""
        ...

    def process(
        self, modality: Modality, data: Decoded, options: Mapping[str, Any], num_items: int = 1
    ) -> Features:
        """Return the features of a decoded item.

        Args:
            modality: The item's modality.
            data: An image (H, W, 3) uint8 RGB, a ``Video`` or an ``Audio``.
            options: ``mm_processor_kwargs``.
            num_items: Number of items of the modality in the prompt, on which the features of some
                families depend.

        Raises:
            InvalidRequestError: The model cannot take such an item (aspect ratio, size).
            MediaTooLargeError: As above.
        """
        ...

    def embeddings(self, modality: Modality, source: Any, param: str) -> list[Features]:
        """Check precomputed embeddings (tensor, list or mapping); return one ``Features`` per item.

        Raises InvalidEmbeddingsError, which names the item, for a wrong shape, hidden size, dtype,
        count, grid, or NaN.
        """
        ...

    def placeholder(self, modality: Modality) -> tuple[int, ...]:
        """Return the token ids of one unexpanded placeholder, such as ``(image_token_id,)``."""
        ...

    def fill(self, modality: Modality) -> int | None:
        """Return the token of an expanded prompt at the positions of an item's embeddings.

        It lets wrong placeholders be found before items are loaded. None if it is not known, or if
        other tokens stand between those of one image.
        """
        ...

    def placeholder_text(self, modality: Modality, number: int = 1) -> str:
        """Return an item's placeholder as a user writes it in a raw prompt, such as ``<image>``.

        It is also put in front of text for chat templates that take only strings (for Qwen2-VL with
        its vision start and end tokens). ``number`` counts items of the modality from 1; most
        families do not number placeholders.
        """
        ...

    def replacement(self, features: Features, index: int = 0) -> Replacement:
        """Return the expansion of an item's placeholder.

        ``index`` counts the items of its modality from 0.
        """
        ...

    def positions(
        self, token_ids: Sequence[int], items: Sequence[PlacedItem]
    ) -> tuple[np.ndarray, int] | None:
        """Return rotary positions of an expanded prompt and the delta for generated tokens.

        (3, num_tokens) int32, for models with several position axes (M-RoPE, arXiv:2409.12191);
        None for plain positions 0, 1, 2 ...
        """
        ...
