"""Sounds of every odd kind: an answer or a clear refusal, and what the model hears is what was
sent.
"""

from __future__ import annotations

import base64
from collections.abc import Callable

import numpy as np
import pytest

from tests.multimodal.decode.test_audio import muted, muxed
from tests.reliability.asking import Answer, Offline, Service, audio, place, text
from tests.reliability.media import RATE, data_url, sound, sound_url, tone

QUESTION = text("What do you hear?")


def is_answer_or_refusal(answer: Answer, part: dict[str, object]) -> None:
    answer.is_discreet()
    if answer.status != 200:
        code = answer.error["code"]
        assert code in ("media_undecodable", "media_too_large", "invalid_request"), answer.body
        assert answer.error["param"] == place(part)


FILES: dict[str, Callable[[], bytes]] = {
    "one sample": lambda: sound(np.array([0.5], np.float32)),
    "two samples": lambda: sound(np.array([0.5, -0.5], np.float32)),
    "a hundredth of a second": lambda: sound(tone(0.01)),
    "eight channels": lambda: sound(np.stack([tone()] * 8, axis=1)),
    "8 kHz": lambda: sound(tone(rate=8000), 8000),
    "192 kHz": lambda: sound(tone(rate=192_000), 192_000),
    "768 kHz": lambda: sound(tone(0.05, 768_000), 768_000),
    "1 Hz": lambda: sound(np.zeros(3, np.float32), 1),
    "24 bits": lambda: sound(subtype="PCM_24"),
    "8 bits": lambda: sound(subtype="PCM_U8"),
    "doubles": lambda: sound(subtype="DOUBLE"),
    "A-law": lambda: sound(subtype="ALAW"),
    "silence": lambda: sound(np.zeros(RATE, np.float32)),
    "full scale and beyond": lambda: sound(tone() * 100, subtype="FLOAT"),
    "AIFF": lambda: sound(form="AIFF"),
    "FLAC": lambda: sound(form="FLAC"),
    "OGG": lambda: sound(form="OGG"),
    "MP3": lambda: sound(form="MP3"),
}


@pytest.mark.parametrize("name", FILES)
def test_every_audio_clip_has_an_answer(listening: Service | Offline, name: str) -> None:
    """One sample, eight channels, 1 Hz to 768 kHz, every width of sample.

    An answer, or 400 at the part.
    """
    part = audio(data_url(FILES[name](), "audio/wav"))
    is_answer_or_refusal(listening.ask(part, QUESTION), part)


@pytest.mark.parametrize("name", ["eight channels", "8 kHz", "192 kHz", "24 bits", "silence"])
def test_ordinary_sounds_are_answered(listening: Service | Offline, name: str) -> None:
    """Of the odd ones these are ordinary enough."""
    part = audio(data_url(FILES[name](), "audio/wav"))
    assert listening.ask(part, QUESTION).status == 200


def not_finite(value: float) -> bytes:
    samples = tone()
    samples[100] = value
    return sound(samples, subtype="FLOAT")


NOTHING: dict[str, Callable[[], bytes]] = {
    "no bytes": lambda: b"",
    "no samples": lambda: sound(np.zeros(0, np.float32)),
    "no samples of eight channels": lambda: sound(np.zeros((0, 8), np.float32)),
    "NaN": lambda: not_finite(np.nan),
    "infinity": lambda: not_finite(np.inf),
    "a header alone": lambda: sound()[:44],
    "half a header": lambda: sound()[:20],
    "text": lambda: b"hello",
    "a play list": lambda: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
    "a list of files": lambda: b"ffconcat version 1.0\nfile /etc/passwd\n",
    "an SDP session": lambda: b"v=0\r\nm=audio 5004 RTP/AVP 0\r\nc=IN IP4 127.0.0.1\r\n",
    "a clip without sound": muted,
}


