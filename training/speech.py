"""Spoken words from speech synthesisers of the system, for the sound generator.

    python -m training.speech --out runs/speech.npz

lets eSpeak NG and Flite (Debian: ``espeak-ng``, ``flite``) say every word with many voices, speeds
and pitches, once, and writes the samples into one file. Two voices of eSpeak, an accent and a
voice of Flite are kept out of training, to measure how well words of unknown speakers are heard.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import wave
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

RATE = 16_000
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDS = (
    *DIGITS, "yes", "no", "red", "green", "blue", "left", "right", "up", "down", "stop", "go",
    "hello",
)  # fmt: skip
ACCENTS = ("en-us", "en-gb", "en-gb-x-rp", "en-gb-x-gbclan", "en-029")
ESPEAK_VOICES = (
    "m1", "m2", "m3", "m4", "m5", "m7", "m8", "f1", "f2", "f3", "f5", "Alex", "Alicia", "Andrea",
    "Andy", "Annie", "Denis", "Diogo", "Gene", "Henrique", "Hugo", "Jacky", "Lee", "Marco",
    "Mario", "Michael", "Mike", "Storm", "adam", "anika", "antonio", "aunty", "belinda",
    "benjamin", "boris", "caleb", "david", "edward", "grandma", "grandpa", "gustave", "john",
    "klatt", "klatt2", "klatt4", "linda", "marcelo", "max", "michel", "miguel", "norbert", "pablo",
    "paul", "pedro", "quincy", "robert", "sandro", "shelby", "steph", "travis", "victor", "zac",
)  # fmt: skip
FLITE_VOICES = ("kal", "kal16", "awb", "rms")
HELD_OUT_ACCENTS = ("en-gb-scotland",)
HELD_OUT_ESPEAK = ("f4", "m6", "ed", "rob", "iven", "steph2")
HELD_OUT_FLITE = ("slt",)
#: Sets of voices in the file: for training, unknown ones of eSpeak, an unknown one of Flite.
SPEAKERS = ("trained", "espeak", "flite")


class SynthesiserError(RuntimeError):
    """A speech synthesiser is missing or did not work."""


class SilenceError(SynthesiserError):
    """A speech synthesiser gave no sound."""


@dataclass(frozen=True)
class Said:
    """One word as a synthesiser says it, silence cut off; float32 samples at 16 kHz, peak 1."""

    word: str
    samples: Any


class Speech:
    """All words said by all voices; ``Speech.load`` reads what ``main`` wrote."""

    def __init__(self, samples: Any, ends: Any, words: Any, speakers: Any, voices: Any) -> None:
        self._samples, self._ends = samples, ends
        self._places: dict[tuple[str, str], list[int]] = {}
        self._by_voice: dict[tuple[str, int], dict[str, int]] = {}
        self._word_of = words
        for place, (word, speaker, voice) in enumerate(zip(words, speakers, voices, strict=True)):
            name = SPEAKERS[int(speaker)]
            self._places.setdefault((name, WORDS[int(word)]), []).append(place)
            self._by_voice.setdefault((name, int(voice)), {})[WORDS[int(word)]] = place

    @classmethod
    def load(cls, path: Path) -> Speech:
        """The file that ``python -m training.speech`` wrote."""
        with np.load(path) as file:
            return cls(*(file[k] for k in ("samples", "ends", "words", "speakers", "voices")))

    def __len__(self) -> int:
        return len(self._ends)

    def _said(self, place: int) -> Said:
        begin = int(self._ends[place - 1]) if place else 0
        samples = self._samples[begin : int(self._ends[place])].astype(np.float32)
        return Said(WORDS[int(self._word_of[place])], samples / max(1.0, np.abs(samples).max()))

    def word(self, rng: Random, word: str, speaker: str) -> Said:
        """``word`` in a random voice of the set ``speaker``."""
        return self._said(rng.choice(self._places[speaker, word]))

    def words(self, rng: Random, words: list[str], speaker: str) -> list[Said]:
        """``words`` in one random voice."""
        voices = [k for k in self._by_voice if k[0] == speaker]
        while True:
            places = self._by_voice[rng.choice(voices)]
            if all(word in places for word in words):
                return [self._said(places[word]) for word in words]


def read_wave(data: bytes) -> Any:
    """Read a mono 16-bit WAV file as float32 in -1 to 1 at 16 kHz, without silence at the ends.

    Raises:
        SilenceError: the file has no sound in it.
    """
    with wave.open(io.BytesIO(data)) as file:
        rate, raw = file.getframerate(), file.readframes(10**9)
    samples = np.frombuffer(raw[: len(raw) // 2 * 2], np.int16).astype(np.float32) / 32768
    if rate != RATE:
        samples = resample(samples, rate, RATE)
    loud = np.flatnonzero(np.abs(samples) > 0.01 * max(1e-9, np.abs(samples).max()))
    if len(loud) < RATE // 20:
        raise SilenceError("the synthesiser gave no sound")
    return samples[loud[0] : loud[-1] + 1]


def resample(samples: Any, old: float, new: float) -> Any:
    """``samples`` at the rate ``new`` instead of ``old``, through the spectrum of the whole."""
    count = max(1, round(len(samples) * new / old))
    spectrum = np.fft.rfft(samples)
    kept = np.zeros(count // 2 + 1, np.complex128)
    kept[: min(len(kept), len(spectrum))] = spectrum[: len(kept)]
    return (np.fft.irfft(kept, count) * (count / len(samples))).astype(np.float32)


def _speak(command: list[str]) -> Any:
    try:
        done = subprocess.run(command, capture_output=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        raise SynthesiserError(f"{command[0]} did not work ({error}); is it installed?") from error
    return read_wave(done.stdout)


def espeak(word: str, voice: str, speed: int, pitch: int) -> Any:
    """Samples of ``word``: speed in words per minute, pitch from 0 to 99."""
    return _speak(["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", word])


def flite(word: str, voice: str, stretch: float, pitch: float) -> Any:
    """Samples of ``word``: ``stretch`` times as slow as usual, mean pitch in Hz."""
    options = (f"duration_stretch={stretch:.3f}", f"int_f0_target_mean={pitch:.0f}")
    settings = [part for option in options for part in ("--setf", option)]
    return _speak(["flite", "-voice", voice, *settings, "-t", word, "-o", "/dev/stdout"])


def settings(rng: Random, count: int) -> list[tuple[str, str, tuple[Any, ...]]]:
    """Return (set of voices, synthesiser, arguments) of ``count`` voices and a third more."""
    made: list[tuple[str, str, tuple[Any, ...]]] = []
    for i in range(count + count // 3):
        held_out = i >= count
        if i % 5 == 4:
            voice = rng.choice(HELD_OUT_FLITE if held_out else FLITE_VOICES)
            pitch = rng.uniform(150, 220) if voice == "slt" else rng.uniform(75, 135)
            arguments: tuple[Any, ...] = (voice, rng.uniform(0.75, 1.45), pitch)
            made.append(("flite" if held_out else "trained", "flite", arguments))
            continue
        accent = rng.choice(HELD_OUT_ACCENTS if held_out and i % 5 == 3 else ACCENTS)
        voices = ESPEAK_VOICES if not held_out or i % 5 == 3 else HELD_OUT_ESPEAK
        arguments = (
            f"{accent}+{rng.choice(voices)}", rng.randint(105, 230), rng.randint(15, 85),
        )  # fmt: skip
        made.append(("espeak" if held_out else "trained", "espeak", arguments))
    return made


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="file to write (.npz)")
    parser.add_argument("--voices", type=int, default=500, help="settings of voices to train with")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    say = {"espeak": espeak, "flite": flite}
    samples, ends, rows, end = [], [], [], 0
    for voice, (speaker, name, arguments) in enumerate(
        settings(Random(options.seed), options.voices)
    ):
        for place, word in enumerate(WORDS):
            try:
                said = say[name](word, *arguments)
            except SilenceError:  # rare: some settings of a voice swallow a word
                continue
            said = np.round(said / np.abs(said).max() * 32000).astype(np.int16)
            end += len(said)
            samples.append(said)
            ends.append(end)
            rows.append((place, SPEAKERS.index(speaker), voice))
    words, speakers, voices = np.array(rows, np.int32).T
    np.savez(options.out, samples=np.concatenate(samples), ends=np.array(ends), words=words,
             speakers=speakers, voices=voices)  # fmt: skip
    print(f"{len(ends)} words, {end / RATE / 60:.1f} minutes")


if __name__ == "__main__":
    main()
