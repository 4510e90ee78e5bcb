"""The protocol between the media pipeline and a model family: how pictures become features and placeholders tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from sensorium.multimodal.items import Features, Modality


@dataclass(frozen=True, slots=True)
class Replacement:
    """What one placeholder expands to.

    ``token_ids`` replace the placeholder; ``runs`` are ``(start, length)`` pairs relative to them: the positions that
    embeddings fill. Usually all of them: ``runs == ((0, len(token_ids)),)``.
    """

    token_ids: tuple[int, ...]
    runs: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class PlacedItem:
    """An item's features and where its embeddings go: ``runs`` are absolute ``(start, length)`` positions."""

    features: Features
    runs: tuple[tuple[int, int], ...]


class Processor(Protocol):
    """One per loaded model; made of its configuration files. Stateless, picklable, cheap to build, without torch.

    It runs in media workers and in the frontend, never in the engine.
    """

    @property
    def modalities(self) -> tuple[Modality, ...]:
        """What the model takes; empty for a text model."""
        ...

    def identity(self, modality: Modality, options: Mapping[str, Any]) -> bytes:
        """Everything besides the content that decides the features: class, configuration, ``options``."""
        ...

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Validate ``mm_processor_kwargs``. Raises InvalidRequestError naming the option and those that exist."""
        ...

    def process(self, modality: Modality, data: np.ndarray, options: Mapping[str, Any]) -> Features:
        """Features of one decoded item. Images: ``data`` is (H, W, 3) uint8 RGB.

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

    def placeholder_text(self, modality: Modality) -> str:
        """The placeholder as a user writes it in a raw prompt, such as ``<image>`` (what goes *in front* of text when
        a chat template takes only strings; for Qwen2-VL with its vision start and end tokens)."""
        ...

    def replacement(self, features: Features) -> Replacement:
        """What the placeholder of this item expands to."""
        ...

    def positions(
        self, token_ids: Sequence[int], items: Sequence[PlacedItem]
    ) -> tuple[np.ndarray, int] | None:
        """Rotary positions (3, num_tokens) int32 of an expanded prompt and the delta for generated tokens, for models
        with several position axes (M-RoPE); None for plain positions 0, 1, 2 …"""
        ...
