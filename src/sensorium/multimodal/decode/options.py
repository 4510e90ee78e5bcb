"""Checks that the options of loading (``media_io_kwargs``) share, whatever the modality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sensorium.config import suggestion
from sensorium.errors import InvalidRequestError


def check_names(
    options: Mapping[str, Any], known: Sequence[str], param: str, otherwise: str = ""
) -> None:
    """Raise InvalidRequestError for what is no mapping, and for a key that is not ``known``.

    ``otherwise``: what the message says in place of what is known, where nothing is.
    """
    if not isinstance(options, Mapping):
        raise InvalidRequestError(
            f"{param} must be a mapping, got {type(options).__name__}.", param=param
        )
    for key in options:
        if key not in known:
            have = otherwise or f"known are {', '.join(known)}"
            raise InvalidRequestError(
                f"Unknown option {str(key)[:80]!r} of {param}; "
                f"{have}.{suggestion(str(key), list(known))}",
                param=param,
            )
