"""For which length of sequence the rotary factors of a request are chosen, in models that have several sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from sensorium.models.interface import TextShape


class RopeFields(NamedTuple):
    """``rope_border`` and ``rope_length`` of ``EngineRequest``."""

    border: int
    length: int


ONE_SET = RopeFields(0, 0)
"""Of models whose factors are the same for all lengths, and of requests that end within the short context."""


@dataclass(frozen=True, slots=True)
class RopeChoice:
    """Where a model's rotary factors change: beyond ``short_context`` tokens. ``grows``: with each further token."""

    short_context: int
    grows: bool

    @classmethod
    def of(cls, shape: TextShape) -> RopeChoice | None:
        """The choice that a decoder has, or None when it has none."""
        if shape.short_context is None:
            return None
        return cls(shape.short_context, shape.rope_grows)

    def fields(self, num_prompt: int, final_length: int, *, known: bool) -> RopeFields:
        """The choice for a prompt of ``num_prompt`` tokens that ends at ``final_length``.

        known: the request says how long it gets (``max_tokens``), so that one set serves from start to end. Where it
        does not, ``final_length`` is only the most that it may have: it begins with the factors of short sequences,
        and takes the others when it has grown beyond them, as the models' published code does.
        """
        if final_length <= self.short_context:
            return ONE_SET
        begins_short = not known and num_prompt <= self.short_context
        # Longrope has one set for all long sequences: these share what is cached.
        length = final_length if self.grows else self.short_context + 1
        return RopeFields(self.short_context if begins_short else 0, length)
