"""Places of errors in bodies that are no chat's, though they are served as one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

Rename = Callable[[str], str]
"""Maps a place in a chat's body to the place in the body that it was made of."""

_MESSAGE = re.compile(r"messages\[(\d+)\]")


def unchanged(place: str) -> str:
    """Return the place as it is: the body is a chat's."""
    return place


def renaming(
    patterns: Mapping[str, str], field: str, messages: Sequence[str] | None = None
) -> Rename:
    """Return the mapping of places that begin with a pattern; others stay as they are.

    Args:
        patterns: Regular expressions, and what the part that matches becomes. The first counts.
        field: The field that messages come from.
        messages: Place of each message; None when they are at ``field``, with the same index.
    """
    rules = [(re.compile(rf"(?:{pattern})(?=$|[.\[])"), text) for pattern, text in patterns.items()]

    def rename(place: str) -> str:
        if place == "messages":
            return field
        found = _MESSAGE.match(place)
        if found is not None:
            index = int(found[1])
            if messages is not None:
                known = messages[index] if index < len(messages) else field
            else:
                known = f"{field}[{index}]"
            return f"{known}{place[found.end() :]}"
        for rule, text in rules:
            match = rule.match(place)
            if match is not None:
                return f"{match.expand(text)}{place[match.end() :]}"
        return place

    return rename
