"""Values that travel between who answers HTTP requests and the replicas that encode media."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from sensorium.engine.stats import EncoderStats


@dataclass(frozen=True, slots=True)
class Ask:
    """A question for the embeddings of an item: first argument of a call, which routers read.

    ``key``: the item's digest, which holds its content even where a caller's id is its identity.
    ``number``: of this attempt, in the process that asks.
    """

    key: bytes
    number: int


@dataclass(frozen=True, slots=True)
class Answer:
    """Embeddings of an item: ``bits``, uint8 (num_embeds, bytes of one), of numbers in ``dtype``.

    ``bits`` is None where the item cannot be encoded: an engine that tries it gives the error.
    ``space``: the identity of the encoder (``media.space``); empty where that is not known.
    """

    space: bytes
    bits: np.ndarray | None
    dtype: str = ""


class EncoderReport(msgspec.Struct, frozen=True):
    """Report of a replica on itself, once a second.

    ``space``: its identity. ``numerics``: the part of that which one can read.
    """

    space: bytes
    numerics: str
    stats: EncoderStats
