"""Log-mel spectrograms of Whisper (Radford et al., 2022), in numpy, without torch.

Frames of ``window`` samples, ``hop`` apart and centred on their places (the signal is mirrored at
both ends), weighted by a Hann window; power spectra; triangular filters of Slaney's Auditory
Toolbox (1998), each of unit area; logarithm to base 10, floored at 8 below the loudest value, then
scaled to about -1 to 1.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sensorium.models.configs import bad, count

POWER_FLOOR = 1e-10
DYNAMIC_RANGE = 8.0
"""Powers of ten between the loudest value of an audio item and what counts as silence."""
LINEAR_HZ = 1000.0
"""Below, the mel scale is linear, 3 mel to 200 Hz; above, each mel is a factor of 6.4 ** (1 /
27)."""
_BLOCK = 4096  # frames that are transformed at a time


@dataclass(frozen=True, slots=True)
class MelConfig:
    """Mel spectrogram of ``num_bins`` filters from 0 Hz to half of ``rate`` (samples per second).

    ``window`` and ``hop`` are in samples.
    """

    num_bins: int
    rate: int = 16000
    window: int = 400
    hop: int = 160


def read_mel_config(num_bins: int, preprocessor: Mapping[str, Any]) -> MelConfig:
    """Read preprocessor_config.json of a ``WhisperFeatureExtractor``, with Whisper's defaults.

    Raises ConfigError when it makes another number of bins than the encoder takes, or for
    impossible values.
    """
    own = count(preprocessor, "feature_size", num_bins)
    if own != num_bins:
        bad(
            "num_mel_bins",
            f"is {num_bins}, but preprocessor_config.json makes {own} (feature_size)",
        )
    config = MelConfig(
        num_bins,
        rate=count(preprocessor, "sampling_rate", 16000),
        window=count(preprocessor, "n_fft", 400),
        hop=count(preprocessor, "hop_length", 160),
    )
    if config.hop > config.window or config.window % 2:
        bad(
            "n_fft", f"{config.window} must be even and no less than the hop_length of {config.hop}"
        )
    return config


def log_mel(samples: np.ndarray, config: MelConfig) -> np.ndarray:
    """Return features (len(samples) // hop, num_bins) float32 of samples (N,), N >= ``hop``."""
    margin = config.window // 2
    padded = np.pad(samples.astype(np.float64), margin, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, config.window)[:: config.hop]
    num_frames = len(samples) // config.hop
    filters, hann = mel_filters(config), _hann(config.window)
    result = np.empty((num_frames, config.num_bins), np.float32)
    for start in range(0, num_frames, _BLOCK):
        spectra = np.fft.rfft(windows[start : min(start + _BLOCK, num_frames)] * hann)
        power = (spectra.real**2 + spectra.imag**2) @ filters
        result[start : start + len(power)] = np.log10(np.maximum(power, POWER_FLOOR))
    np.maximum(result, result.max() - DYNAMIC_RANGE, out=result)
    return (result + 4.0) / 4.0


def pad_to_hops(samples: np.ndarray, config: MelConfig, least: int = 1) -> np.ndarray:
    """Pad samples with silence to a multiple of ``hop``, at least ``least`` hops."""
    num_hops = max(-(-len(samples) // config.hop), least)
    return pad_to(samples, num_hops * config.hop)


def pad_to(samples: np.ndarray, length: int) -> np.ndarray:
    """Pad samples with silence, or cut them, to ``length``."""
    if len(samples) >= length:
        return samples[:length]
    return np.pad(samples, (0, length - len(samples)))


@functools.lru_cache(maxsize=8)
def mel_filters(config: MelConfig) -> np.ndarray:
    """Return weights (window // 2 + 1, num_bins) float64 of the frequencies in each filter."""
    top = _to_mel(np.array(config.rate / 2))
    edges = _to_hertz(np.linspace(0.0, top, config.num_bins + 2))
    frequencies = np.linspace(0.0, config.rate / 2, config.window // 2 + 1)
    above = frequencies[:, None] - edges
    widths = np.diff(edges)
    rising = above[:, :-2] / widths[:-1]
    falling = -above[:, 2:] / widths[1:]
    triangles = np.maximum(0.0, np.minimum(rising, falling))
    filters: np.ndarray = triangles * (2.0 / (edges[2:] - edges[:-2]))
    return filters


@functools.lru_cache(maxsize=8)
def _hann(length: int) -> np.ndarray:
    """Return the periodic Hann window."""
    return 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)


def _to_mel(hertz: np.ndarray) -> np.ndarray:
    linear = hertz * 3 / 200
    above = np.maximum(hertz, LINEAR_HZ) / LINEAR_HZ
    return np.where(hertz < LINEAR_HZ, linear, 15 + np.log(above) * 27 / np.log(6.4))


def _to_hertz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, LINEAR_HZ * np.exp((mel - 15) * np.log(6.4) / 27))
