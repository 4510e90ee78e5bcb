"""The image generator: from a seed to an image with questions and true answers.

Needs Pillow and NumPy only. The same seed gives the same image, as long as the machine has the
same fonts.
"""

from __future__ import annotations

import math
from random import Random

from training.charts import draw_chart
from training.lettering import FAMILIES, draw_lettering
from training.picture import Picture, Region, Turn
from training.shapes import draw_things
from training.wording import NO_PICTURE, SMALL_TALK, ask

__all__ = [
    "GRIDS", "MAX_PIXELS", "MIN_PIXELS", "SCENES", "Picture", "Region", "Turn", "choose_grid",
    "choose_size", "draw_picture", "small_talk", "smart_size",
]  # fmt: skip

#: Side of the square of pixels that becomes one image token: patch of 14, merged 2 by 2.
CELL = 28
MIN_PIXELS = 112 * 112
MAX_PIXELS = 140 * 140
#: Kinds of images with their share.
SCENES = {"shapes": 0.56, "text": 0.32, "chart": 0.12}
#: (rows, columns) of image tokens with their share: all that the two limits above let through
#: of images up to 2:1, and a wide one for text.
GRIDS = {
    (5, 5): 0.42, (4, 6): 0.18, (4, 5): 0.13, (4, 4): 0.09, (6, 4): 0.05, (5, 4): 0.05,
    (3, 6): 0.03, (3, 7): 0.03, (2, 8): 0.02,
}  # fmt: skip


def smart_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) to which the image processor of the demo model resizes an image.

    The rule of ``Qwen2VLImageProcessor``: both sides multiples of 28, the area between
    ``MIN_PIXELS`` and ``MAX_PIXELS``, the ratio of the sides nearly kept.
    """
    rows, columns = round(height / CELL) * CELL, round(width / CELL) * CELL
    if rows * columns > MAX_PIXELS:
        beta = math.sqrt(height * width / MAX_PIXELS)
        rows = max(CELL, math.floor(height / beta / CELL) * CELL)
        columns = max(CELL, math.floor(width / beta / CELL) * CELL)
    elif rows * columns < MIN_PIXELS:
        beta = math.sqrt(MIN_PIXELS / (height * width))
        rows = math.ceil(height * beta / CELL) * CELL
        columns = math.ceil(width * beta / CELL) * CELL
    return columns, rows


def choose_grid(rng: Random) -> tuple[int, int]:
    """A grid (rows, columns) of image tokens, drawn by the shares of ``GRIDS``."""
    return rng.choices(list(GRIDS), list(GRIDS.values()))[0]


def choose_size(rng: Random, grid: tuple[int, int]) -> tuple[int, int]:
    """A size (width, height) of an image that the processor resizes to ``grid``."""
    rows, columns = grid
    for _ in range(30):
        scale = rng.uniform(1.0, 2.6)
        width = round(columns * CELL * scale * rng.uniform(0.9, 1.1))
        height = round(rows * CELL * scale * rng.uniform(0.9, 1.1))
        if smart_size(width, height) == (columns * CELL, rows * CELL):
            return width, height
    return columns * CELL, rows * CELL


def draw_picture(
    seed: int,
    scene: str | None = None,
    size: tuple[int, int] | None = None,
    families: tuple[str, ...] = FAMILIES,
) -> Picture:
    """Draw one image.

    Args:
        seed: any integer; it decides everything that the other arguments leave open.
        scene: ``shapes``, ``text`` or ``chart``; by default drawn by the shares of ``SCENES``.
        size: (width, height) in pixels; by default one that the model was trained on.
        families: beginnings of the names of the font files to use.

    Raises:
        ValueError: ``scene`` is unknown.
    """
    rng = Random(seed)
    scene = scene or rng.choices(list(SCENES), list(SCENES.values()))[0]
    if size is None:
        grid = choose_grid(rng)
        while grid[0] == 2 and scene != "text":
            grid = choose_grid(rng)
        size = choose_size(rng, grid)
    if scene == "shapes":
        return draw_things(rng, size)
    if scene == "text":
        return draw_lettering(rng, size, families)
    if scene == "chart":
        return draw_chart(rng, size)
    raise ValueError(f"scene must be one of {', '.join(SCENES)}, not {scene!r}")


def small_talk(rng: Random) -> Turn:
    """A question without an image and the fixed answer to it."""
    if rng.random() < 0.4:
        key = rng.choice(("describe", "word", "number", "text_colour", "bars", "tallest"))
        return Turn("small_talk", ask(rng, key), NO_PICTURE)
    questions, answer = rng.choice(SMALL_TALK)
    return Turn("small_talk", rng.choice(questions), answer)
