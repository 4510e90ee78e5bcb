"""What all Python clients have in common: the models that they ask for, and the counting."""

from __future__ import annotations

import enum
import json
import sys
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

URL, MODEL, COUNT = sys.argv[1], sys.argv[2], int(sys.argv[3])
KEY = "none"
QUESTION = "What is in the picture?"
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]


class Colour(enum.Enum):
    """Some colours."""

    RED = "red"
    BLUE = "blue"


class Person(BaseModel):
    """A person."""

    model_config = ConfigDict(extra="forbid")

    name: str
    age: int = Field(ge=0, le=150)


class Shape(BaseModel):
    """A shape in a picture."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["circle", "square", "star"]
    colour: Colour
    size: float
    note: str | None = None


class Scene(BaseModel):
    """What is in a picture, in all the types that schemas are made of."""

    model_config = ConfigDict(extra="forbid")

    title: str = Field(description="a title")
    shapes: list[Shape]
    tags: set[str]
    colours: set[Colour]
    counts: dict[Literal["circle", "square"], int]
    notes: dict[str, str]
    raw: bytes
    matrix: list[list[int]]
    owner: Person | None = None


def count(case: str, ask: Callable[[int], Any]) -> None:
    """Ask ``COUNT`` times, and print how many answers were valid.

    ``ask`` raises for those that are not.
    """
    errors: list[str] = []
    for number in range(COUNT):
        try:
            assert ask(number), "no answer"
        except Exception as error:
            errors.append(f"{type(error).__name__}: {str(error)[:300]}")
    result = {"case": case, "valid": COUNT - len(errors), "of": COUNT, "errors": errors[:3]}
    print(json.dumps(result), flush=True)
