"""Images with zero to six coloured shapes, and questions about them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from PIL import ImageDraw

from training.palette import (
    SHAPES,
    Colour,
    distance,
    draw_background,
    draw_shape,
    plural,
    usable_colours,
)
from training.picture import Picture, Region, Turn
from training.wording import ABSENT, ask, join, with_article

#: Shares of images with 0, 1, ... 6 things.
OBJECTS = (1, 15, 42, 24, 8, 5, 5)
#: How much likelier a kind of question stands before others.
WEIGHTS = {"position": 5.0, "place": 2.5, "count": 3.0, "size": 2.0}


@dataclass(frozen=True)
class Thing:
    """One shape in an image; ``x``, ``y`` and ``r`` (half its side) in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    r: float

    @property
    def name(self) -> str:
        """Colour and shape: ``red circle``."""
        return f"{self.colour} {self.shape}"


def place_things(
    rng: Random, size: tuple[int, int], count: int
) -> list[tuple[float, float, float]]:
    """Centres and half sides of ``count`` shapes that do not touch; fewer if there is no room."""
    width, height = size
    unit = math.sqrt(width * height)
    largest = min(0.42 * min(size), unit * (0.4, 0.4, 0.27, 0.23, 0.2, 0.18, 0.165)[count])
    smallest = 0.085 * unit
    even = rng.uniform(smallest, largest) if rng.random() < 0.3 else 0.0
    placed: list[tuple[float, float, float]] = []
    for _ in range(count):
        r = even or rng.uniform(smallest, largest)
        for attempt in range(40):
            if attempt % 10 == 9:
                r = max(smallest, r * 0.85)
            x = rng.uniform(r + 2, width - r - 2)
            y = rng.uniform(r + 2, height - r - 2)
            if all(math.hypot(x - a, y - b) > (r + c) * 1.08 + 2 for a, b, c in placed):
                placed.append((x, y, r))
                break
    return placed


def _choose_looks(rng: Random, colours: list[str], count: int) -> list[tuple[str, str]]:
    """Colour and shape of ``count`` things; some images repeat one shape or one colour."""
    repeat = rng.random()
    shapes = list(SHAPES) if repeat > 0.35 else rng.sample(SHAPES, rng.randint(1, 3))
    few = colours if repeat < 0.2 or repeat > 0.5 else colours[: rng.randint(1, 3)]
    return [(rng.choice(few), rng.choice(shapes)) for _ in range(count)]


def draw_things(rng: Random, size: tuple[int, int]) -> Picture:
    """Draw an image of ``size`` = (width, height) with shapes and ask about it."""
    image, behind = draw_background(rng, size)
    colours: dict[str, Colour] = usable_colours(rng, behind)
    count = rng.choices(range(7), OBJECTS)[0]
    spots = place_things(rng, size, count)
    draw = ImageDraw.Draw(image)
    things = []
    for (x, y, r), (colour, shape) in zip(
        spots, _choose_looks(rng, list(colours), len(spots)), strict=True
    ):
        outlined = rng.random() < 0.1 and distance(colours[colour], (0, 0, 0)) > 100
        tilt = rng.uniform(-0.12, 0.12) if rng.random() < 0.4 else 0.0
        outline = (0, 0, 0) if outlined else None
        draw_shape(draw, shape, (x, y), r, colours[colour], outline, tilt)
        things.append(Thing(shape, colour, x, y, r))
    things.sort(key=lambda thing: thing.x)
    regions = [
        Region((t.x - t.r * 0.8, t.y - t.r * 0.8, t.x + t.r * 0.8, t.y + t.r * 0.8),
               shape=t.shape, colour=t.colour)
        for t in things
    ]  # fmt: skip
    return Picture(image, ask_things(rng, size, things, list(colours)), regions)


def refer(rng: Random, things: list[Thing], thing: Thing) -> str | None:
    """Words that name ``thing`` and nothing else in the image; None if there are none."""
    ways = []
    if sum(t.name == thing.name for t in things) == 1:
        ways.append(f"the {thing.name}")
    if sum(t.shape == thing.shape for t in things) == 1:
        ways.append(f"the {thing.shape}")
    if sum(t.colour == thing.colour for t in things) == 1:
        ways.append(f"the {thing.colour} {rng.choice(('object', 'shape', 'one', thing.shape))}")
    return rng.choice(ways) if ways else None


