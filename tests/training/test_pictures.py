"""The generator is deterministic and its answers are true of what it drew."""

from __future__ import annotations

import re
from random import Random

import numpy as np
import pytest
from training.palette import COLOURS, MIN_CONTRAST, SHAPES, distance, plural
from training.picture import Picture, Region
from training.pictures import (
    GRIDS,
    MAX_PIXELS,
    MIN_PIXELS,
    SCENES,
    choose_size,
    draw_picture,
    small_talk,
    smart_size,
)
from training.words import WORDS

SEEDS = range(60)
LOOKS = "|".join((*SHAPES, *COLOURS))


def things_of(picture: Picture) -> list[Region]:
    return [region for region in picture.regions if region.shape in SHAPES]


def centre(region: Region) -> tuple[float, float]:
    left, top, right, bottom = region.box
    return (left + right) / 2, (top + bottom) / 2


def find(picture: Picture, words: str) -> Region:
    """The one thing that ``words``, such as "the red circle" or "the red one", name."""
    found = [
        region
        for region in things_of(picture)
        if all(
            word in (region.shape, region.colour, "the", "object", "shape", "one", "thing")
            for word in words.split()
        )
    ]
    assert len(found) == 1, f"{words!r} names {len(found)} things"
    return found[0]


@pytest.mark.parametrize("scene", SCENES)
def test_same_seed_gives_same_picture_and_turns(scene: str) -> None:
    for seed in range(10):
        first, second = draw_picture(seed, scene), draw_picture(seed, scene)
        assert first.image.tobytes() == second.image.tobytes()
        assert first.turns == second.turns
    assert draw_picture(1, scene).image.tobytes() != draw_picture(2, scene).image.tobytes()


def test_unknown_scene_is_refused() -> None:
    with pytest.raises(ValueError, match="shapes, text, chart"):
        draw_picture(0, "photo")


def test_given_size_is_kept() -> None:
    assert draw_picture(3, "shapes", (336, 200)).image.size == (336, 200)


def test_counts_are_true() -> None:
    asked = 0
    for seed in SEEDS:
        picture = draw_picture(seed, "shapes")
        things = things_of(picture)
        for kind, question, answer, *_ in picture.turns:
            if kind != "count":
                continue
            words = set(re.findall(r"[a-z]+", question.lower()))
            colours = [c for c in COLOURS if c in words]
            shapes = [s for s in SHAPES if plural(s) in words]
            truth = sum(
                t.colour in (colours or [t.colour]) and t.shape in (shapes or [t.shape])
                for t in things
            )
            assert answer == str(truth), (seed, question)
            asked += 1
    assert asked > 100


def test_shapes_and_colours_are_true() -> None:
    asked = 0
    for seed in SEEDS:
        picture = draw_picture(seed, "shapes")
        for kind, question, answer, *_ in picture.turns:
            plain = question.split(" Answer")[0].split(" Be ")[0]
            match = re.search(rf"(the (?:{LOOKS})\b.*?)(?: have)?[?.]?$", plain)
            if kind not in ("shape", "colour") or match is None:
                continue
            assert getattr(find(picture, match[1]), kind) == answer, (seed, question)
            asked += 1
    assert asked > 60


def test_positions_are_true() -> None:
    asked = 0
    for seed in SEEDS:
        picture = draw_picture(seed, "shapes")
        for kind, question, answer, *_ in picture.turns:
            match = re.match(
                r"[Ii]s (the .+?)(?: to the)? (left|right|above|below)(?: of)? (the .+?)\?",
                question,
            )
            if kind != "position" or match is None or " or " in question:
                continue
            (x, y), (a, b) = (centre(find(picture, words)) for words in match.group(1, 3))
            truth = {"left": x < a, "right": x > a, "above": y < b, "below": y > b}[match[2]]
            assert answer == ("yes" if truth else "no"), (seed, question)
            asked += 1
    assert asked > 8


