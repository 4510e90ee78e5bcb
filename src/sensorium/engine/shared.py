"""Handles to features in shared memory: what crosses the socket to the engine in place of the arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sensorium.multimodal.items import Features
from sensorium.multimodal.shared_memory import ArraySpec, SharedArrays


@dataclass(frozen=True, slots=True)
class SharedFeatures:
    """A handle to features in a segment; small, and serialisable as plain values."""

    path: str
    modality: str
    num_embeds: int
    arrays: dict[str, ArraySpec]
    meta: dict[str, Any]
    precomputed: bool

    @classmethod
    def of(cls, features: Features) -> SharedFeatures:
        """The handle to features that lie in a segment. It is good for as long as somebody here holds them."""
        segment = features.arrays
        if not isinstance(segment, SharedArrays):
            raise TypeError("the features are not in a segment")
        return cls(
            path=segment.path,
            modality=features.modality,
            num_embeds=features.num_embeds,
            arrays=segment.specs,
            meta=dict(features.meta),
            precomputed=features.precomputed,
        )

    def open(self) -> Features:
        """The features, mapped when they are looked at and never copied. Raises OSError when the segment is gone."""
        return Features(
            modality=self.modality,  # type: ignore[arg-type]
            arrays=SharedArrays(self.path, self.arrays, owned=False),
            num_embeds=self.num_embeds,
            meta=self.meta,
            precomputed=self.precomputed,
        )
