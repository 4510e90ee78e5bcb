"""What several tests of the training code need."""

from __future__ import annotations

import numpy as np
import pytest
from training.speech import RATE, SPEAKERS, WORDS, Speech


@pytest.fixture(scope="session")
def speech() -> Speech:
    """Each word of each set of voices is a tone of its own, in place of a synthesiser's voice."""
    samples, ends, rows = [], [], []
    for voice, _ in enumerate(SPEAKERS * 2):
        for place, _ in enumerate(WORDS):
            time = np.arange(4000 + 50 * place) / RATE
            samples.append(np.round(30000 * np.sin(2 * np.pi * (200 + 40 * place) * time)))
            ends.append(len(samples[-1]) + (ends[-1] if ends else 0))
            rows.append((place, voice % len(SPEAKERS), voice))
    words, speakers, voices = np.array(rows, np.int32).T
    return Speech(np.concatenate(samples).astype(np.int16), np.array(ends), words, speakers, voices)
