"""Ranges of numbers: stated beside the fields they hold for, checked in one place.

Options, sampling parameters and model configurations use the same check, so that a wrong number
reads the same everywhere; help and documentation print the ranges that are checked.
"""

from __future__ import annotations

import dataclasses
import math
import reprlib
from dataclasses import dataclass
from typing import Any

NUMERIC = {"int": int, "int | None": int, "float": float, "float | None": float}
"""Annotations of fields that hold numbers, as they are written."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """A range of numbers: at least ``ge``, or above ``gt``; at most ``le``. None is no bound."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None

    def __str__(self) -> str:
        """Return the range as help and documentation show it, such as ``1 to 2^31``."""
        if self.ge is not None and self.le is not None:
            return f"{_short(self.ge)} to {_short(self.le)}"
        return ", ".join(f"{words} {_short(number)}" for words, number in self._sides())

    def problem(self, value: object, kind: type = float) -> str | None:
        """Return what is wrong with a number, None if nothing is.

        Args:
            value: the number; ``int`` counts as ``float``, ``bool`` is no number.
            kind: ``int`` or ``float``.

        Returns:
            Text that follows a name, such as "must be between 1 and 8, got 9".
        """
        if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
            return f"must be {'an integer' if kind is int else 'a number'}, got {abbreviate(value)}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"must be a finite number, got {value}"
        low = self.ge is None or value >= self.ge
        if low and (self.gt is None or value > self.gt) and (self.le is None or value <= self.le):
            return None
        if self.ge is not None and self.le is not None:
            return (
                f"must be between {_plain(self.ge)} and {_plain(self.le)}, got {abbreviate(value)}"
            )
        sides = " and ".join(f"{words} {_plain(number)}" for words, number in self._sides())
        return f"must be {sides}, got {abbreviate(value)}"

    def _sides(self) -> list[tuple[str, float]]:
        words = {"at least": self.ge, "above": self.gt, "at most": self.le}
        return [(word, number) for word, number in words.items() if number is not None]


UNBOUNDED = Bounds()


def bounded(
    default: Any, *, ge: float | None = None, gt: float | None = None, le: float | None = None
) -> Any:
    """Return a dataclass field for a number, which ``wrong_number`` holds to its range."""
    return dataclasses.field(default=default, metadata={"bounds": Bounds(ge=ge, gt=gt, le=le)})


def bounds_of(field: dataclasses.Field[Any]) -> Bounds:
    """Return the range of a field, ``UNBOUNDED`` if it has none."""
    bounds = field.metadata.get("bounds", UNBOUNDED)
    assert isinstance(bounds, Bounds)
    return bounds


def wrong_number(instance: Any) -> tuple[str, str] | None:
    """Return the first field of a dataclass whose number is wrong, and what is wrong with it.

    Only fields annotated as in ``NUMERIC`` are looked at; None is allowed where it says so.
    """
    for field in dataclasses.fields(instance):
        kind = NUMERIC.get(str(field.type))
        value = getattr(instance, field.name)
        if kind is None or (value is None and str(field.type).endswith("| None")):
            continue
        problem = bounds_of(field).problem(value, kind)
        if problem is not None:
            return field.name, problem
    return None


def abbreviate(value: object) -> str:
    """Return a value for an error message: what a caller sent may be of any size."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer of more digits than Python writes out
        return f"a very large {type(value).__name__}"


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def _short(number: float) -> str:
    """Write large powers of two, and numbers one below them, as such."""
    for offset, suffix in ((0, ""), (1, " - 1")):
        whole = abs(number) + offset
        if whole >= 1 << 20 and whole == int(whole) and int(whole).bit_count() == 1:
            sign = "-" if number < 0 else ""
            return f"{sign}2^{int(whole).bit_length() - 1}{suffix}"
    return _plain(number)