@pytest.mark.parametrize("name", NOTHING)
def test_what_is_no_audio_is_refused(listening: Service | Offline, name: str) -> None:
    """0 samples, NaN, play lists that name files and hosts: 400 at the part."""
    part = audio(data_url(NOTHING[name](), "audio/wav"))
    listening.ask(part, QUESTION).is_refusal(400, "media_undecodable", place(part))


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3", "AIFF", "mp4", "matroska"])
def test_damaged_files_are_answered_or_refused(listening: Service | Offline, form: str) -> None:
    """Cut at many places, with bytes turned: an answer or 400 at the part."""
    codecs = {"mp4": "aac", "matroska": "aac"}
    data = muxed(tone(), RATE, form, codecs[form]) if form in codecs else sound(form=form)
    random = np.random.default_rng(0)
    damaged = [data[: len(data) * part // 5] for part in range(5)] + [data[::-1]]
    for _ in range(6):
        broken = bytearray(data)
        for at in random.integers(0, len(data), 4):
            broken[at] ^= int(random.integers(1, 256))
        damaged.append(bytes(broken))
    for candidate in damaged:
        part = audio(data_url(candidate, "audio/wav"))
        is_answer_or_refusal(listening.ask(part, QUESTION), part)


def test_all_channels_are_heard_alike(sounds: Offline) -> None:
    """CVE-2026-34760: what a listener hears of several channels and what a model got of them
    differed, so that speech could be hidden from one of both. Here it is the mean of all
    channels, which the documentation says: nothing that is in a channel is lost, and the order
    of channels does not matter.
    """
    loud, quiet = tone(pitch=440), tone(pitch=1000) * 0.1
    silent = np.zeros_like(loud)

    def answer(*channels: np.ndarray) -> object:
        part = audio(sound_url(np.stack(channels, axis=1), subtype="FLOAT"))
        return sounds.ask(part, QUESTION, logprobs=3).body

    answer(silent)  # the words before the sound are in the cache for all that follow
    expected = answer((loud + quiet) / 2)
    assert answer(loud, quiet) == expected
    assert answer(quiet, loud) == expected
    assert answer(loud, silent, quiet, silent) == answer((loud + quiet) / 4)
    assert answer(loud, silent) != expected


@pytest.mark.parametrize(
    ("samples", "rate"),
    [
        (np.zeros(0, np.float32), RATE),
        (np.full(100, np.nan, np.float32), RATE),
        (np.full(100, np.inf, np.float32), RATE),
        (np.zeros((2, 3, 4), np.float32), RATE),
        (np.zeros((0, 2), np.float32), RATE),
        (np.zeros(100, np.complex64), RATE),
        (np.array(["a"]), RATE),
        (np.zeros(100, np.float32), 0),
        (np.zeros(100, np.float32), -1),
        (np.zeros(100, np.float32), 10**9),
        (np.zeros(100, np.float32), 16000.5),
    ],
)
def test_arrays_that_are_no_audio(sounds: Offline, samples: np.ndarray, rate: float) -> None:
    """The same of ``multi_modal_data``.

    No samples, NaN, dimensions, types and rates that cannot be.
    """
    prompt = {"prompt": "<|audio|>\nWhat is it?", "multi_modal_data": {"audio": (samples, rate)}}
    answer = sounds.generate(prompt)
    answer.is_refusal(400, "invalid_request", "prompt.multi_modal_data.audio")


@pytest.mark.parametrize(
    "payload",
    [
        {"data": "", "format": "wav"},
        {"data": "!!!", "format": "wav"},
        {"data": base64.b64encode(b"hello").decode(), "format": "mp3"},
        {"data": base64.b64encode(sound()).decode(), "format": "../etc"},
        {"data": base64.b64encode(sound()).decode(), "format": "wav;x=/etc"},
        {"data": 3, "format": "wav"},
        {"format": "wav"},
        None,
        "text",
    ],
)
def test_sounds_within_a_body(closed: Service, payload: object) -> None:
    """``input_audio``: wrong base64, wrong names of formats, wrong types: 400 at the part."""
    part = {"type": "input_audio", "input_audio": payload}
    answer = closed.ask(part, QUESTION)
    answer.is_discreet()
    assert answer.status == 400
    assert answer.error["code"] in ("invalid_request", "media_undecodable")
    assert answer.error["param"] == place(part)
    good = {"data": base64.b64encode(sound()).decode(), "format": "wav"}
    assert closed.ask({"type": "input_audio", "input_audio": good}, QUESTION).status == 200
