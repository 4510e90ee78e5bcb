"""From images to arrays: several questions about one image share one sequence.

Three layouts, as users write: the image first and several questions that see the image but not
each other (most samples: each question then costs few tokens and looks exactly like a prompt of
its own); the question first and then the image; a talk of several turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from training.front_ends import Noise, draw_noise
from training.palette import COLOURS, SHAPES
from training.picture import Picture, Region, Turn
from training.pictures import CELL, SCENES, choose_grid, choose_size, draw_picture, small_talk
from training.tokenizer import SYSTEM, build_tokenizer

if TYPE_CHECKING:
    pass


MAX_LENGTH = 160
#: Longest sequence with what front ends put around questions.
MAX_NOISY_LENGTH = 448
IGNORED = -100
PREFIX = 0
NO_POINTS = (IGNORED,) * 4
#: Most things in an image; no question counts more.
MOST_THINGS = 6
NOTHING_ASKED = (IGNORED,) * MOST_THINGS
NO_MATCH = -1
SYSTEMS = (
    SYSTEM,
    "Answer in one word.",
    "You are a helpful assistant. Answer briefly.",
    "Be brief.",
)
#: Layout -> share; front ends mostly put the image behind the text.
WAYS = {"packed": 0.7, "question_first": 0.18, "talk": 0.12}
NOISY_WAYS = {"packed": 0.3, "question_first": 0.55, "talk": 0.15}
GLYPHS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
SHAPE_NAMES = (*SHAPES, "bar")
COLOUR_NAMES = tuple(COLOURS)


class TextEncoder:
    """Token ids of texts, remembered, since questions repeat."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        """Ids of ``text``; special tokens in it are recognised."""
        if text not in self._known:
            if len(self._known) > 50_000:
                self._known.clear()
            self._known[text] = self._tokenizer.encode(text).ids
        return self._known[text]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``."""
        return str(self._tokenizer.decode(list(ids)))


class Encoder(TextEncoder):
    """The encoder of the model for images and videos."""

    def __init__(self) -> None:
        super().__init__(build_tokenizer())
        self.image_pad = self._tokenizer.token_to_id("<|image_pad|>")
        self.video_pad = self._tokenizer.token_to_id("<|video_pad|>")
        self.padding = self._tokenizer.token_to_id("<|endoftext|>")


@dataclass
class Dialogue:
    """One sequence under construction; ``segment`` 0 is seen by all later segments.

    ``pairs`` is 0 for an image, and the number of pairs of frames of a video.
    """

    encode: Encoder
    grid: tuple[int, int]
    pairs: int = 0
    ids: list[int] = field(default_factory=list)
    positions: list[tuple[int, int, int]] = field(default_factory=list)
    segments: list[int] = field(default_factory=list)
    image_index: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    points: list[tuple[int, ...]] = field(default_factory=list)
    matches: list[tuple[int, ...]] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    next_pos: int = 0

    def text(self, text: str, segment: int, answer: bool = False) -> None:
        """Append ``text``; with ``answer`` the model has to predict each of its tokens."""
        for token in self.encode(text):
            if answer:
                self.labels[-1] = token
            self.ids.append(token)
            self.positions.append((self.next_pos,) * 3)
            self.segments.append(segment)
            self.image_index.append(-1)
            self.labels.append(IGNORED)
            self.points.append(NO_POINTS)
            self.matches.append(NOTHING_ASKED)
            self.next_pos += 1

    def picture(self, segment: int) -> None:
        """Append the image or the video between its two marks."""
        self.text("<|vision_start|>", segment)
        rows, columns = self.grid
        for cell in range(max(1, self.pairs) * rows * columns):
            pair, place = divmod(cell, rows * columns)
            row, column = divmod(place, columns)
            self.ids.append(self.encode.video_pad if self.pairs else self.encode.image_pad)
            self.positions.append(
                (self.next_pos + pair, self.next_pos + row, self.next_pos + column)
            )
            self.segments.append(segment)
            self.image_index.append(cell)
            self.labels.append(IGNORED)
            self.points.append(NO_POINTS)
            self.matches.append(NOTHING_ASKED)
        self.next_pos += max(self.pairs, rows, columns)
        self.text("<|vision_end|>", segment)

    def cut(self, length: int) -> None:
        """Drop everything after the first ``length`` tokens."""
        for row in (
            self.ids, self.positions, self.segments, self.image_index, self.labels, self.points,
            self.matches,
        ):  # fmt: skip
            del row[length:]


