"""The many ways in which questions about videos are put."""

from __future__ import annotations

from random import Random

from training.wording import vary

CLIP_QUESTIONS: dict[str, tuple[str, ...]] = {
    "what_moves": (
        "Which object moves?", "What moves?", "Which object is moving?", "What is moving?",
        "Which shape moves?", "What moves in the video?", "Which thing is moving in the clip?",
    ),
    "where_to": (
        "Where does {x} move?", "In which direction does {x} move?", "Where does {x} go?",
        "In which direction is {x} moving?", "Which way does {x} move?",
        "What is the direction of {x}?",
    ),
    "where_it_moves": (
        "In which direction does it move?", "In which direction does the object move?",
        "Where does it move?", "Which way does it move?",
    ),
    "left_right": ("Does {x} move left or right?", "Is {x} moving left or right?"),
    "up_down": ("Does {x} move up or down?", "Is {x} moving up or down?"),
    "moves": ("Does {x} move?", "Is {x} moving?"),
    "anything_moves": (
        "Does anything move?", "Is there any motion?", "Does something move in the video?",
        "Is anything moving?",
    ),
    "moving_colour": (
        "What color is the moving object?",
        "Which color does the moving shape have?",
    ),
    "moving_shape": ("What shape is the moving object?", "Which shape is moving?"),
    "happens": (
        "What happens?", "What happens in the video?", "Describe the video.",
        "What happens in this clip?", "What changes?", "Describe the clip.", "What do you see?",
        "What is in the video?",
    ),
    "end_colour": (
        "What color is {x} at the end?", "Which color does {x} turn to?",
        "What color does {x} have at the end?",
    ),
    "start_colour": (
        "What color is {x} at the start?", "What color is {x} at first?",
        "What color does {x} have at the start?",
    ),
    "turns": ("Does {x} change its color?", "Does the color of {x} change?"),
    "appears": ("What appears?", "Which object appears?", "What appears in the video?"),
    "disappears": ("What disappears?", "Which object disappears?", "What disappears in the video?"),
    "does_appear": ("Does something appear?", "Does anything appear?"),
    "does_disappear": ("Does something disappear?", "Does anything disappear?"),
    "grows": (
        "Does {x} grow or shrink?", "Is {x} growing or shrinking?",
        "Does {x} get bigger or smaller?",
    ),
    "end_count": (
        "How many objects are there at the end?",
        "How many shapes are there at the end?",
    ),
    "start_count": (
        "How many objects are there at the start?", "How many shapes are there at first?",
    ),
    "steady_count": (
        "How many objects are there?", "How many shapes do you see?",
        "How many objects are in the video?",
    ),
}  # fmt: skip
CLIP_ANSWERS = ("moves turns from to appears disappears grows shrinks left right up down nothing",)


def ask_clip(rng: Random, key: str, x: str = "") -> str:
    """One phrasing of the question ``key`` about a video."""
    text = rng.choice(CLIP_QUESTIONS[key]).format(x=x)
    if rng.random() < 0.3:
        text = text.replace("color", "colour")
    return vary(rng, text)
