"""Messages between the frontend's process and the engine's: plain values, MessagePack, no pickle."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from sensorium.config import EngineConfig
from sensorium.core.request import EngineRequest, SequenceUpdate
from sensorium.engine.shared import SharedFeatures
from sensorium.engine.stats import EngineFacts, EngineStats

_ARRAY = 1
"""Extension code of a numpy array: its dtype and shape in MessagePack, a zero byte after its length, its bytes."""


class Submit(msgspec.Struct, tag=True):
    """To the engine: a request and where its features lie, one per item."""

    request: EngineRequest
    features: tuple[SharedFeatures, ...]


class Abort(msgspec.Struct, tag=True):
    """To the engine: end these requests."""

    request_ids: tuple[str, ...]


class AskStats(msgspec.Struct, tag=True):
    """To the engine: send ``Stats`` with this number."""

    number: int


class Stop(msgspec.Struct, tag=True):
    """To the engine: end the process."""


class Configure(msgspec.Struct, tag=True):
    """To the engine, first: what to load."""

    config: EngineConfig


class Ready(msgspec.Struct, tag=True):
    """From the engine: it can take requests."""

    facts: EngineFacts


class Failed(msgspec.Struct, tag=True):
    """From the engine: it could not start; ``code`` is that of the error."""

    message: str
    code: str
    param: str | None = None


class Refused(msgspec.Struct, tag=True):
    """From the engine: a request that can never be served."""

    request_id: str
    message: str
    code: str
    param: str | None = None


class Updates(msgspec.Struct, tag=True):
    """From the engine: the news of one step."""

    updates: list[SequenceUpdate]


class Stats(msgspec.Struct, tag=True):
    """From the engine: the answer to ``AskStats``."""

    number: int
    stats: EngineStats


ToEngine = Configure | Submit | Abort | AskStats | Stop
FromEngine = Ready | Failed | Refused | Updates | Stats


def _encode_other(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        head = msgspec.msgpack.encode((value.dtype.str, value.shape))
        size = len(head).to_bytes(4, "little")
        return msgspec.msgpack.Ext(_ARRAY, size + head + np.ascontiguousarray(value).tobytes())
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be sent to the engine")


def _decode_extension(code: int, data: memoryview) -> Any:
    if code != _ARRAY:
        raise ValueError(f"unknown extension {code}")
    size = int.from_bytes(data[:4], "little")
    dtype, shape = msgspec.msgpack.decode(data[4 : 4 + size])
    return np.frombuffer(bytes(data[4 + size :]), np.dtype(dtype)).reshape(shape)


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_other)
_to_engine = msgspec.msgpack.Decoder(ToEngine, ext_hook=_decode_extension)
_from_engine = msgspec.msgpack.Decoder(FromEngine, ext_hook=_decode_extension)


def encode(message: ToEngine | FromEngine) -> bytes:
    """The bytes of a message."""
    return _encoder.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    """A message that the engine receives."""
    return _to_engine.decode(data)


def decode_from_engine(data: bytes) -> FromEngine:
    """A message that the frontend receives."""
    return _from_engine.decode(data)