def ask_things(
    rng: Random, size: tuple[int, int], things: list[Thing], colours: list[str]
) -> list[Turn]:
    """Questions about shapes, in random order. ``colours`` are those that could be absent."""
    names = [with_article(thing.name) for thing in things]
    turns = [Turn("describe", ask(rng, "describe"), join(names) or "nothing")]
    turns += _ask_counts(rng, size, things, colours)
    turns += _ask_looks(rng, size, things, colours)
    turns += _ask_places(rng, size, things)
    if len(things) >= 2:
        turns += _ask_positions(rng, size, things)
        turns += _ask_sizes(rng, things)
    # Only the first few fit into a training sequence: what is hard to learn comes first more often.
    return sorted(turns, key=lambda turn: -(rng.random() ** (1 / WEIGHTS.get(turn.kind, 1.0))))


def _points(size: tuple[int, int], *things: Thing) -> tuple[tuple[float, float], ...]:
    """The middles of ``things`` in shares of width and height."""
    return tuple((thing.x / size[0], thing.y / size[1]) for thing in things)


def _ask_looks(
    rng: Random, size: tuple[int, int], things: list[Thing], colours: list[str]
) -> list[Turn]:
    turns = []
    for thing in rng.sample(things, min(3, len(things))):
        at = _points(size, thing)
        if len(things) == 1 and rng.random() < 0.5:
            turns.append(Turn("shape", ask(rng, "shape", "this"), thing.shape, at))
            question = ask(rng, "colour", f"the {thing.shape}")
            turns.append(Turn("colour", question, thing.colour, at))
            continue
        if sum(t.colour == thing.colour for t in things) == 1:
            what = f"the {thing.colour} {rng.choice(('object', 'shape', 'one', 'thing'))}"
            turns.append(Turn("shape", ask(rng, "shape", what), thing.shape, at))
        if sum(t.shape == thing.shape for t in things) == 1:
            question = ask(rng, "colour", f"the {thing.shape}")
            turns.append(Turn("colour", question, thing.colour, at))
    missing = [s for s in SHAPES if all(t.shape != s for t in things)]
    if missing and rng.random() < 0.3:
        turns.append(Turn("missing", ask(rng, "colour", f"the {rng.choice(missing)}"), ABSENT))
    unused = [c for c in colours if all(t.colour != c for t in things)]
    if unused and rng.random() < 0.15:
        turns.append(Turn("missing", ask(rng, "shape", f"the {rng.choice(unused)} object"), ABSENT))
    if rng.random() < 0.12:
        turns.append(Turn("missing", ask(rng, rng.choice(("word", "number"))), ABSENT))
    if things and rng.random() < 0.5:
        name = rng.choice(things).name
        turns.append(Turn("exists", ask(rng, "exists", rng.choice((name, name.split()[1]))), "yes"))
    if rng.random() < 0.5:
        turns.append(_ask_absent(rng, things, colours))
    return turns


def _ask_absent(rng: Random, things: list[Thing], colours: list[str]) -> Turn:
    """Ask for something that may be absent: preferably a wrong pairing of what is there."""
    if things and rng.random() < 0.6:
        colour = rng.choice(things).colour
        shape = rng.choice(things).shape
    else:
        colour, shape = rng.choice(colours), rng.choice(SHAPES)
    if rng.random() < 0.3:
        shape = rng.choice(SHAPES)
        there = any(t.shape == shape for t in things)
        return Turn("exists", ask(rng, "exists", shape), "yes" if there else "no")
    there = any((t.colour, t.shape) == (colour, shape) for t in things)
    return Turn("exists", ask(rng, "exists", f"{colour} {shape}"), "yes" if there else "no")


def _ask_counts(
    rng: Random, size: tuple[int, int], things: list[Thing], colours: list[str]
) -> list[Turn]:
    def count(what: str, counted: list[Thing]) -> Turn:
        middles = _points(size, *counted)
        return Turn("count", ask(rng, "count", what), str(len(counted)), counted=middles)

    turns = [count(rng.choice(("shapes", "objects", "things")), things)]
    shape = rng.choice(things).shape if things and rng.random() < 0.8 else rng.choice(SHAPES)
    turns.append(count(plural(shape), [t for t in things if t.shape == shape]))
    if rng.random() < 0.6:
        colour = rng.choice(things).colour if things and rng.random() < 0.8 else rng.choice(colours)
        what = f"{colour} {rng.choice(('shapes', 'objects'))}"
        turns.append(count(what, [t for t in things if t.colour == colour]))
    if things and rng.random() < 0.25:
        thing = rng.choice(things)
        what = f"{thing.colour} {plural(thing.shape)}"
        turns.append(count(what, [t for t in things if t.name == thing.name]))
    return turns


