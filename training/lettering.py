"""Images with a word or a number, some with a shape beside it, and questions about them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from random import Random

from PIL import ImageDraw, ImageFont

from training.palette import SHAPES, draw_background, draw_shape, usable_colours
from training.picture import Picture, Region, Turn
from training.tokenizer import picture_lexicon
from training.wording import ask, join, with_article
from training.words import WORDS

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

#: Families for training where the machine has them; Pillow's built-in font is always used too.
FAMILIES = ("DejaVu", "Liberation", "Free", "Roboto")
#: Families kept out of training, to measure reading of a font never seen.
HELD_OUT_FAMILIES = ("OpenSans",)
_UNFIT = ("Thin", "ExtraLight", "Light", "Math", "Black", "Hairline")
#: Sizes are rounded to these steps, so that few fonts are loaded.
_SIZE_STEP = 3


def _font_folders() -> Iterator[Path]:
    for folder in os.environ.get("DEMO_FONTS", "/usr/share/fonts:/usr/local/share/fonts").split(
        ":"
    ):
        if Path(folder).is_dir():
            yield Path(folder)


@lru_cache(maxsize=4)
def find_fonts(families: tuple[str, ...] = FAMILIES) -> tuple[str, ...]:
    """TrueType files of ``families`` on this machine, sorted by name; thin weights are left out."""
    found = {}
    for folder in _font_folders():
        for path in sorted(folder.rglob("*.ttf")):
            if path.stem.startswith(families) and not any(word in path.stem for word in _UNFIT):
                found.setdefault(path.stem, str(path))
    return tuple(found[name] for name in sorted(found))


@lru_cache(maxsize=3000)
def _open_font(path: str | None, size: int) -> Font:
    if path is None:
        return ImageFont.load_default(size)
    return ImageFont.truetype(path, size)


def load_font(rng: Random, size: int, families: tuple[str, ...] = FAMILIES) -> Font:
    """A random font of about ``size`` pixels; half of all draws are DejaVu or the built-in one."""
    size = max(6, round(size / _SIZE_STEP) * _SIZE_STEP)
    fonts = find_fonts(families)
    common = [path for path in fonts if "DejaVu" in path]
    choice = rng.random()
    if not fonts or (choice < 0.12 and families is FAMILIES):
        return _open_font(None, size)
    if choice < 0.6 and common:
        return _open_font(rng.choice(common), size)
    return _open_font(rng.choice(fonts), size)


@lru_cache(maxsize=1)
def _single_tokens() -> frozenset[str]:
    """Words that the tokenizer does not spell: they are only written in capitals."""
    return frozenset(picture_lexicon().words)


def choose_word(rng: Random) -> str:
    """A word of three to five letters from the list, or letters that are no word."""
    kind = rng.random()
    if kind < 0.7:
        word = rng.choice(WORDS)
    elif kind < 0.82:
        pair = ("bcdfghjklmnprstvwz", "aeiou")
        start = rng.randint(0, 1)
        word = "".join(rng.choice(pair[(start + i) % 2]) for i in range(rng.randint(3, 5)))
    else:
        letters = "abcdefghijklmnopqrstuvwxyz"
        word = "".join(rng.choice(letters) for _ in range(rng.choice((1, 2, 3, 3, 4, 4, 5, 5))))
    style = rng.random()
    if style < 0.68 or word in _single_tokens() or word.capitalize() in _single_tokens():
        return word.upper()
    # A lower-case l and an upper-case I look the same in many fonts: keep l out of single letters.
    return word if style < 0.92 or len(word) < 3 else word.capitalize()


def fit_font(
    rng: Random, text: str, room: tuple[float, float], families: tuple[str, ...]
) -> tuple[Font, tuple[float, float, float, float]]:
    """A font in which ``text`` fills a good part of ``room`` = (width, height), and its box."""
    probe = rng.random()
    state = Random(probe)
    size = 60.0
    font = load_font(state, 60, families)
    left, top, right, bottom = font.getbbox(text)
    fill = rng.uniform(0.62, 1.0)
    scale = min(room[0] / (right - left), room[1] * 0.95 / (bottom - top), room[1] / 60 * 0.95)
    size = size * scale * fill
    font = load_font(Random(probe), int(size), families)
    return font, font.getbbox(text)


def draw_lettering(
    rng: Random, size: tuple[int, int], families: tuple[str, ...] = FAMILIES
) -> Picture:
    """Draw a word or number in an image of ``size`` = (width, height) and ask about it."""
    width, height = size
    image, behind = draw_background(rng, size)
    draw = ImageDraw.Draw(image)
    colours = usable_colours(rng, behind)
    names = list(colours)
    ink = rng.choice(names)
    if rng.random() < 0.5:
        ink = "black" if "black" in colours else "white" if "white" in colours else ink
    is_number = rng.random() < 0.32
    if is_number:
        text = "".join(rng.choice("0123456789") for _ in range(rng.choice((1, 1, 2, 2, 3, 3, 4))))
    else:
        text = choose_word(rng)
    beside = rng.random() < 0.22 and height > 0.6 * width
    room = (width * 0.92, height * (0.5 if beside else 0.8))
    font, (left, top, right, bottom) = fit_font(rng, text, room, families)
    over = beside and rng.random() < 0.5
    low, high = (height * 0.48, height) if over else (0.0, height * (0.52 if beside else 1.0))
    x = rng.uniform(1, max(1.0, width - (right - left) - 1)) - left
    y = rng.uniform(low + 1, max(low + 1, high - (bottom - top) - 1)) - top
    draw.text((x, y), text, fill=colours[ink], font=font)
    regions = []
    for i, character in enumerate(text):
        start = x + font.getlength(text[:i])
        end = x + font.getlength(text[: i + 1])
        regions.append(Region((start, y + top, end, y + bottom), colour=ink, glyph=character))
    thing = None
    if beside:
        r = rng.uniform(0.12, 0.2) * height
        colour, shape = rng.choice(names), rng.choice(SHAPES)
        centre = (rng.uniform(r + 2, width - r - 2), height * (0.25 if over else 0.77))
        draw_shape(draw, shape, centre, r, colours[colour])
        a = r * 0.8
        box = (centre[0] - a, centre[1] - a, centre[0] + a, centre[1] + a)
        regions.append(Region(box, shape=shape, colour=colour))
        thing = (colour, shape)
    return Picture(image, ask_lettering(rng, text, ink, thing), regions)


def ask_lettering(rng: Random, text: str, ink: str, thing: tuple[str, str] | None) -> list[Turn]:
    """Questions about ``text`` in the colour ``ink``, and about the (colour, shape) beside it.

    Reading a word of the list is of the kind ``word``, other letters are ``spelling``.
    """
    is_number = text.isdigit()
    key = "number" if is_number else "word"
    kind = "spelling" if key == "word" and text.lower() not in WORDS else key
    parts = [f"the {key} {text}"]
    turns = [Turn(kind, ask(rng, key), text) for _ in range(2)]
    turns.append(Turn("text_colour", ask(rng, "text_colour"), ink))
    count = "digits" if is_number else "letters"
    if rng.random() < 0.3:
        turns.append(Turn("letters", ask(rng, count), str(len(text))))
    if thing is not None:
        colour, shape = thing
        parts.append(with_article(f"{colour} {shape}"))
        turns.append(Turn("shape", ask(rng, "shape", f"the {colour} object"), shape))
        turns.append(Turn("colour", ask(rng, "colour", f"the {shape}"), colour))
    turns.append(Turn("describe", ask(rng, "describe"), join(parts)))
    rng.shuffle(turns)
    return turns
