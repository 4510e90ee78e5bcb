"""Log-mel features equal those of the reference's WhisperFeatureExtractor."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from sensorium.errors import ConfigError
from sensorium.models.media.mel import (
    MelConfig,
    log_mel,
    mel_filters,
    pad_to,
    pad_to_hops,
    read_mel_config,
)

if TYPE_CHECKING:
    from transformers import WhisperFeatureExtractor

TOLERANCE = 2e-5


def sound(length: int, seed: int) -> np.ndarray:
    """Tones, clicks, noise and silence."""
    rng = np.random.default_rng(seed)
    time = np.arange(length) / 16000
    tones = sum(
        np.sin(2 * np.pi * rng.uniform(40, 7900) * time + rng.uniform(0, 6)) for _ in range(3)
    )
    loudness = rng.choice([0.0, 0.01, 1.0], length // 3000 + 1).repeat(3000)[:length]
    noise = rng.normal(0, 10.0 ** rng.uniform(-6, -1), length)
    return (0.2 * tones * loudness + noise).astype(np.float32)


def extractor(num_bins: int) -> WhisperFeatureExtractor:
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=num_bins)


@pytest.mark.parametrize("num_bins", [80, 128])
def test_filters(num_bins: int) -> None:
    expected = extractor(num_bins).mel_filters
    np.testing.assert_allclose(mel_filters(MelConfig(num_bins)), expected, atol=1e-12)


@pytest.mark.parametrize("num_bins", [80, 128])
def test_fifty_lengths(num_bins: int) -> None:
    """Against the numpy form of the reference, for lengths that are no multiples of the hop too."""
    rng = np.random.default_rng(num_bins)
    reference, config = extractor(num_bins), MelConfig(num_bins)
    for seed in range(50):
        samples = sound(int(rng.integers(320, 12000)), seed)
        expected = reference._np_extract_fbank_features(samples[None], "cpu")[0].T
        found = log_mel(samples, config)
        assert found.shape == (len(samples) // 160, num_bins)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("num_bins", [80, 128])
def test_padded_to_hops_as_the_reference_is_called(num_bins: int) -> None:
    """The call of Ultravox: no truncation, a multiple of the hop.

    Its single precision is the wider tolerance's.
    """
    reference, config = extractor(num_bins), MelConfig(num_bins)
    for seed, length in enumerate((320, 321, 5000, 16000, 80037)):
        samples = sound(length, seed)
        expected = reference(
            samples,
            sampling_rate=16000,
            padding="longest",
            pad_to_multiple_of=160,
            truncation=False,
            return_attention_mask=True,
        )
        found = log_mel(pad_to_hops(samples, config), config)
        assert len(found) == expected["attention_mask"].sum() == -(-length // 160)
        np.testing.assert_allclose(found, expected["input_features"][0].T, atol=1e-3, rtol=0)


@pytest.mark.parametrize("length", [1, 4000, 480_000, 500_000])
def test_padded_to_thirty_seconds_as_whisper_is_called(length: int) -> None:
    samples = sound(length, length)
    reference = extractor(80)
    filled = pad_to(samples, reference.n_samples)
    expected = reference._np_extract_fbank_features(filled[None], "cpu")[0].T
    found = log_mel(filled, MelConfig(80))
    assert found.shape == (3000, 80)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
    whole = reference(samples, sampling_rate=16000)["input_features"][0].T
    np.testing.assert_allclose(found, whole, atol=1e-3, rtol=0)


def test_silence_and_the_shortest_sounds() -> None:
    config = MelConfig(80)
    assert np.ptp(log_mel(np.zeros(1600, np.float32), config)) == 0
    for length in (1, 2, 100, 160, 161, 319):
        filled = pad_to_hops(np.ones(length, np.float32), config, least=2)
        assert len(filled) == 320
        assert np.isfinite(log_mel(filled, config)).all()


def test_long_sounds_are_transformed_in_blocks() -> None:
    """What a block boundary does must not be seen: a shifted stretch has the same frames."""
    samples, config = sound(5000 * 160, 3), MelConfig(80)
    samples[720_000:722_000] = 10 * np.sin(np.arange(2000))  # the loudest value lies in both
    whole, part = log_mel(samples, config), log_mel(samples[4000 * 160 :], config)
    np.testing.assert_allclose(whole[4010:], part[10:], atol=TOLERANCE, rtol=0)


def test_configuration() -> None:
    assert read_mel_config(128, {}) == MelConfig(128, 16000, 400, 160)
    read = read_mel_config(80, {"sampling_rate": 8000, "n_fft": 200, "hop_length": 80})
    assert read == MelConfig(80, 8000, 200, 80)
    for preprocessor in ({"feature_size": 64}, {"n_fft": 401}, {"hop_length": 0}, {"n_fft": 100}):
        with pytest.raises(ConfigError):
            read_mel_config(80, preprocessor)
