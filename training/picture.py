"""Types that the generator returns: image, questions with answers, and regions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from PIL import Image


class Turn(NamedTuple):
    """One question about an image with its true answer; ``kind`` groups the accuracy figures.

    ``points`` are the middles of up to two things that the question names (of bars, of their upper
    edges, and also of the bar that is the answer), in shares of width and height; ``counted`` those
    of the things that it counts, None when it counts nothing; ``track``, of a question about a
    video, where the thing is in each pair of frames: (pair, x, y). Auxiliary losses use them.
    """

    kind: str
    question: str
    answer: str
    points: tuple[tuple[float, float], ...] = ()
    counted: tuple[tuple[float, float], ...] | None = None
    track: tuple[tuple[int, float, float], ...] = ()


@dataclass(frozen=True)
class Region:
    """A box (left, top, right, bottom, in pixels) and what it holds, for the auxiliary loss."""

    box: tuple[float, float, float, float]
    shape: str | None = None
    colour: str | None = None
    glyph: str | None = None


@dataclass(frozen=True)
class Picture:
    """A drawn image, its turns in random order and its regions."""

    image: Image.Image
    turns: list[Turn]
    regions: list[Region] = field(default_factory=list)
