"""Random texts and pictures: the same for the same seed, on every machine."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from sensorium.errors import ConfigError

VOCABULARY = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work number night "
    "point home water room mother area money story fact month lot right study book eye job word "
    "business issue side kind head house service friend father power hour game line end member law "
    "car city name team minute idea kid body back parent face level office door health person art "
    "war history party result change morning reason research girl guy food moment air teacher"
)
WORDS = VOCABULARY.split()
CELL = 16
"""Pixels between two random colours of a picture."""
MAX_SIDE = 16384

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomWorkload:
    """Prompts of ``input_len`` words with ``num_images`` pictures each.

    The first ``prefix_len`` words are the same in all prompts, the others differ from the first
    one on, so that no prefix cache helps with them. ``distinct_images``: pictures are taken in
    turn from that many; 0 makes every one new. ``image_size``: width and height in pixels.
    """

    input_len: int
    seed: int = 0
    prefix_len: int = 0
    num_images: int = 0
    image_size: tuple[int, int] = (640, 480)
    distinct_images: int = 0

    def __post_init__(self) -> None:
        _at_least("input_len", self.input_len, 1)
        _at_least("num_images", self.num_images, 0)
        _at_least("distinct_images", self.distinct_images, 0)
        if not 0 <= self.prefix_len < self.input_len:
            raise ConfigError(
                f"prefix_len must be from 0 to below input_len ({self.input_len}), "
                f"got {self.prefix_len}.",
                param="prefix_len",
            )
        if not all(1 <= side <= MAX_SIDE for side in self.image_size):
            raise ConfigError(
                f"image_size must be between 1x1 and {MAX_SIDE}x{MAX_SIDE}, got "
                f"{self.image_size[0]}x{self.image_size[1]}.",
                param="image_size",
            )

    def text(self, index: int) -> str:
        """The text of prompt ``index``, in words; most tokenizers make one token of each."""
        prefix = _words(self.prefix_len, self.seed, "prefix")
        own = _words(self.input_len - self.prefix_len, self.seed, index)
        return " ".join([*prefix, *own])

    def token_ids(self, index: int, encode: Encode) -> list[int]:
        """The first ``input_len`` token ids of prompt ``index``, whatever a word's length."""
        num_words, ids = self.input_len, list[int]()
        while len(ids) < self.input_len:
            prefix = _words(self.prefix_len, self.seed, "prefix")
            own = _words(num_words - self.prefix_len, self.seed, index)
            ids = encode(" ".join([*prefix, *own]))
            num_words *= 2
        return ids[: self.input_len]

    def pictures(self, index: int) -> list[Image.Image]:
        """The pictures of prompt ``index``."""
        first = index * self.num_images
        numbers = [
            number % self.distinct_images if self.distinct_images else number
            for number in range(first, first + self.num_images)
        ]
        return [picture(f"{self.seed}/{number}", *self.image_size) for number in numbers]

    def content(self, index: int) -> str | list[dict[str, Any]]:
        """The prompt as content of a chat message: pictures as data: URLs, then the text."""
        text = self.text(index)
        if not self.num_images:
            return text
        urls = [data_url(image) for image in self.pictures(index)]
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": url}} for url in urls
        ]
        return [*parts, {"type": "text", "text": text}]


def picture(seed: str, width: int, height: int) -> Image.Image:
    """An RGB picture of smooth random colours."""
    generator = np.random.Generator(np.random.PCG64(list(seed.encode())))
    cells = (max(1, height // CELL), max(1, width // CELL), 3)
    colours = generator.integers(0, 256, cells, dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


def data_url(image: Image.Image) -> str:
    """A picture as the data: URL of a JPEG file."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _words(num_words: int, *seed: object) -> list[str]:
    return random.Random("/".join(map(str, seed))).choices(WORDS, k=num_words)


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise ConfigError(f"{name} must be at least {low}, got {value}.", param=name)
