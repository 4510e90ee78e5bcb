"""Regular expressions of JSON schemas (JavaScript's) for the grammar library."""

from __future__ import annotations

import re

_AROUND = ("(?=", "(?!", "(?<=", "(?<!")
_BOUNDARIES = ("\\b", "\\B")
_UNREADABLE = ("regex parse error", "lookarounds not supported")
_GROUP_NAME, _NAME_AGAIN = re.compile(r"\(\?<(?=[A-Za-z_])"), re.compile(r"\\k<(\w+)>")


def plain_pattern(pattern: str) -> str | None:
    """A pattern without what the library cannot express, which then matches more.

    None when nothing is left of it.

    One that the library cannot read and that is no regular expression for Python either is returned
    as it is: the library says what is wrong with it.
    """
    if _is_usable(pattern):
        return pattern
    stripped = _without_assertions(pattern)
    if stripped != pattern and _is_usable(stripped):
        return stripped or None
    try:
        re.compile(_NAME_AGAIN.sub(r"(?P=\1)", _GROUP_NAME.sub("(?P<", pattern)))
    except (re.error, OverflowError, RecursionError):
        if stripped == pattern:
            return pattern
    return None


def pattern_of_lengths(low: object, high: object) -> str | None:
    """A pattern of texts with at least ``low`` and at most ``high`` characters.

    None without usable bounds.
    """
    least = int(low) if isinstance(low, int | float) else 0
    most = str(int(high)) if isinstance(high, int | float) else ""
    if least <= 0 and not most:
        return None
    return f"^[\\s\\S]{{{least},{most}}}$"


def _is_usable(pattern: str) -> bool:
    """Return whether the library can read a pattern."""
    from llguidance import LLMatcher

    schema = {"type": "string", "pattern": pattern}
    problem = LLMatcher.validate_grammar(LLMatcher.grammar_from_json_schema(schema))
    return not any(reason in problem for reason in _UNREADABLE)


def _without_assertions(pattern: str) -> str:
    """A pattern without its look-arounds and word boundaries.

    Each only takes away from what matches.
    """
    kept: list[str] = []
    pos = 0
    while pos < len(pattern):
        if pattern.startswith(_AROUND, pos):
            pos = _after_group(pattern, pos)
            continue
        end = _after_atom(pattern, pos)
        if pattern[pos:end] not in _BOUNDARIES:
            kept.append(pattern[pos:end])
        pos = end
    return "".join(kept)


def _after_atom(pattern: str, pos: int) -> int:
    """Return where an escape, a class of characters or a single character ends."""
    if pattern[pos] == "\\":
        return pos + 2
    if pattern[pos] != "[":
        return pos + 1
    pos += 1
    while pos < len(pattern) and pattern[pos] != "]":
        pos += 2 if pattern[pos] == "\\" else 1
    return pos + 1


def _after_group(pattern: str, pos: int) -> int:
    """Return where the group that begins at ``pos`` ends, with what repeats it."""
    depth = 0
    while pos < len(pattern):
        depth += {"(": 1, ")": -1}.get(pattern[pos], 0)
        pos = _after_atom(pattern, pos)
        if depth == 0:
            break
    return pos
