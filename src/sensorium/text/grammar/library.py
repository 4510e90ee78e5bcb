"""The grammar library, as all that make grammars use it.

Its limits, its messages, what comes of a constraint.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sensorium.errors import InvalidRequestError

_JSON_MARK = '"json_schema":{'
JSON_IN_TAGS = "// JSON in tags\n"
"""Beginning of a grammar of fixed text and JSON alone."""


@dataclass(frozen=True, slots=True)
class Grammar:
    """A constraint as text for the library.

    ``relaxed``: keywords of its JSON schemas that are not enforced. ``field``: the field of the
    constraint that has them.
    """

    text: str
    relaxed: tuple[str, ...] = ()
    field: str = "json"

    @property
    def warnings(self) -> tuple[str, ...]:
        """Return the warnings for the caller."""
        if not self.relaxed:
            return ()
        return (f"structured_outputs.{self.field}: not enforced: {', '.join(self.relaxed)}",)


def is_json(text: str) -> bool:
    """Return whether a grammar describes JSON, with nothing but fixed text around it."""
    return _JSON_MARK in text[:64] or text.startswith(JSON_IN_TAGS)


def problem_of(text: str) -> str | None:
    """Return the library's objection to a grammar, as far as it shows without a vocabulary.

    None for nothing.
    """
    from llguidance import LLMatcher

    problem = LLMatcher.validate_grammar(text, None, limits=limits())
    return None if not problem or problem.startswith("WARNING") else reason(problem)


def limits() -> Any:
    """Return the library's bounds on fuel, states and size.

    They are written down so that a new release cannot loosen them.
    """
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_items_in_row=2000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=50_000,
        max_grammar_size=500_000,
        verbose_errors=False,
    )


def reason(message: str) -> str:
    """Return the library's message without its internals (``<state>`` and the like)."""
    return str(message).partition("\n<")[0].strip()[:500]


def constraint_error(field: str, what: str) -> InvalidRequestError:
    """An error about a field of a constraint."""
    name = f"structured_outputs.{field}"
    return InvalidRequestError(f"{name} {what}.", param=name)


def check_chars(field: str, num_chars: int, limit: int) -> None:
    """Raise InvalidRequestError for a field that is too long."""
    if num_chars > limit:
        raise constraint_error(field, f"has {num_chars} characters; at most {limit} are allowed")