def _answer(sequence: Dialogue, turn: Turn, segment: int) -> None:
    sequence.text("<|im_end|>\n<|im_start|>assistant\n", segment)
    rows, columns = sequence.grid
    flat = [
        int(share * 2 * side) for x, y in turn.points for share, side in ((x, columns), (y, rows))
    ]
    sequence.points[-1] = (*flat, *NO_POINTS)[:4]
    matching = turn.counted if turn.counted is not None else turn.points or None
    if matching is not None:
        moments = turn.track or [(0, x, y) for x, y in matching]
        cells = [(t * rows + int(y * rows)) * columns + int(x * columns) for t, x, y in moments]
        sequence.matches[-1] = (*cells, *(NO_MATCH,) * MOST_THINGS)[:MOST_THINGS]
    sequence.text(turn.answer + "<|im_end|>", segment, answer=True)


def layout(
    rng: Random,
    encode: Encoder,
    grid: tuple[int, int],
    turns: list[Turn],
    way: str | None = None,
    pairs: int = 0,
    noise: Noise | None = None,
) -> Dialogue:
    """Put ``turns`` about an image into one sequence of at most ``MAX_LENGTH`` tokens.

    ``way`` is ``packed``, ``question_first`` or ``talk``; by default it is drawn. ``pairs``: of
    frames, for a video. With ``noise`` at most ``MAX_NOISY_LENGTH`` tokens: what it has before a
    question stands once, what it has behind one is repeated.
    """
    way = way or rng.choices(tuple(WAYS), tuple(WAYS.values()))[0]
    longest = MAX_LENGTH if noise is None else MAX_NOISY_LENGTH
    noise = noise or Noise()
    out = Dialogue(encode, grid, pairs)
    system = SYSTEM if rng.random() < 0.88 else rng.choice(SYSTEMS)
    out.text(f"<|im_start|>system\n{noise.system or system}<|im_end|>\n", PREFIX)
    out.text("<|im_start|>user\n", PREFIX)
    if way != "question_first":
        out.picture(PREFIX)
    out.text(noise.before, PREFIX)
    start = out.next_pos
    for turn in turns:
        number = len(out.kinds) + 1
        asked = turn.question + (noise.after if way != "talk" or number == 1 else "")
        length, position = len(out.ids), out.next_pos
        segment = PREFIX if way == "talk" else number
        if way == "packed":
            out.next_pos = start
            out.text(asked, segment)
        elif way == "talk":
            if number > 1:
                out.text("\n<|im_start|>user\n", segment)
            out.text(asked, segment)
        else:
            out.next_pos = start
            out.text(asked, segment)
            if turn.kind != "small_talk":
                if rng.random() < 0.2:
                    out.text("\n", segment)
                out.picture(segment)
        _answer(out, turn, segment)
        if len(out.ids) > longest:
            out.cut(length)
            out.next_pos = position
        else:
            out.kinds.append(turn.kind)
    return out


