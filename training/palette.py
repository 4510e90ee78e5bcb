"""Colours, backgrounds and shapes that the generated images are made of."""

from __future__ import annotations

import math
from random import Random

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
Point = tuple[float, float]

#: Every colour name with the values that it stands for; each use adds a little jitter.
COLOURS: dict[str, tuple[Colour, ...]] = {
    "red": ((255, 0, 0), (220, 20, 40), (200, 0, 0), (235, 40, 40)),
    "green": ((0, 128, 0), (0, 200, 0), (34, 139, 34), (0, 255, 0), (60, 180, 75)),
    "blue": ((0, 0, 255), (30, 60, 220), (30, 110, 240), (0, 0, 160)),
    "yellow": ((255, 255, 0), (250, 225, 20), (255, 215, 0)),
    "orange": ((255, 165, 0), (255, 140, 0), (245, 125, 20)),
    "purple": ((128, 0, 128), (120, 30, 180), (148, 0, 211)),
    "pink": ((255, 192, 203), (255, 105, 180), (250, 150, 190)),
    "brown": ((139, 69, 19), (120, 70, 30), (110, 55, 20)),
    "black": ((0, 0, 0), (25, 25, 25)),
    "white": ((255, 255, 255), (245, 245, 245)),
    "gray": ((128, 128, 128), (150, 150, 150), (110, 110, 110)),
    "cyan": ((0, 255, 255), (0, 210, 220), (40, 230, 230)),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross", "heart")

#: The smallest distance in RGB between a drawn thing and what is behind it.
MIN_CONTRAST = 105.0


def plural(shape: str) -> str:
    """The plural of a shape's name."""
    return shape + ("es" if shape == "cross" else "s")


def jittered(rng: Random, colour: Colour, amount: int = 10) -> Colour:
    """``colour`` with each channel moved by at most ``amount``."""
    red, green, blue = (min(255, max(0, c + rng.randint(-amount, amount))) for c in colour)
    return red, green, blue


def distance(a: Colour, b: Colour) -> float:
    """Euclidean distance of two colours in RGB, 0 to 441.7."""
    return math.dist(a, b)


def draw_background(rng: Random, size: tuple[int, int]) -> tuple[Image.Image, list[Colour]]:
    """Draw a background of ``size`` = (width, height); also return the colours found in it."""
    style = rng.random()
    if style < 0.36:
        return Image.new("RGB", size, "white"), [(255, 255, 255)]
    if style < 0.5:
        base = jittered(rng, (238, 238, 238), 17)
    elif style < 0.64:
        base = jittered(rng, (24, 24, 28), 24)
    else:
        base = (rng.randint(150, 255), rng.randint(150, 255), rng.randint(150, 255))
    if style < 0.8:
        return Image.new("RGB", size, base), [base]
    other = jittered(rng, base, 45)
    ramp = Image.linear_gradient("L")
    if rng.random() < 0.5:
        ramp = ramp.transpose(Image.Transpose.ROTATE_90)
    image = Image.composite(
        Image.new("RGB", size, base), Image.new("RGB", size, other), ramp.resize(size)
    )
    if style > 0.92:
        grain = np.random.default_rng(rng.getrandbits(32)).integers(
            70, 186, (size[1], size[0]), np.uint8
        )
        noise = Image.fromarray(grain).convert("RGB")
        image = Image.blend(image, noise, rng.uniform(0.05, 0.15))
    return image, [base, other]


def usable_colours(rng: Random, behind: list[Colour]) -> dict[str, Colour]:
    """One value for every colour name that stands out from all colours ``behind``, shuffled."""
    found = {}
    for name, values in COLOURS.items():
        value = jittered(rng, rng.choice(values))
        if all(distance(value, other) >= MIN_CONTRAST for other in behind):
            found[name] = value
    names = list(found)
    rng.shuffle(names)
    return {name: found[name] for name in names}


def _star(x: float, y: float, r: float) -> list[Point]:
    points = []
    for i in range(10):
        length = r if i % 2 == 0 else r * 0.42
        angle = math.pi * (i / 5 - 0.5)
        points.append((x + length * math.cos(angle), y + length * math.sin(angle)))
    return points


def _heart(x: float, y: float, r: float) -> list[Point]:
    points = []
    for i in range(28):
        t = 2 * math.pi * i / 28
        across = 16 * math.sin(t) ** 3
        up = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x + r * across / 17, y - r * (up + 2.5) / 17))
    return points


def _cross(x: float, y: float, r: float) -> list[Point]:
    a = r * 0.34
    return [
        (x - a, y - r), (x + a, y - r), (x + a, y - a), (x + r, y - a), (x + r, y + a),
        (x + a, y + a), (x + a, y + r), (x - a, y + r), (x - a, y + a), (x - r, y + a),
        (x - r, y - a), (x - a, y - a),
    ]  # fmt: skip


def outline_of(shape: str, x: float, y: float, r: float) -> list[Point]:
    """Corner points of ``shape`` in a box of half side ``r`` around (``x``, ``y``), in pixels.

    Raises:
        ValueError: ``shape`` is not in ``SHAPES`` or has no corners (the circle).
    """
    if shape == "square":
        a = r * 0.86
        return [(x - a, y - a), (x + a, y - a), (x + a, y + a), (x - a, y + a)]
    if shape == "triangle":
        return [(x, y - r * 0.95), (x + r, y + r * 0.8), (x - r, y + r * 0.8)]
    if shape == "diamond":
        return [(x, y - r), (x + r * 0.8, y), (x, y + r), (x - r * 0.8, y)]
    if shape == "star":
        return _star(x, y, r)
    if shape == "heart":
        return _heart(x, y, r)
    if shape == "cross":
        return _cross(x, y, r)
    raise ValueError(f"{shape!r} has no corners to draw")


def draw_shape(
    draw: ImageDraw.ImageDraw,
    shape: str,
    centre: Point,
    r: float,
    fill: Colour,
    outline: Colour | None = None,
    tilt: float = 0.0,
) -> None:
    """Draw one shape of half side ``r`` pixels; ``tilt`` turns it, in radians."""
    x, y = centre
    width = max(1, round(r * 0.1))
    if shape == "circle":
        a = r * 0.95
        draw.ellipse((x - a, y - a, x + a, y + a), fill=fill, outline=outline, width=width)
        return
    points = outline_of(shape, x, y, r)
    if tilt:
        c, s = math.cos(tilt), math.sin(tilt)
        points = [
            (x + (px - x) * c - (py - y) * s, y + (px - x) * s + (py - y) * c) for px, py in points
        ]
    draw.polygon(points, fill=fill, outline=outline, width=width)
