"""Parts of a prompt whose tokens attend to one another both ways: what is to be computed in one step, and cached."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import Literal, NamedTuple

from sensorium.core.request import ItemSpan


class BothWays(NamedTuple):
    """``stretches`` and ``salt`` are those of ``EngineRequest``."""

    stretches: tuple[tuple[int, int], ...]
    salt: bytes


def attending(
    what: Literal["items", "prompt"] | None,
    token_ids: Sequence[int],
    spans: Sequence[ItemSpan],
    salt: bytes,
) -> BothWays:
    """The stretches of an expanded prompt, as ``Family.both_ways`` has it.

    The keys and values of an item's run depend on all of it, and so does the digest of a block that holds a part of
    it. Those of a prompt that attends to itself whole depend on its last token, which goes into the salt: such a prompt
    shares its cache with its like only.
    """
    if what is None or not spans:
        return BothWays((), salt)
    if what == "items":
        runs = (run for span in spans for run in span.runs)
        return BothWays(tuple((start, start + length) for start, length in runs), salt)
    parts = (salt, array("q", token_ids).tobytes(), *(span.digest for span in spans))
    return BothWays(((0, len(token_ids)),), hashlib.sha256(b"".join(parts)).digest())