def test_missing_things_are_missing() -> None:
    for seed in SEEDS:
        picture = draw_picture(seed, "shapes")
        there = {t.shape for t in things_of(picture)} | {t.colour for t in things_of(picture)}
        for kind, question, answer, *_ in picture.turns:
            if kind == "missing":
                assert answer == "none"
                assert not any(f"the {word}" in question for word in there), (seed, question)


def test_things_have_the_colour_that_is_said() -> None:
    for seed in SEEDS:
        picture = draw_picture(seed, "shapes")
        for thing in things_of(picture):
            if thing.shape == "star":
                continue
            x, y = centre(thing)
            pixel = picture.image.getpixel((round(x), round(y)))
            assert isinstance(pixel, tuple)
            nearest = min(distance(pixel[:3], value) for value in COLOURS[str(thing.colour)])
            assert nearest < 20, (seed, thing)


def test_lettering_is_readable_and_true() -> None:
    for seed in SEEDS:
        picture = draw_picture(seed, "text")
        text = "".join(region.glyph or "" for region in picture.regions)
        assert text
        pixels = np.asarray(picture.image.convert("RGB"), np.int16)
        for kind, question, answer, *_ in picture.turns:
            if kind in ("word", "spelling", "number"):
                assert answer == text
                assert text.isdigit() == (kind == "number")
                assert (text.lower() in WORDS) == (kind == "word")
            if kind == "letters":
                assert answer == str(len(text)), question
        letter = next(region for region in picture.regions if region.glyph)
        left, top, right, bottom = (max(0, round(edge)) for edge in letter.box)
        patch = pixels[top : bottom + 1, left : right + 1].reshape(-1, 3)
        assert np.ptp(patch, axis=0).max() > MIN_CONTRAST / 3, seed


def test_bars_are_true() -> None:
    for seed in SEEDS:
        picture = draw_picture(seed, "chart")
        heights = {r.colour: r.box[3] - r.box[1] for r in picture.regions}
        names = list(heights)
        width, height = picture.image.size
        tops = {
            ((r.box[0] + r.box[2]) / 2 / width, r.box[1] / height): r.colour
            for r in picture.regions
        }
        for kind, question, answer, points, counted, _ in picture.turns:
            assert all(point in tops for point in (*points, *(counted or ())))
            if kind == "bars":
                assert answer == str(len(heights)) == str(len(counted or ()))
            if kind == "bar_extreme":
                pick = max if re.search("tallest|highest|largest", question) else min
                truth = pick(names, key=lambda name: heights[name])
                assert answer in (truth, "ABCDE"[names.index(truth)]), (seed, question)
                assert [tops[point] for point in points] == [truth]
            if kind == "bar_compare":
                match = re.search(r"[Ii]s (?:the|bar) (\w+).* (?:the|bar) (\w+)", question)
                assert match is not None
                a, b = (heights[names["ABCDE".index(w)] if w in "ABCDE" else w]
                        for w in match.groups())  # fmt: skip
                more = re.search("taller|higher", question) is not None
                assert answer == ("yes" if (a > b) == more else "no"), (seed, question)


def test_sizes_fall_on_trained_grids() -> None:
    rng = Random(5)
    for rows, columns in GRIDS:
        for _ in range(20):
            assert smart_size(*choose_size(rng, (rows, columns))) == (columns * 28, rows * 28)
    for width, height in ((336, 336), (448, 448), (640, 480), (1920, 1080), (60, 60), (112, 112)):
        resized = smart_size(width, height)
        assert MIN_PIXELS <= resized[0] * resized[1] <= MAX_PIXELS
        assert (resized[1] // 28, resized[0] // 28) in GRIDS


def test_small_talk_is_deterministic() -> None:
    first = [small_talk(Random(seed)) for seed in range(30)]
    assert first == [small_talk(Random(seed)) for seed in range(30)]
    assert {turn.kind for turn in first} == {"small_talk"}
