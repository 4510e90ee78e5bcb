"""Sample audio."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sensorium.assets.base import Asset


@dataclass(frozen=True)
class AudioAsset(Asset):
    """Sample audio.

    ``winning_call``: a reporter at a game. ``mary_had_lamb``: a spoken nursery rhyme and its tune.
    """

    names: ClassVar[tuple[str, ...]] = ("winning_call", "mary_had_lamb")
    suffix: ClassVar[str] = ".ogg"
    media_type: ClassVar[str] = "audio/ogg"

    @property
    def audio_and_sample_rate(self) -> tuple[np.ndarray, int]:
        """Return the samples, float32 (num_samples,), and their rate in Hz."""
        import soundfile

        samples, rate = soundfile.read(self.path, dtype="float32")
        return samples, int(rate)
