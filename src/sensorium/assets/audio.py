"""Sounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sensorium.assets.base import Asset


@dataclass(frozen=True)
class AudioAsset(Asset):
    """``winning_call``: a reporter at a game. ``mary_had_lamb``: a nursery rhyme, spoken, and its tune."""

    names: ClassVar[tuple[str, ...]] = ("winning_call", "mary_had_lamb")
    suffix: ClassVar[str] = ".ogg"
    media_type: ClassVar[str] = "audio/ogg"

    @property
    def audio_and_sample_rate(self) -> tuple[np.ndarray, int]:
        """Samples (num_samples,) float32, and how many of them make a second."""
        import soundfile

        samples, rate = soundfile.read(self.path, dtype="float32")
        return samples, int(rate)
