"""Random texts and images, reproducible by seed on every machine."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from sensorium.bounds import Bounds
from sensorium.config.fields import check_number
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
"""Pixels between two random colours of an image."""
MAX_SIDE = 16384

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomWorkload:
    """Random prompts of a fixed length.

    Attributes:
        input_len: number of words of a prompt.
        seed: determines all texts and images.
        prefix_len: number of words at the beginning that all prompts share; the first word after
            them differs, so that a prefix cache does not help further.
        num_images: images per prompt.
        image_size: width and height in pixels.
        distinct_images: number of images that prompts share in turn; 0 makes each one new.
    """

    input_len: int
    seed: int = 0
    prefix_len: int = 0
    num_images: int = 0
    image_size: tuple[int, int] = (640, 480)
    distinct_images: int = 0

    def __post_init__(self) -> None:
        """Check the values. Raises ConfigError."""
        check_number("input_len", self.input_len, Bounds(ge=1))
        check_number("num_images", self.num_images, Bounds(ge=0))
        check_number("distinct_images", self.distinct_images, Bounds(ge=0))
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
        """Return the text of prompt ``index``; most tokenizers encode each word as one token."""
        prefix = _words(self.prefix_len, self.seed, "prefix")
        own = _words(self.input_len - self.prefix_len, self.seed, index)
        return " ".join([*prefix, *own])

    def token_ids(self, index: int, encode: Encode) -> list[int]:
        """Return the first ``input_len`` token ids of prompt ``index``."""
        num_words, ids = self.input_len, list[int]()
        while len(ids) < self.input_len:
            prefix = _words(self.prefix_len, self.seed, "prefix")
            own = _words(num_words - self.prefix_len, self.seed, index)
            ids = encode(" ".join([*prefix, *own]))
            num_words *= 2
        return ids[: self.input_len]

    def images(self, index: int) -> list[Image.Image]:
        """Return the images of prompt ``index``."""
        first = index * self.num_images
        numbers = [
            number % self.distinct_images if self.distinct_images else number
            for number in range(first, first + self.num_images)
        ]
        return [random_image(f"{self.seed}/{number}", *self.image_size) for number in numbers]

    def content(self, index: int) -> str | list[dict[str, Any]]:
        """Return the content of a chat message: images as data: URLs, then the text."""
        text = self.text(index)
        if not self.num_images:
            return text
        urls = [data_url(image) for image in self.images(index)]
        parts: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": url}} for url in urls
        ]
        return [*parts, {"type": "text", "text": text}]


def random_image(seed: str, width: int, height: int) -> Image.Image:
    """Return an RGB image of smooth random colours."""
    generator = np.random.Generator(np.random.PCG64(list(seed.encode())))
    cells = (max(1, height // CELL), max(1, width // CELL), 3)
    colours = generator.integers(0, 256, cells, dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)


def data_url(image: Image.Image) -> str:
    """Return the data: URL of an image as JPEG."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _words(num_words: int, *seed: object) -> list[str]:
    return random.Random("/".join(map(str, seed))).choices(WORDS, k=num_words)