def patch_labels(regions: Sequence[Region], size: tuple[int, int], grid: tuple[int, int]) -> Any:
    """Return the labels of each patch of an image of ``size``: [4, P], 0 for nothing, merged order.

    Shape, colour and glyph; in the fourth row shape or glyph only where its middle lies.
    """
    rows, columns = grid[0] * 2, grid[1] * 2
    labels = np.zeros((4, rows, columns), np.int64)
    across, down = size[0] / columns, size[1] / rows
    for region in regions:
        left, top, right, bottom = region.box
        slack = 0.3 if region.glyph else 0.0
        x0 = max(0, int(np.ceil(left / across - 0.5 - slack)))
        x1 = min(columns, int(np.floor(right / across - 0.5 + slack)) + 1)
        y0 = max(0, int(np.ceil(top / down - 0.5 - slack)))
        y1 = min(rows, int(np.floor(bottom / down - 0.5 + slack)) + 1)
        where = (slice(y0, y1), slice(x0, x1))
        if region.shape:
            labels[0][where] = SHAPE_NAMES.index(region.shape) + 1
        if region.colour:
            labels[1][where] = COLOUR_NAMES.index(region.colour) + 1
        if region.glyph:
            labels[2][where] = GLYPHS.index(region.glyph) + 1
        middle = min(rows - 1, max(0, int((top + bottom) / 2 / down)))
        centre = min(columns - 1, max(0, int((left + right) / 2 / across)))
        if region.shape:
            labels[3, middle, centre] = SHAPE_NAMES.index(region.shape) + 1
        elif region.glyph:
            labels[3, middle, centre] = len(SHAPE_NAMES) + GLYPHS.index(region.glyph) + 1
    merged = labels.reshape(4, rows // 2, 2, columns // 2, 2).transpose(0, 1, 3, 2, 4)
    return merged.reshape(4, -1)


def make_batch(
    encode: Encoder,
    seed: int,
    size: int,
    scenes: dict[str, float] | None = None,
    way: str | None = None,
    noisy: float = 0.0,
) -> dict[str, Any]:
    """A batch of ``size`` images of one grid, as arrays; the seed decides everything.

    A batch has noise of front ends with the probability ``noisy``.

    Returns:
        pixels [B, height, width, 3] uint8, patches [B, 4, P], ids, segments, image_index and
        labels [B, L], points [B, L, 4] (before an answer: column and row, in patches, of
        up to two ``points`` of its turn), matches [B, L, 6] (there too: the image tokens of all
        points, or of what is ``counted``, then -1; IGNORED where there are none), positions
        [3, B, L], noisy [] and the lists ``kinds`` of the kinds of each segment.
    """
    rng = Random(seed)
    grid = choose_grid(rng)
    shares = {"text": 1.0} if grid[0] == 2 else scenes or SCENES
    noises = draw_noises(seed, size, noisy)
    sequences, pixels, patches = [], [], []
    for i in range(size):
        scene = rng.choices(list(shares), list(shares.values()))[0]
        picture = draw_picture(seed * 1000 + i, scene, choose_size(rng, grid))
        sequences.append(_lay_out(rng, encode, grid, picture, way, noises[i]))
        resized = picture.image.resize((grid[1] * CELL, grid[0] * CELL), Image.Resampling.BICUBIC)
        pixels.append(np.asarray(resized, np.uint8))
        patches.append(patch_labels(picture.regions, picture.image.size, grid))
    arrays = {"pixels": np.stack(pixels), "patches": np.stack(patches)}
    arrays["noisy"] = np.array(noises[0] is not None)
    return arrays | stack(encode, sequences)


def draw_noises(seed: int, size: int, noisy: float) -> list[Noise | None]:
    """Noise for each sequence of a batch, or None for all; batches without pad to less.

    The draw has a generator of its own, so that a seed means the same images with and without.
    """
    rng = Random(f"noise {seed}")
    if rng.random() >= noisy:
        return [None] * size
    return [draw_noise(rng) for _ in range(size)]


def _lay_out(
    rng: Random,
    encode: Encoder,
    grid: tuple[int, int],
    picture: Picture,
    way: str | None,
    noise: Noise | None,
) -> Dialogue:
    turns = list(picture.turns)
    ways = WAYS if noise is None else NOISY_WAYS
    way = way or rng.choices(tuple(ways), tuple(ways.values()))[0]
    if way == "question_first":
        turns.insert(rng.randint(0, 2), small_talk(rng))
    return layout(rng, encode, grid, turns, way, noise=noise)


def stack(encode: Encoder, sequences: list[Dialogue]) -> dict[str, Any]:
    """Pad sequences on the right to one length, a multiple of 16."""
    longest = max(len(sequence.ids) for sequence in sequences)
    length = -(-longest // 16) * 16
    shape = (len(sequences), length)
    ids = np.full(shape, encode.padding, np.int64)
    segments = np.full(shape, -1, np.int64)
    image_index = np.full(shape, -1, np.int64)
    labels = np.full(shape, IGNORED, np.int64)
    positions = np.zeros((3, *shape), np.int64)
    points = np.full((*shape, 4), IGNORED, np.int64)
    matches = np.full((*shape, MOST_THINGS), IGNORED, np.int64)
    for row, sequence in enumerate(sequences):
        used = len(sequence.ids)
        ids[row, :used] = sequence.ids
        segments[row, :used] = sequence.segments
        image_index[row, :used] = sequence.image_index
        labels[row, :used] = sequence.labels
        points[row, :used] = sequence.points
        matches[row, :used] = sequence.matches
        positions[:, row, :used] = np.array(sequence.positions).T
    return {
        "ids": ids, "segments": segments, "image_index": image_index, "labels": labels,
        "positions": positions,
        "points": points, "matches": matches, "kinds": [sequence.kinds for sequence in sequences],
    }  # fmt: skip
