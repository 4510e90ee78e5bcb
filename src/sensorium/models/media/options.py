"""Identity and option checks that processors of families share, without torch."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from sensorium.errors import InvalidRequestError


def identity_of(name: str, processor: Any, options: Mapping[str, Any], *more: object) -> bytes:
    """Return a processor's ``identity``, a key of the processor cache.

    It consists of the name and version of its code, its configuration (``repr``), options and
    ``more``.
    """
    given = json.dumps(dict(options), sort_keys=True, default=dict)
    return " ".join([name, repr(processor), given, *map(repr, more)]).encode()


def check_option_names(options: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise InvalidRequestError for an entry of ``mm_processor_kwargs`` that the model lacks."""
    for name in options:
        if name not in known:
            have = f"it has {', '.join(known)}" if known else "it has none"
            raise InvalidRequestError(
                f"This model's processor has no option {str(name)[:80]!r}; {have}.",
                param=f"mm_processor_kwargs.{str(name)[:80]}",
            )
