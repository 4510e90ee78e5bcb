"""Ranges of numbers: how they read, and what is outside of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from sensorium.bounds import Bounds, bounded, wrong_number

ONE_TO_EIGHT = Bounds(ge=1, le=8)


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        (ONE_TO_EIGHT, "1 to 8"),
        (Bounds(ge=0.0, le=1.0), "0 to 1"),
        (Bounds(ge=-(1 << 63), le=(1 << 64) - 1), "-2^63 to 2^64 - 1"),
        (Bounds(gt=0.0, le=1.0), "above 0, at most 1"),
        (Bounds(ge=1), "at least 1"),
        (Bounds(), ""),
    ],
    ids=str,
)
def test_a_range_as_text(bounds: Bounds, text: str) -> None:
    assert str(bounds) == text


@pytest.mark.parametrize(
    ("bounds", "kind", "value", "problem"),
    [
        (ONE_TO_EIGHT, int, 9, "must be between 1 and 8, got 9"),
        (ONE_TO_EIGHT, int, 2.0, "must be an integer, got 2.0"),
        (ONE_TO_EIGHT, int, True, "must be an integer, got True"),
        (ONE_TO_EIGHT, float, "2", "must be a number, got '2'"),
        (ONE_TO_EIGHT, float, math.nan, "must be a finite number, got nan"),
        (Bounds(gt=0.0, le=1.0), float, 0, "must be above 0 and at most 1, got 0"),
        (Bounds(ge=1), float, 0.5, "must be at least 1, got 0.5"),
        (ONE_TO_EIGHT, int, 8, None),
        (ONE_TO_EIGHT, float, 1, None),
        (Bounds(), float, -1e300, None),
    ],
)
def test_a_wrong_number_is_named(
    bounds: Bounds, kind: type, value: object, problem: str | None
) -> None:
    assert bounds.problem(value, kind) == problem


def test_a_number_too_long_to_write_is_named() -> None:
    assert Bounds(le=1).problem(10**5000, int) == "must be at most 1, got a very large int"


@dataclass
class Example:
    count: int = bounded(1, ge=1)
    share: float | None = bounded(None, ge=0.0, le=1.0)
    name: str = "x"


def test_the_first_wrong_field() -> None:
    assert wrong_number(Example()) is None
    assert wrong_number(Example(share=1)) is None
    assert wrong_number(Example(share=2)) == ("share", "must be between 0 and 1, got 2")
    assert wrong_number(Example(count=None, share=2)) == (  # type: ignore[arg-type]
        "count",
        "must be an integer, got None",
    )
