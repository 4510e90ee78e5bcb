"""Short audio clips of every accepted format, made when they are needed."""

from __future__ import annotations

import io
from fractions import Fraction
from typing import Any

import av
import numpy as np
import soundfile

from tests.fuzz.videos import with_sound

RATE = 16000
SECONDS = 0.15

_FILES = {
    "wav 8 bit": ("WAV", "PCM_U8"),
    "wav 16 bit": ("WAV", "PCM_16"),
    "wav 24 bit": ("WAV", "PCM_24"),
    "wav 32 bit": ("WAV", "PCM_32"),
    "wav float": ("WAV", "FLOAT"),
    "wav double": ("WAV", "DOUBLE"),
    "wav mu-law": ("WAV", "ULAW"),
    "wav adpcm": ("WAV", "MS_ADPCM"),
    "wav extensible": ("WAVEX", "PCM_16"),
    "rf64": ("RF64", "PCM_16"),
    "w64": ("W64", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "flac 24 bit": ("FLAC", "PCM_24"),
    "ogg vorbis": ("OGG", "VORBIS"),
    "ogg opus": ("OGG", "OPUS"),
    "aiff": ("AIFF", "PCM_16"),
    "caf": ("CAF", "PCM_16"),
    "au": ("AU", "PCM_16"),
    "voc": ("VOC", "PCM_16"),
    "mp3": ("MP3", None),
}
_STREAMS = {
    "m4a": ("ipod", "aac"),
    "aac": ("adts", "aac"),
    "webm opus": ("webm", "libopus"),
    "mp3 in avi": ("avi", "libmp3lame"),
    "transport stream": ("mpegts", "aac"),
}


def audio() -> dict[str, bytes]:
    """Encoded audio clips by name: ``wav 16 bit``, ``m4a`` …"""
    return {
        **{name: written(tone(2), *of) for name, of in _FILES.items()},
        **{name: muxed(*of) for name, of in _STREAMS.items()},
        "wav gsm": written(tone(1), "WAV", "GSM610"),
        "wav 8 channels": written(tone(8), "WAV", "PCM_16"),
        "wav one sample": written(tone(1)[:1], "WAV", "PCM_16"),
        "wav no samples": written(tone(1)[:0], "WAV", "PCM_16"),
        "wav 192 kHz": written(tone(1), "WAV", "PCM_16", 192_000),
        "wav not finite": written(np.full((100, 1), np.nan), "WAV", "FLOAT"),
        "m4a 8 channels": muxed("ipod", "aac", "7.1"),
        "sound of a video": with_sound(),
    }


def tone(num_channels: int) -> np.ndarray:
    """(N, channels) float32: a sine with a little noise."""
    time = np.arange(int(RATE * SECONDS)) / RATE
    noise = np.random.default_rng(0).normal(0, 0.01, (len(time), num_channels))
    return (0.4 * np.sin(2 * np.pi * 440 * time)[:, None] + noise).astype(np.float32)


def written(samples: np.ndarray, form: str, subtype: str | None, rate: int = RATE) -> bytes:
    """A file of libsndfile's making."""
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=form, subtype=subtype)
    return file.getvalue()


def muxed(container: str, codec: str, layout: str = "mono") -> bytes:
    """A file of FFmpeg's making."""
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        rate = 48000 if codec == "libopus" else RATE
        stream: Any = out.add_stream(codec, rate=rate)
        stream.layout = layout
        own = str(stream.codec_context.format.name)
        resampler = av.AudioResampler(format=own, layout=layout, rate=rate)
        frame = av.AudioFrame.from_ndarray(tone(1).T.copy(), format="fltp", layout="mono")
        frame.sample_rate, frame.time_base = RATE, Fraction(1, RATE)
        for piece in resampler.resample(frame):
            out.mux(stream.encode(piece))
        out.mux(stream.encode(None))
    return file.getvalue()
