"""The sound generator: from a seed to a sound with questions and true answers.

Tones, beeps, spoken words (see ``training.speech``), noise and silence, each at another loudness,
with another background. Needs NumPy only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np

from training.hearing import ABSENT, NO_SOUND, SMALL_TALK, ask
from training.picture import Turn
from training.speech import DIGITS, RATE, WORDS, Speech

#: Kinds of sounds with their share.
SCENES = {"tone": 0.2, "beeps": 0.24, "word": 0.36, "digits": 0.15, "noise": 0.05}
#: The longest sound in seconds.
LONGEST = 4.0
MOST_BEEPS = 6
DIRECTIONS = ("rising", "falling", "steady")
#: What can be heard at one moment, for the auxiliary loss.
EVENTS = ("nothing", *DIRECTIONS, "beep", *WORDS)


@dataclass(frozen=True)
class Event:
    """An event, one of ``EVENTS``, from sample ``start`` to ``stop``."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Sound:
    """Samples (float32 in -1 to 1, 16 kHz), the turns in random order, and the events."""

    samples: Any
    turns: list[Turn]
    events: list[Event] = field(default_factory=list)


def draw_sound(
    seed: int, speech: Speech | None, scene: str | None = None, speaker: str = "trained"
) -> Sound:
    """Draw one sound.

    Args:
        seed: any integer; it decides everything that the other arguments leave open.
        speech: words as synthesisers say them; None will do for sounds without a voice.
        scene: one of ``SCENES``; by default drawn by their shares.
        speaker: the set of voices to take words from.

    Raises:
        ValueError: ``scene`` is unknown, or needs ``speech``.
    """
    rng = Random(seed)
    scene = scene or rng.choices(list(SCENES), list(SCENES.values()))[0]
    if scene == "tone":
        return _draw_tone(rng)
    if scene == "beeps":
        return _draw_beeps(rng)
    if scene == "noise":
        return _draw_noise(rng)
    if scene not in SCENES:
        raise ValueError(f"scene must be one of {', '.join(SCENES)}, not {scene!r}")
    if speech is None:
        raise ValueError(f"a sound of the kind {scene!r} needs speech")
    return (_draw_word if scene == "word" else _draw_digits)(rng, speech, speaker)


def small_talk(rng: Random) -> Turn:
    """A question without a sound and the fixed answer to it."""
    if rng.random() < 0.4:
        key = rng.choice(("describe", "word", "digit", "direction", "beeps", "source"))
        return Turn("small_talk", ask(rng, key), NO_SOUND)
    questions, answer = rng.choice(SMALL_TALK)
    return Turn("small_talk", rng.choice(questions), answer)


# --- sounds -----------------------------------------------------------------------------------