def _third(share: float, names: tuple[str, str]) -> str | None:
    """The first name for a share below 0.36, the second above 0.64, "" around 0.5, else None."""
    if share < 0.36:
        return names[0]
    if share > 0.64:
        return names[1]
    return "" if 0.42 < share < 0.58 else None


def _ask_places(rng: Random, size: tuple[int, int], things: list[Thing]) -> list[Turn]:
    """Where single things are in the image; nothing is asked near a border between answers."""
    turns = []
    for thing in rng.sample(things, min(2, len(things))):
        name = refer(rng, things, thing)
        if name is None:
            continue
        x, y = thing.x / size[0], thing.y / size[1]
        options = []
        if abs(x - 0.5) > 0.08:
            answer = "left" if x < 0.5 else "right"
            options.append(Turn("place", ask(rng, "half_across", name), answer))
        if abs(y - 0.5) > 0.08:
            answer = "top" if y < 0.5 else "bottom"
            options.append(Turn("place", ask(rng, "half_down", name), answer))
        across, down = _third(x, ("left", "right")), _third(y, ("top", "bottom"))
        if across is not None and down is not None:
            answer = f"{down} {across}".strip() or "center"
            options.append(Turn("place", ask(rng, "place", name), answer))
        if options:
            turns.append(rng.choice(options)._replace(points=_points(size, thing)))
    return turns


def _ask_positions(rng: Random, size: tuple[int, int], things: list[Thing]) -> list[Turn]:
    margin = 0.1 * math.sqrt(size[0] * size[1])
    turns = []
    for _ in range(3):
        a, b = rng.sample(things, 2)
        x, y = refer(rng, things, a), refer(rng, things, b)
        if x is None or y is None:
            continue
        dx, dy = a.x - b.x, a.y - b.y
        across, down = ("left" if dx < 0 else "right"), ("above" if dy < 0 else "below")
        options = []
        if abs(dx) > margin:
            options.append(Turn("position", ask(rng, "left_right", x, y), across))
            side = rng.choice(("left", "right"))
            answer = "yes" if side == across else "no"
            options.append(Turn("position", ask(rng, "is_" + side, x, y), answer))
        if abs(dy) > margin:
            question = ask(rng, "above_below", x, y)
            for pair in (("over", "under"), ("higher", "lower")):
                if pair[0] in question:
                    down = pair[dy > 0]
            options.append(Turn("position", question, down))
            side = rng.choice(("above", "below"))
            truth = "above" if dy < 0 else "below"
            answer = "yes" if side == truth else "no"
            options.append(Turn("position", ask(rng, "is_" + side, x, y), answer))
        if max(abs(dx), abs(dy)) > max(margin, 1.5 * min(abs(dx), abs(dy))):
            truth = across if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
            options.append(Turn("position", ask(rng, "where", x, y), truth))
        if options:
            turns.append(rng.choice(options)._replace(points=_points(size, a, b)))
    return turns


def _ask_sizes(rng: Random, things: list[Thing]) -> list[Turn]:
    turns = []
    by_size = sorted(things, key=lambda thing: thing.r)
    if by_size[-1].r > 1.3 * by_size[-2].r:
        turns.append(Turn("size", ask(rng, "biggest"), f"the {by_size[-1].name}"))
    if by_size[1].r > 1.3 * by_size[0].r:
        turns.append(Turn("size", ask(rng, "smallest"), f"the {by_size[0].name}"))
    for key, direction, sign in (
        ("x", "left", 1), ("x", "right", -1), ("y", "up", 1), ("y", "down", -1)
    ):  # fmt: skip
        if rng.random() > 0.25:
            continue
        first, second = sorted(things, key=lambda t: sign * getattr(t, key))[:2]
        if abs(getattr(first, key) - getattr(second, key)) > 0.8 * (first.r + second.r):
            words = {"left": "left", "right": "right", "up": "to the top", "down": "to the bottom"}
            words = {**words, "left": "to the left", "right": "to the right"}
            turns.append(Turn("most", ask(rng, "most", words[direction]), f"the {first.name}"))
    return turns
