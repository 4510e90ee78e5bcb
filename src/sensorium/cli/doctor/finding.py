"""Findings about a machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["ok", "note", "warning", "problem"]
LEVELS: tuple[Level, ...] = ("ok", "note", "warning", "problem")
"""From good to bad. note: slower or smaller than it could be by choice or by nature of the machine;
warning: worth a change; problem: something does not work."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding: the check it belongs to, its level, the facts, and what to do."""

    check: str
    level: Level
    facts: str
    advice: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the finding for JSON."""
        return asdict(self)


def ok(check: str, facts: str) -> Finding:
    """Return a good finding."""
    return Finding(check, "ok", facts)


def note(check: str, facts: str, advice: str = "") -> Finding:
    """Return a finding that needs no action."""
    return Finding(check, "note", facts, advice)


def warning(check: str, facts: str, advice: str) -> Finding:
    """Return a finding that is worth a change."""
    return Finding(check, "warning", facts, advice)


def problem(check: str, facts: str, advice: str) -> Finding:
    """Return a finding of something that does not work."""
    return Finding(check, "problem", facts, advice)
