"""The video generator: from a seed to a few frames in which one thing happens, with questions."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random

from PIL import Image, ImageDraw

from training.clip_wording import ask_clip
from training.palette import SHAPES, Colour, draw_background, draw_shape, usable_colours
from training.picture import Region, Turn
from training.wording import ABSENT, ask, with_article

#: Least and most pixels of a frame after resizing, for ``video_preprocessor_config.json``.
CLIP_MIN_PIXELS = 84 * 84
CLIP_MAX_PIXELS = 84 * 112
#: (rows, columns) of image tokens of two frames, with their share.
CLIP_GRIDS = {(3, 3): 0.45, (3, 4): 0.38, (4, 3): 0.07, (2, 4): 0.10}
#: Numbers of frames with their share.
NUM_FRAMES = {4: 0.35, 6: 0.25, 8: 0.4}
#: What happens, with its share.
EVENTS = {
    "moves": 0.42, "turns": 0.14, "appears": 0.12, "disappears": 0.1, "grows": 0.14, "still": 0.08,
}  # fmt: skip
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True)
class Actor:
    """One thing in one frame; ``x``, ``y`` and ``r`` (half its side) in pixels, r 0 for unseen."""

    shape: str
    colour: str
    x: float
    y: float
    r: float

    @property
    def name(self) -> str:
        """Colour and shape: ``red circle``."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Clip:
    """Frames of one size, the turns in random order, and what lies where in each frame."""

    frames: list[Image.Image]
    turns: list[Turn]
    regions: list[list[Region]]


def draw_clip(
    seed: int,
    event: str | None = None,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
) -> Clip:
    """Draw one video.

    Args:
        seed: any integer; it decides everything that the other arguments leave open.
        event: one of ``EVENTS``; by default drawn by their shares.
        size: (width, height) in pixels; by default one cell of 28 pixels per image token.
        frames: number of frames; by default drawn from ``NUM_FRAMES``.

    Raises:
        ValueError: ``event`` is unknown.
    """
    rng = Random(seed)
    event = event or rng.choices(list(EVENTS), list(EVENTS.values()))[0]
    if event not in EVENTS:
        raise ValueError(f"event must be one of {', '.join(EVENTS)}, not {event!r}")
    if size is None:
        rows, columns = rng.choices(list(CLIP_GRIDS), list(CLIP_GRIDS.values()))[0]
        size = (columns * 28, rows * 28)
    frames = frames or rng.choices(list(NUM_FRAMES), list(NUM_FRAMES.values()))[0]
    image, behind = draw_background(rng, size)
    colours = usable_colours(rng, behind)
    while True:
        scenes, turns = _SCENES[event](rng, size, frames, list(colours))
        if all(_apart(scene) for scene in scenes):
            break
    drawn = [_draw_frame(image, colours, scene) for scene in scenes]
    regions = [
        [Region((a.x - a.r * 0.8, a.y - a.r * 0.8, a.x + a.r * 0.8, a.y + a.r * 0.8),
                shape=a.shape, colour=a.colour) for a in scene if a.r]
        for scene in scenes
    ]  # fmt: skip
    # Only the first few fit into a training sequence.
    rng.shuffle(turns)
    return Clip(drawn, turns, regions)


def _draw_frame(image: Image.Image, colours: dict[str, Colour], scene: list[Actor]) -> Image.Image:
    frame = image.copy()
    draw = ImageDraw.Draw(frame)
    for actor in scene:
        if actor.r:
            draw_shape(draw, actor.shape, (actor.x, actor.y), actor.r, colours[actor.colour])
    return frame


def _apart(scene: list[Actor]) -> bool:
    """True if no two things of a frame touch."""
    seen = [a for a in scene if a.r]
    return all(
        math.hypot(a.x - b.x, a.y - b.y) > (a.r + b.r) * 1.08 + 1
        for i, a in enumerate(seen)
        for b in seen[:i]
    )


def _cast(rng: Random, size: tuple[int, int], colours: list[str], count: int) -> list[Actor]:
    """``count`` things in one frame, no two of one colour or of one shape."""
    unit = math.sqrt(size[0] * size[1])
    largest = min(0.2 * unit, 0.4 * min(size))
    actors = []
    for colour, shape in zip(rng.sample(colours, count), rng.sample(SHAPES, count), strict=True):
        r = rng.uniform(0.125 * unit, largest)
        x, y = rng.uniform(r + 1, size[0] - r - 1), rng.uniform(r + 1, size[1] - r - 1)
        actors.append(Actor(shape, colour, x, y, r))
    return actors


