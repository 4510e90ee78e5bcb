"""The many ways in which a question is put, and how descriptions are joined."""

from __future__ import annotations

from random import Random

#: What the model says of something that is not in the image.
ABSENT = "none"

QUESTIONS: dict[str, tuple[str, ...]] = {
    "shape": (
        "What shape is {x}?", "Which shape is {x}?", "What is the shape of {x}?",
        "Name the shape of {x}.", "Tell me the shape of {x}.",
    ),
    "colour": (
        "What color is {x}?", "Which color is {x}?", "What is the color of {x}?",
        "What color does {x} have?", "Name the color of {x}.", "Tell me the color of {x}.",
    ),
    "count": (
        "How many {x} are there?", "How many {x} are in the picture?", "How many {x} do you see?",
        "Count the {x}.", "How many {x} can you see in the image?", "How many {x}?",
        "What is the number of {x}?",
    ),
    "exists": (
        "Is there a {x}?", "Is there a {x} in the picture?", "Do you see a {x}?",
        "Can you see a {x} in the image?", "Does the picture show a {x}?",
    ),
    "left_right": (
        "Is {x} left or right of {y}?", "Is {x} to the left or to the right of {y}?",
        "On which side of {y} is {x}, left or right?", "Is {x} on the left or right side of {y}?",
    ),
    "above_below": (
        "Is {x} above or below {y}?", "Is {x} over or under {y}?",
        "Is {x} higher or lower than {y}?",
    ),
    "where": (
        "Where is {x} relative to {y}?", "Where is {x} compared to {y}?",
        "Where is {x}, seen from {y}?", "In which direction from {y} is {x}?",
    ),
    "half_across": (
        "Is {x} in the left or the right half?", "Is {x} on the left or on the right?",
        "On which side is {x}, left or right?",
    ),
    "half_down": (
        "Is {x} in the top or the bottom half?", "Is {x} at the top or at the bottom?",
    ),
    "place": ("Where is {x}?", "Where in the picture is {x}?", "Where is {x} in the image?"),
    "is_left": ("Is {x} left of {y}?", "Is {x} to the left of {y}?"),
    "is_right": ("Is {x} right of {y}?", "Is {x} to the right of {y}?"),
    "is_above": ("Is {x} above {y}?", "Is {x} higher than {y}?"),
    "is_below": ("Is {x} below {y}?", "Is {x} lower than {y}?", "Is {x} under {y}?"),
    "biggest": (
        "Which object is the biggest?", "What is the biggest object?", "What is the largest shape?",
        "Which shape is the largest?", "Name the biggest shape.",
    ),
    "smallest": (
        "Which object is the smallest?", "What is the smallest object?",
        "What is the smallest shape?", "Which shape is the smallest?", "Name the smallest shape.",
    ),
    "most": (
        "Which shape is furthest {x}?", "What is the object furthest {x}?",
        "Which object is the furthest {x}?",
    ),
    "describe": (
        "What is in the picture?", "What do you see?", "Describe the picture.",
        "What is in this image?", "Describe this image.", "What's in this image?",
        "What can you see in the picture?", "What does the picture show?", "List all objects.",
    ),
    "word": (
        "What does it say?", "What word is written?", "Read the text.", "What is written here?",
        "Which word do you see?", "What is the word?", "What does the text say?",
        "What text is in the picture?", "Read the word in the image.",
    ),
    "number": (
        "What number is shown?", "Which number do you see?", "What is the number?",
        "Read the number.", "What number is in the picture?", "What does the number say?",
        "What is written here?", "Read the text.", "What digits are shown?",
    ),
    "text_colour": (
        "What color is the text?", "What is the color of the text?", "Which color is the text?",
        "In what color is it written?", "What color does the text have?",
    ),
    "letters": (
        "How many letters are there?", "How many letters does the word have?",
        "Count the letters.",
    ),
    "digits": (
        "How many digits are there?", "How many digits does the number have?", "Count the digits.",
    ),
    "bars": (
        "How many bars are there?", "How many bars does the chart have?", "Count the bars.",
        "How many bars do you see?", "How many bars are in the chart?",
    ),
    "tallest": (
        "Which bar is the tallest?", "What is the tallest bar?", "Which bar is the highest?",
        "Which bar has the largest value?", "Name the tallest bar.",
    ),
    "shortest": (
        "Which bar is the shortest?", "What is the shortest bar?", "Which bar is the lowest?",
        "Which bar has the smallest value?", "Name the shortest bar.",
    ),
    "tallest_colour": ("What color is the tallest bar?", "What is the color of the tallest bar?"),
    "shortest_colour": (
        "What color is the shortest bar?", "What is the color of the shortest bar?",
    ),
    "taller": ("Is {x} taller than {y}?", "Is {x} higher than {y}?"),
    "shorter": ("Is {x} shorter than {y}?", "Is {x} lower than {y}?"),
}  # fmt: skip

GREETING = "Hello! Show me a picture and ask about shapes, colors, numbers, words or bars."
IDENTITY = "I am a small demo model. I answer questions about simple pictures."
NO_PICTURE = "I see no picture. Please send one."
SmallTalk = tuple[tuple[tuple[str, ...], str], ...]


def small_talk_of(greeting: str, identity: str) -> SmallTalk:
    """What people say without asking about anything, and the answers."""
    return (
        (
            ("hello", "Hello!", "hi", "Hi there", "Hey", "Hello there!", "Good morning", "hi!",
             "Say hello.", "Hello, how are you?", "How are you?", "What can you do?", "Help",
             "How can you help me?", "What can I ask you?"),
            greeting,
        ),
        (
            ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.",
             "What model are you?", "Which model is this?"),
            identity,
        ),
        (("Thank you!", "Thanks", "thank you", "Thanks a lot!"), "You are welcome!"),
        (("Bye", "Goodbye!", "See you"), "Goodbye!"),
    )  # fmt: skip


SMALL_TALK = small_talk_of(GREETING, IDENTITY)


def ask(rng: Random, key: str, x: str = "", y: str = "") -> str:
    """One phrasing of the question ``key``, now and then in lower case or without its mark."""
    text = rng.choice(QUESTIONS[key]).format(x=x, y=y)
    if rng.random() < 0.3:
        text = text.replace("color", "colour")
    return vary(rng, text)


def vary(rng: Random, text: str) -> str:
    """``text``, now and then in lower case, without its mark or with a request to be brief."""
    if rng.random() < 0.2:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.12:
        text = text[:-1]
    elif rng.random() < 0.04:
        text += rng.choice((" Answer in one word.", " Answer briefly.", " Be brief."))
    return text


def join(parts: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    if len(parts) < 2:
        return "".join(parts)
    return ", ".join(parts[:-1]) + " and " + parts[-1]


def with_article(noun: str) -> str:
    """``a red circle``, ``an orange star``."""
    return ("an " if noun[0] in "aeio" else "a ") + noun
