"""Bar charts with two to five bars, and questions about them."""

from __future__ import annotations

from itertools import pairwise
from random import Random

from PIL import ImageDraw

from training.lettering import load_font
from training.palette import Colour, distance, draw_background, usable_colours
from training.picture import Picture, Region, Turn
from training.wording import ask, join


def choose_heights(rng: Random, count: int) -> list[float]:
    """Heights between 0.12 and 1, no two closer than 0.09."""
    while True:
        heights = [rng.uniform(0.12, 1.0) for _ in range(count)]
        ordered = sorted(heights)
        if all(b - a >= 0.09 for a, b in pairwise(ordered)):
            return heights


def draw_chart(rng: Random, size: tuple[int, int]) -> Picture:
    """Draw a bar chart of ``size`` = (width, height) and ask about it."""
    width, height = size
    image, behind = draw_background(rng, size)
    draw = ImageDraw.Draw(image)
    ink: Colour = (0, 0, 0) if all(distance(c, (0, 0, 0)) > 200 for c in behind) else (255,) * 3
    count = rng.randint(2, 5)
    heights = choose_heights(rng, count)
    colours = usable_colours(rng, behind)
    names = list(colours)[:count]
    labelled = rng.random() < 0.5
    foot = height * (0.86 if labelled else rng.uniform(0.88, 0.97))
    left, right = width * rng.uniform(0.04, 0.12), width * rng.uniform(0.9, 0.97)
    top = height * rng.uniform(0.04, 0.2)
    step = (right - left) / count
    thick = step * rng.uniform(0.5, 0.85)
    regions = []
    font = load_font(rng, round(height * 0.12)) if labelled else None
    for i, (name, value) in enumerate(zip(names, heights, strict=True)):
        x = left + step * (i + 0.5)
        box = (x - thick / 2, foot - (foot - top) * value, x + thick / 2, foot)
        draw.rectangle(box, fill=colours[name])
        regions.append(Region(box, shape="bar", colour=name))
        if font is not None:
            draw.text((x, height * 0.93), "ABCDE"[i], fill=ink, font=font, anchor="mm")
    line = max(1, round(height * 0.008))
    draw.line((left * 0.6, foot, right, foot), fill=ink, width=line)
    if rng.random() < 0.6:
        draw.line((left * 0.6, top * 0.7, left * 0.6, foot), fill=ink, width=line)
    boxes = [region.box for region in regions]
    tops = [((box[0] + box[2]) / 2 / width, box[1] / height) for box in boxes]
    return Picture(image, ask_chart(rng, names, heights, labelled, tops), regions)


def ask_chart(
    rng: Random,
    names: list[str],
    heights: list[float],
    labelled: bool,
    tops: list[tuple[float, float]],
) -> list[Turn]:
    """Questions about bars of the colours ``names``; labelled bars are called A, B, C, ...

    ``tops`` are the (x, y) of the middles of their upper edges, in shares of width and height.
    """
    count = len(names)
    called = list("ABCDE"[:count]) if labelled else names
    tallest, shortest = heights.index(max(heights)), heights.index(min(heights))
    bars = [f"a {name} bar" if name != "orange" else "an orange bar" for name in names]
    turns = [
        Turn("bars", ask(rng, "bars"), str(count), counted=tuple(tops)),
        Turn("bar_extreme", ask(rng, "tallest"), called[tallest], (tops[tallest],)),
        Turn("bar_extreme", ask(rng, "shortest"), called[shortest], (tops[shortest],)),
        Turn("bar_extreme", ask(rng, "tallest_colour"), names[tallest], (tops[tallest],)),
        Turn("bar_extreme", ask(rng, "shortest_colour"), names[shortest], (tops[shortest],)),
        Turn("describe", ask(rng, "describe"), "a bar chart with " + join(bars)),
    ]
    for key in ("taller", "shorter"):
        a, b = rng.sample(range(count), 2)
        use = called if rng.random() < 0.5 else names
        x, y = (f"bar {use[i]}" if use[i] in "ABCDE" else f"the {use[i]} bar" for i in (a, b))
        answer = "yes" if (heights[a] > heights[b]) == (key == "taller") else "no"
        turns.append(Turn("bar_compare", ask(rng, key, x, y), answer, (tops[a], tops[b])))
    rng.shuffle(turns)
    return turns
