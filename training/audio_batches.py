"""From sounds to arrays: mel features, and several questions about one sound in one sequence.

The layouts are those of ``training.batches``: the sound first and several questions that hear it
but not each other, the question first, or a talk of several turns.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.audio_model import FRAMES_PER_TOKEN, token_counts
from training.batches import IGNORED, PREFIX, TextEncoder
from training.hearing import AUDIO, SYSTEM, lexicon
from training.picture import Turn
from training.sounds import EVENTS, MOST_BEEPS, Sound, draw_sound, small_talk
from training.speech import RATE, Speech
from training.tokenizer import build_tokenizer

MAX_LENGTH = 112
MELS, WINDOW, HOP = 80, 400, 160
SYSTEMS = (SYSTEM, SYSTEM, "Answer in one word.", "Be brief.")


@functools.cache
def mel_filters() -> Tensor:
    """[201, 80]: triangles at even distances on Slaney's mel scale up to 8 kHz, of equal area."""
    frequencies = np.linspace(0, RATE / 2, WINDOW // 2 + 1)

    def mel(hertz: Any) -> Any:
        low, high = 3 * hertz / 200, 15 + np.log(np.maximum(hertz, 1e-9) / 1000) * 27 / np.log(6.4)
        return np.where(hertz < 1000, low, high)

    def hertz(mels: Any) -> Any:
        return np.where(mels < 15, 200 * mels / 3, 1000 * np.exp(np.log(6.4) / 27 * (mels - 15)))

    corners = hertz(np.linspace(mel(np.array(0.0)), mel(np.array(RATE / 2)), MELS + 2))
    up = (frequencies[:, None] - corners[:-2]) / np.diff(corners)[:-1]
    down = (corners[2:] - frequencies[:, None]) / np.diff(corners)[1:]
    triangles = np.maximum(0, np.minimum(up, down)) * (2 / (corners[2:] - corners[:-2]))
    return torch.from_numpy(triangles.astype(np.float32))


def log_mel(samples: Any) -> Tensor:
    """Whisper's features [80, F] of float32 samples at 16 kHz, a frame per 160 samples."""
    sound = torch.as_tensor(samples, dtype=torch.float32)
    sound = torch.nn.functional.pad(sound, (0, -len(sound) % HOP))
    window = torch.hann_window(WINDOW)
    spectrum = torch.stft(sound, WINDOW, HOP, window=window, return_complex=True)
    power = spectrum[:, :-1].abs() ** 2
    logs = (mel_filters().T @ power).clamp(min=1e-10).log10()
    return (torch.maximum(logs, logs.max() - 8.0) + 4.0) / 4.0


class AudioEncoder(TextEncoder):
    """The encoder of the model for sounds."""

    def __init__(self) -> None:
        super().__init__(build_tokenizer(lexicon()))
        self.audio = self._tokenizer.token_to_id(AUDIO)
        self.padding = self._tokenizer.token_to_id(lexicon().pad)


@dataclass
class AudioDialogue:
    """One sequence under construction; ``segment`` 0 is heard by all later segments."""

    encode: AudioEncoder
    tokens: int
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    audio_index: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    next_pos: int = 0

    def _append(self, token: int, segment: int, index: int) -> None:
        self.ids.append(token)
        self.positions.append(self.next_pos)
        self.segments.append(segment)
        self.audio_index.append(index)
        self.labels.append(IGNORED)
        self.next_pos += 1

    def text(self, text: str, segment: int, answer: bool = False) -> None:
        """Append ``text``; with ``answer`` the model has to predict each of its tokens."""
        for token in self.encode(text):
            if answer:
                self.labels[-1] = token
            self._append(token, segment, -1)

    def sound(self, segment: int) -> None:
        """Append the sound."""
        for index in range(self.tokens):
            self._append(self.encode.audio, segment, index)

    def cut(self, length: int) -> None:
        """Drop everything after the first ``length`` tokens."""
        for row in (self.ids, self.positions, self.segments, self.audio_index, self.labels):
            del row[length:]


def layout(
    rng: Random, encode: AudioEncoder, tokens: int, turns: list[Turn], way: str | None = None
) -> AudioDialogue:
    """Put ``turns`` about a sound of ``tokens`` tokens into one sequence of at most ``MAX_LENGTH``.

    ``way`` is ``packed``, ``question_first`` or ``talk``; by default it is drawn.
    """
    way = way or rng.choices(("packed", "question_first", "talk"), (0.74, 0.16, 0.1))[0]
    out = AudioDialogue(encode, tokens)
    out.text("<|begin_of_text|>", PREFIX)
    if rng.random() < 0.25:
        system = f"<|start_header_id|>system<|end_header_id|>\n\n{rng.choice(SYSTEMS)}<|eot_id|>"
        out.text(system, PREFIX)
    user = "<|start_header_id|>user<|end_header_id|>\n\n"
    if way != "question_first":
        out.text(user, PREFIX)
        out.sound(PREFIX)
    else:
        turns = [*turns]
        turns.insert(rng.randint(0, 2), small_talk(rng))
    start = out.next_pos
    for turn in turns:
        number = len(out.kinds) + 1
        length, position = len(out.ids), out.next_pos
        segment = PREFIX if way == "talk" else number
        if way == "talk":
            out.text((user if number > 1 else "") + turn.question, segment)
        else:
            out.next_pos = start
            out.text((user if way == "question_first" else "") + turn.question, segment)
        if way == "question_first" and turn.kind != "small_talk":
            out.sound(segment)
        out.text("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", segment)
        out.text(turn.answer + "<|eot_id|>", segment, answer=True)
        if len(out.ids) > MAX_LENGTH:
            out.cut(length)
            out.next_pos = position
        else:
            out.kinds.append(turn.kind)
    return out


def event_labels(sound: Sound, positions: int) -> tuple[Any, Any]:
    """Events at each position of the encoder, and the number of events begun: [E] each."""
    sounding = np.zeros(positions, np.int64)
    begun = np.zeros(positions, np.int64)
    middle = (np.arange(positions) * 2 + 0.5) * HOP
    for event in sound.events:
        sounding[(middle >= event.start) & (middle < event.stop)] = EVENTS.index(event.name)
        begun[middle >= event.start] += 1
    return sounding, np.minimum(begun, MOST_BEEPS)


def make_sounds(
    encode: AudioEncoder,
    speech: Speech,
    seed: int,
    size: int,
    count: int = 1,
    way: str | None = None,
    speaker: str = "trained",
) -> list[dict[str, Any]]:
    """``count`` batches of ``size`` sounds each, sounds of like length together.

    Returns:
        For each batch features [B, 80, F], lengths [B], events and begun [B, E], ids, positions,
        segments, audio_index and labels [B, L], and the lists ``kinds`` of the kinds of each
        segment.
    """
    rng = Random(seed)
    sounds = [draw_sound(seed * 1000 + i, speech, speaker=speaker) for i in range(size * count)]
    sounds.sort(key=lambda sound: len(sound.samples))
    batches = [
        _batch(rng, encode, sounds[first : first + size], way)
        for first in range(0, len(sounds), size)
    ]
    rng.shuffle(batches)
    return batches


def _batch(
    rng: Random, encode: AudioEncoder, sounds: list[Sound], way: str | None
) -> dict[str, Any]:
    features = [log_mel(sound.samples) for sound in sounds]
    lengths = torch.tensor([row.shape[1] for row in features])
    frames = -(-int(lengths.max()) // FRAMES_PER_TOKEN) * FRAMES_PER_TOKEN
    padded = torch.zeros(len(sounds), MELS, frames)
    events = torch.full((2, len(sounds), frames // 2), IGNORED)
    rows = []
    for i, (sound, row) in enumerate(zip(sounds, features, strict=True)):
        padded[i, :, : row.shape[1]] = row
        positions = (row.shape[1] + 1) // 2
        events[:, i, :positions] = torch.from_numpy(np.stack(event_labels(sound, positions)))
        tokens = int(token_counts(lengths[i : i + 1]))
        rows.append(layout(rng, encode, tokens, sound.turns, way))
    width = -(-max(len(row.ids) for row in rows) // 16) * 16
    batch: dict[str, Any] = {
        "features": padded, "lengths": lengths, "events": events[0], "begun": events[1],
        "kinds": [row.kinds for row in rows],
    }  # fmt: skip
    for name, fill in (("ids", encode.padding), ("positions", 0), ("segments", -1),
                       ("audio_index", -1), ("labels", IGNORED)):  # fmt: skip
        array = torch.full((len(rows), width), fill)
        for i, row in enumerate(rows):
            values = getattr(row, name)
            array[i, : len(values)] = torch.tensor(values)
        batch[name] = array
    return batch