def _wave(rng: Random, frequencies: Any) -> Any:
    """A tone of the given frequency in Hz at each sample, of random timbre, faded at the ends."""
    phase = np.cumsum(frequencies) * (2 * math.pi / RATE)
    kind = rng.choice(("sine", "sine", "overtones", "square", "triangle"))
    if kind == "sine":
        tone = np.sin(phase)
    elif kind == "overtones":
        tone = sum(np.sin(phase * n) * rng.uniform(0.1, 1.0) / n for n in (1, 2, 3))
    elif kind == "square":
        tone = np.tanh(rng.uniform(2, 6) * np.sin(phase))
    else:
        tone = np.arcsin(np.sin(phase)) * (2 / math.pi)
    fade = min(len(tone) // 3, round(RATE * rng.uniform(0.004, 0.03)))
    ramp = np.linspace(0, 1, fade, dtype=np.float32)
    tone[:fade] *= ramp
    tone[len(tone) - fade :] *= ramp[::-1]
    return (tone / np.abs(tone).max()).astype(np.float32)


def _coloured_noise(rng: Random, count: int) -> Any:
    """``count`` samples of noise with a random slope of its spectrum, root mean square 1."""
    generator = np.random.default_rng(rng.getrandbits(63))
    length = 1 << max(4, (count - 1).bit_length())  # fast to transform
    noise = generator.standard_normal(length, np.float32)
    slope = rng.choice((0.0, rng.uniform(0.0, 1.0), rng.uniform(0.3, 1.0)))
    if slope:
        spectrum = np.fft.rfft(noise)
        spectrum *= np.maximum(np.arange(len(spectrum)), 8 * len(spectrum) / RATE) ** -slope
        noise = np.fft.irfft(spectrum, length)
    noise = noise[:count]
    return (noise / max(1e-9, float(np.sqrt(np.mean(noise**2))))).astype(np.float32)


def _finish(
    rng: Random, parts: list[tuple[str, Any]], gaps: list[float], turns: list[Turn]
) -> Sound:
    """Put ``parts`` one after another with ``gaps`` in seconds before, between and after them."""
    pieces, events, at = [], [], 0
    for (name, samples), gap in zip(parts, gaps, strict=False):
        pieces.append(np.zeros(round(gap * RATE), np.float32))
        at += len(pieces[-1])
        events.append(Event(name, at, at + len(samples)))
        pieces.append(samples)
        at += len(samples)
    pieces.append(np.zeros(round(gaps[-1] * RATE), np.float32))
    samples = np.concatenate(pieces)[: round(LONGEST * RATE)]
    samples = _tilt(rng, samples) * rng.uniform(0.08, 0.9)
    rng.shuffle(turns)
    return Sound(_add_background(rng, samples), turns, events)


def _tilt(rng: Random, samples: Any) -> Any:
    """``samples`` as through another microphone: treble or bass weaker."""
    if rng.random() < 0.5:
        return samples
    other = np.concatenate((samples[:1], samples[:-1]))
    tilted = samples + rng.uniform(-0.6, 0.8) * other
    return tilted / max(1e-9, float(np.abs(tilted).max()))


def _add_background(rng: Random, samples: Any) -> Any:
    """Add noise 8 to 40 dB below the sound; a quarter of the sounds get a trace of it."""
    loud = np.abs(samples) > 0.02 * np.abs(samples).max()
    level = float(np.sqrt(np.mean(samples[loud] ** 2)))
    below = rng.uniform(8, 40) if rng.random() < 0.75 else rng.uniform(45, 80)
    noise = _coloured_noise(rng, len(samples)) * (level * 10 ** (-below / 20))
    return np.clip(samples + noise, -1.0, 1.0).astype(np.float32)


def _edge(rng: Random) -> float:
    """Seconds of silence before or after a sound."""
    return rng.choice((rng.uniform(0.02, 0.15), rng.uniform(0.05, 0.6)))


def _draw_tone(rng: Random) -> Sound:
    direction = rng.choice(DIRECTIONS)
    seconds = rng.uniform(0.4, 2.2)
    count = round(seconds * RATE)
    if direction == "steady":
        start = math.exp(rng.uniform(math.log(150), math.log(3200)))
        frequencies = np.full(count, start)
    else:
        ratio = math.exp(rng.uniform(math.log(1.3), math.log(4.5)))
        start = math.exp(rng.uniform(math.log(150), math.log(min(2200.0, 4000 / ratio))))
        share = np.linspace(0, 1, count)
        straight = rng.random() < 0.5
        frequencies = start * (1 + (ratio - 1) * share) if straight else start * ratio**share
        if direction == "falling":
            frequencies = frequencies[::-1]
    turns = [
        Turn("direction", ask(rng, "direction"), direction),
        Turn("describe", ask(rng, "describe"), f"a {direction} tone"),
        Turn("source", ask(rng, "source"), "a tone"),
    ]
    for other in rng.sample(DIRECTIONS, 2):
        answer = "yes" if other == direction else "no"
        turns.append(Turn("direction", ask(rng, "is_" + other), answer))
    if direction == "steady" and (start < 500 or start > 1000):
        turns.append(Turn("pitch", ask(rng, "pitch"), "low" if start < 500 else "high"))
    turns += _ask_missing(rng, "tone")
    parts = [(direction, _wave(rng, frequencies))]
    return _finish(rng, parts, [_edge(rng), _edge(rng)], turns)


def _draw_beeps(rng: Random) -> Sound:
    count = rng.randint(1, MOST_BEEPS)
    pitch = math.exp(rng.uniform(math.log(300), math.log(3200)))
    length, gap = rng.uniform(0.07, 0.26), rng.uniform(0.09, 0.35)
    uneven = rng.random() < 0.4
    scattered = rng.random() < 0.3
    parts, gaps = [], [_edge(rng)]
    for _ in range(count):
        seconds = length * (rng.uniform(0.75, 1.3) if uneven else 1.0)
        frequency = pitch * (rng.uniform(0.75, 1.3) if scattered else 1.0)
        samples = _wave(rng, np.full(round(seconds * RATE), frequency))
        parts.append(("beep", samples * (rng.uniform(0.6, 1.0) if uneven else 1.0)))
        gaps.append(gap * (rng.uniform(0.7, 1.5) if uneven else 1.0))
    gaps[-1] = _edge(rng)
    noun = "beep" if count == 1 else "beeps"
    turns = [
        Turn("beeps", ask(rng, "beeps"), str(count)),
        Turn("describe", ask(rng, "describe"), f"{count} {noun}"),
        Turn("source", ask(rng, "source"), "beeps"),
    ]
    other = rng.randint(1, MOST_BEEPS - 1)
    answer = "yes" if count > other else "no"
    turns.append(Turn("beeps", ask(rng, "more_beeps", DIGITS[other]), answer))
    turns += _ask_missing(rng, "beeps")
    return _finish(rng, parts, gaps, turns)


def _bent(rng: Random, samples: Any) -> Any:
    """A voice played a little faster and higher, or slower and lower."""
    if rng.random() < 0.4:
        return samples
    places = np.arange(0, len(samples) - 1, rng.uniform(0.88, 1.14))
    return np.interp(places, np.arange(len(samples)), samples).astype(np.float32)


def _draw_word(rng: Random, speech: Speech, speaker: str) -> Sound:
    said = speech.word(rng, rng.choice(WORDS), speaker)
    word, is_digit = said.word, said.word in DIGITS
    turns = [
        Turn("word", ask(rng, "word"), word),
        Turn("describe", ask(rng, "describe"), f"a voice saying {word}"),
        Turn("source", ask(rng, "source"), "a voice"),
    ]
    if is_digit:
        turns.append(Turn("digit", ask(rng, "digit"), str(DIGITS.index(word))))
    elif rng.random() < 0.4:
        turns.append(Turn("missing", ask(rng, "digit"), ABSENT))
    other = word if rng.random() < 0.5 else rng.choice(WORDS)
    turns.append(Turn("is_word", ask(rng, "is_word", other), "yes" if other == word else "no"))
    if rng.random() < 0.4:
        turns.append(Turn("is_digit", ask(rng, "is_digit"), "yes" if is_digit else "no"))
    turns += _ask_missing(rng, "voice")
    return _finish(rng, [(word, _bent(rng, said.samples))], [_edge(rng), _edge(rng)], turns)


def _draw_digits(rng: Random, speech: Speech, speaker: str) -> Sound:
    count = rng.choices((1, 2, 3), (1, 4, 3))[0]
    words = [rng.choice(DIGITS) for _ in range(count)]
    parts = [(said.word, _bent(rng, said.samples)) for said in speech.words(rng, words, speaker)]
    gaps = [_edge(rng), *(rng.uniform(0.05, 0.4) for _ in parts)]
    gaps[-1] = _edge(rng)
    spelled = " ".join(str(DIGITS.index(word)) for word in words)
    turns = [
        Turn("digits", ask(rng, "digits"), spelled),
        Turn("describe", ask(rng, "describe"), "a voice saying " + " ".join(words)),
        Turn("source", ask(rng, "source"), "a voice"),
    ]
    other = rng.choice(DIGITS) if rng.random() < 0.5 else rng.choice(words)
    turns.append(Turn("is_word", ask(rng, "is_word", other), "yes" if other in words else "no"))
    turns += _ask_missing(rng, "voice")
    return _finish(rng, parts, gaps, turns)


def _draw_noise(rng: Random) -> Sound:
    count = round(rng.uniform(0.5, 2.0) * RATE)
    silent = rng.random() < 0.4
    level = 10 ** (rng.uniform(-6, -3.7) if silent else rng.uniform(-1.7, -0.7))
    samples = np.clip(_coloured_noise(rng, count) * level, -1, 1)
    name = "nothing" if silent else "noise"
    turns = [
        Turn("describe", ask(rng, "describe"), name),
        Turn("source", ask(rng, "source"), name),
        *_ask_missing(rng, "noise"),
    ]
    rng.shuffle(turns)
    return Sound(samples, turns)


def _ask_missing(rng: Random, kind: str) -> list[Turn]:
    """Now and then, ask for something that a sound of this kind does not have."""
    answer = "yes" if kind == "voice" else "no"
    options = [Turn("is_voice", ask(rng, "is_voice"), answer)]
    if kind != "voice":
        options.append(Turn("missing", ask(rng, rng.choice(("word", "digit"))), ABSENT))
    if kind not in ("beeps", "tone"):
        options.append(Turn("missing", ask(rng, "beeps"), "0"))
    if kind not in ("beeps", "tone"):
        options.append(Turn("missing", ask(rng, "direction"), ABSENT))
    return rng.sample(options, 1) if rng.random() < 0.5 else []