def _refer(rng: Random, actor: Actor) -> str:
    """Words that name a thing, all of whose shapes and colours differ."""
    kind = rng.choice(("object", "shape", "one", actor.shape))
    return "the " + rng.choice((actor.name, actor.shape, f"{actor.colour} {kind}"))


def _track(actors: list[Actor], size: tuple[int, int]) -> tuple[tuple[int, float, float], ...]:
    """Where a thing is in each pair of frames: (pair, x, y), in shares of width and height."""
    width, height = size
    found = []
    for number, start in enumerate(range(0, len(actors), 2)):
        pair = actors[start : start + 2]
        if any(actor.r for actor in pair):
            x, y = (
                sum(place) / len(pair) for place in zip(*((a.x, a.y) for a in pair), strict=True)
            )
            found.append((number, x / width, y / height))
    return tuple(found)


def _marked(turns: list[Turn], actors: list[Actor], size: tuple[int, int]) -> list[Turn]:
    """``turns`` about the thing that is ``actors[i]`` in frame i, with its places."""
    track = _track(actors, size)
    ends = tuple((x, y) for _, x, y in (track[0], track[-1]))
    return [turn._replace(points=ends, track=track) for turn in turns]


Scene = tuple[list[list[Actor]], list[Turn]]


def _moves(rng: Random, size: tuple[int, int], frames: int, colours: list[str]) -> Scene:
    cast = _cast(rng, size, colours, rng.choices((1, 2, 3), (4, 4, 2))[0])
    hero, direction = cast[0], rng.choice(list(STEPS))
    across, down = STEPS[direction]
    side = size[0] if across else size[1]
    room = side - 2 * hero.r - 2
    length = rng.uniform(min(0.3 * side, 0.8 * room), min(0.75 * side, room))
    start = rng.uniform(0, room - length) + hero.r + 1
    if across + down < 0:
        start += length
    drift = rng.uniform(-0.1, 0.1) * side
    path = []
    for i in range(frames):
        share = i / (frames - 1)
        along = start + (across + down) * length * share
        aside = (hero.y if across else hero.x) + drift * (share - 0.5)
        x, y = (along, aside) if across else (aside, along)
        path.append(replace(hero, x=x, y=y))
    name = _refer(rng, hero)
    turns = [
        Turn("motion_what", ask_clip(rng, "what_moves"), f"the {hero.name}"),
        Turn("motion_where", ask_clip(rng, "where_to", name), direction),
        Turn("happens", ask_clip(rng, "happens"), f"the {hero.name} moves {direction}"),
        Turn("motion_what", ask_clip(rng, "moving_colour"), hero.colour),
        Turn("motion_what", ask_clip(rng, "moving_shape"), hero.shape),
        Turn("motion_where", ask_clip(rng, "left_right" if across else "up_down", name), direction),
        Turn("motion_where", ask_clip(rng, "where_it_moves"), direction),
    ]
    turns = _marked(turns, path, size)
    if rng.random() < 0.4:
        turns.append(Turn("motion", ask_clip(rng, "anything_moves"), "yes"))
    other = rng.choice(cast)
    turns.append(Turn("motion", ask_clip(rng, "moves", _refer(rng, other)),
                      "yes" if other is hero else "no"))  # fmt: skip
    turns += _ask_still(rng, cast)
    return [[place, *cast[1:]] for place in path], turns


def _turns(rng: Random, size: tuple[int, int], frames: int, colours: list[str]) -> Scene:
    cast = _cast(rng, size, colours, rng.choices((1, 2, 3), (4, 4, 2))[0])
    hero = cast[0]
    new = rng.choice([c for c in colours if all(c != a.colour for a in cast)])
    when = rng.randint(2, frames - 2)
    path = [hero if i < when else replace(hero, colour=new) for i in range(frames)]
    what = f"the {hero.shape}"
    turns = [
        Turn("turn", ask_clip(rng, "end_colour", what), new),
        Turn("turn", ask_clip(rng, "start_colour", what), hero.colour),
        Turn("happens", ask_clip(rng, "happens"), f"{what} turns from {hero.colour} to {new}"),
    ]
    turns = _marked(turns, path, size)
    other = rng.choice(cast)
    answer = "yes" if other is hero else "no"
    turns.append(Turn("turn", ask_clip(rng, "turns", f"the {other.shape}"), answer))
    turns += _ask_motionless(rng)
    return [[place, *cast[1:]] for place in path], turns


