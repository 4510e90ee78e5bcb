"""Handles to features in shared memory, which cross the socket to the engine instead of arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sensorium.multimodal.items import Features
from sensorium.multimodal.shared_memory import ArraySpec, SharedArrays


@dataclass(frozen=True, slots=True)
class SharedFeatures:
    """A handle to features in shared memory: plain values that can be serialised."""

    path: str
    modality: str
    num_embeds: int
    arrays: dict[str, ArraySpec]
    meta: dict[str, Any]
    precomputed: bool

    @classmethod
    def of(cls, features: Features) -> SharedFeatures:
        """Return the handle to features in shared memory; it is valid while they are referenced."""
        shared = features.arrays
        if not isinstance(shared, SharedArrays):
            raise TypeError("the features are not in shared memory")
        return cls(
            path=shared.path,
            modality=features.modality,
            num_embeds=features.num_embeds,
            arrays=shared.specs,
            meta=dict(features.meta),
            precomputed=features.precomputed,
        )

    def open(self) -> Features:
        """Return the features, mapped at their first use and never copied.

        Raises OSError when the file is gone.
        """
        return Features(
            modality=self.modality,  # type: ignore[arg-type]
            arrays=SharedArrays(self.path, self.arrays, owned=False),
            num_embeds=self.num_embeds,
            meta=self.meta,
            precomputed=self.precomputed,
        )
