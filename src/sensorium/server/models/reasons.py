"""Reasons why a model could not be loaded, as clients may read them."""

from __future__ import annotations

import re
from pathlib import Path

UNEXPECTED = "An unexpected error, which the server's log has."
"""Reason of a failure whose message is about the internals."""

_QUOTED = re.compile(r"(?P<quote>['\"`])~?/[^'\"`\n]*/(?P<name>[^'\"`/\n]*)(?P=quote)")
_BARE = re.compile(r"(?<![\w/.~:-])~?/(?!(?:dev|proc|sys|v1)/)(?:[^\s/'\"`]+/)+")


def without_places(reason: str, model: str, name: str) -> str:
    """Return a reason with the public name of a model in place of where it lies.

    Of other paths only the last part is left.
    """
    for place in _places(model):
        quoted = re.compile(rf"(?P<quote>['\"`]){re.escape(place)}/?(?P=quote)")
        reason = quoted.sub(lambda match: match["quote"] + name + match["quote"], reason)
        if "/" in place.strip("/.") or (place.startswith("/") and len(place) > 1):
            whole = re.compile(rf"(?<![\w/.~-]){re.escape(place)}(?![\w-])")
            reason = whole.sub(lambda match: name, reason)
    reason = _QUOTED.sub(r"\g<quote>\g<name>\g<quote>", reason)
    return _BARE.sub("", reason)


def _places(model: str) -> list[str]:
    """Return the spellings of a model's place, the longest first."""
    found = {model, model.rstrip("/")}
    try:
        path = Path(model).expanduser()
        if path.exists() or model.startswith(("/", "~")):
            found |= {str(path), str(path.absolute()), str(path.resolve())}
    except (OSError, RuntimeError, ValueError):
        pass
    return sorted(found - {""}, key=len, reverse=True)