def _comes(
    rng: Random, size: tuple[int, int], frames: int, colours: list[str], goes: bool
) -> Scene:
    cast = _cast(rng, size, colours, rng.choices((1, 2, 3), (3, 4, 3))[0])
    hero, key = cast[0], "disappears" if goes else "appears"
    when = rng.randint(2, frames - 2)
    path = [hero if (i < when) == goes else replace(hero, r=0.0) for i in range(frames)]
    name = with_article(hero.name)
    article = "the " + hero.name if goes else name
    turns = [
        Turn("appear", ask_clip(rng, key), article),
        Turn("happens", ask_clip(rng, "happens"), f"{article} {key}"),
    ]
    turns = _marked(turns, path, size)
    asked = rng.choice(("appear", "disappear"))
    turns.append(
        Turn("appear", ask_clip(rng, f"does_{asked}"), "yes" if asked + "s" == key else "no")
    )
    few, many = str(len(cast) - 1), str(len(cast))
    turns.append(Turn("clip_count", ask_clip(rng, "end_count"), few if goes else many))
    turns.append(Turn("clip_count", ask_clip(rng, "start_count"), many if goes else few))
    turns += _ask_motionless(rng)
    return [[place, *cast[1:]] for place in path], turns


def _appears(rng: Random, size: tuple[int, int], frames: int, colours: list[str]) -> Scene:
    return _comes(rng, size, frames, colours, goes=False)


def _disappears(rng: Random, size: tuple[int, int], frames: int, colours: list[str]) -> Scene:
    return _comes(rng, size, frames, colours, goes=True)


def _grows(rng: Random, size: tuple[int, int], frames: int, colours: list[str]) -> Scene:
    cast = _cast(rng, size, colours, rng.choices((1, 2), (6, 4))[0])
    unit = math.sqrt(size[0] * size[1])
    small = rng.uniform(0.09, 0.13) * unit
    large = min(small * rng.uniform(1.8, 3.0), 0.46 * min(size))
    x = rng.uniform(large + 1, size[0] - large - 1)
    y = rng.uniform(large + 1, size[1] - large - 1)
    grows = rng.random() < 0.5
    hero = replace(cast[0], x=x, y=y)
    first, last = (small, large) if grows else (large, small)
    path = [replace(hero, r=first + (last - first) * i / (frames - 1)) for i in range(frames)]
    verb = "grows" if grows else "shrinks"
    turns = [
        Turn("grow", ask_clip(rng, "grows", _refer(rng, hero)), verb),
        Turn("happens", ask_clip(rng, "happens"), f"the {hero.name} {verb}"),
    ]
    turns = _marked(turns, path, size) + _ask_motionless(rng) + _ask_still(rng, cast)
    return [[place, *cast[1:]] for place in path], turns


def _still(rng: Random, size: tuple[int, int], frames: int, colours: list[str]) -> Scene:
    cast = _cast(rng, size, colours, rng.choices((1, 2, 3), (3, 4, 3))[0])
    turns = [
        Turn("happens", ask_clip(rng, "happens"), "nothing"),
        Turn("motion", ask_clip(rng, "anything_moves"), "no"),
        Turn("motion_what", ask_clip(rng, "what_moves"), ABSENT),
        Turn("motion", ask_clip(rng, "moves", _refer(rng, rng.choice(cast))), "no"),
        *_ask_still(rng, cast),
    ]
    return [cast] * frames, turns


def _ask_motionless(rng: Random) -> list[Turn]:
    """Ask, sometimes, if something moves where nothing does."""
    options = [
        Turn("motion", ask_clip(rng, "anything_moves"), "no"),
        Turn("motion_what", ask_clip(rng, "what_moves"), ABSENT),
    ]
    return rng.sample(options, 1) if rng.random() < 0.35 else []


def _ask_still(rng: Random, cast: list[Actor]) -> list[Turn]:
    """Ask what could be asked about an image, too: number of things, shapes and colours."""
    actor = rng.choice(cast)
    shaped = f"the {actor.colour} {rng.choice(('object', 'shape'))}"
    options = [
        Turn("clip_count", ask_clip(rng, "steady_count"), str(len(cast))),
        Turn("clip_looks", ask(rng, "colour", f"the {actor.shape}"), actor.colour),
        Turn("clip_looks", ask(rng, "shape", shaped), actor.shape),
    ]
    return rng.sample(options, 1)


_SCENES: dict[str, Callable[[Random, tuple[int, int], int, list[str]], Scene]] = {
    "moves": _moves, "turns": _turns, "appears": _appears, "disappears": _disappears,
    "grows": _grows, "still": _still,
}  # fmt: skip
