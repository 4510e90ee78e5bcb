"""Messages between frontend and engine process: plain values in MessagePack, no pickle."""

from __future__ import annotations

import msgspec
import numpy as np

from sensorium.config import EngineConfig
from sensorium.core.request import EngineRequest, SequenceUpdate
from sensorium.engine.shared import SharedFeatures
from sensorium.engine.stats import AdapterFacts, EngineFacts, EngineStats
from sensorium.multimodal.workers.packing import decode_extension, encode_other


class Submit(msgspec.Struct, tag=True):
    """Message to the engine: a request, and handles to the features of its items."""

    request: EngineRequest
    features: tuple[SharedFeatures, ...]


class Abort(msgspec.Struct, tag=True):
    """Message to the engine: end these requests."""

    request_ids: tuple[str, ...]


class AskStats(msgspec.Struct, tag=True):
    """Message to the engine: send ``Stats`` with this number."""

    number: int


class AskEmbeddings(msgspec.Struct, tag=True):
    """Message to the engine: send ``Embeddings`` of an item, with this number."""

    number: int
    digest: bytes


class LoadAdapter(msgspec.Struct, tag=True):
    """Message to the engine: load an adapter, and send ``Adapters`` with this number.

    ``path``: as it was given. ``folder``: where the adapter is, empty where that is to be found.
    """

    number: int
    name: str
    path: str
    folder: str


class UnloadAdapter(msgspec.Struct, tag=True):
    """Message to the engine: forget an adapter, and send ``Adapters`` with this number."""

    number: int
    name: str


class Stop(msgspec.Struct, tag=True):
    """Message to the engine: end the process."""


class Configure(msgspec.Struct, tag=True):
    """First message to the engine: the model to load."""

    config: EngineConfig


class Ready(msgspec.Struct, tag=True):
    """Message from the engine: it can take requests."""

    facts: EngineFacts


class Failed(msgspec.Struct, tag=True):
    """Message from the engine: it could not start; ``code`` is that of the error."""

    message: str
    code: str
    param: str | None = None


class Refused(msgspec.Struct, tag=True):
    """Message from the engine: a request that can never be served."""

    request_id: str
    message: str
    code: str
    param: str | None = None


class Updates(msgspec.Struct, tag=True):
    """Message from the engine: the updates of one step."""

    updates: list[SequenceUpdate]


class Stats(msgspec.Struct, tag=True):
    """Message from the engine: the answer to ``AskStats``."""

    number: int
    stats: EngineStats


class Embeddings(msgspec.Struct, tag=True):
    """Message from the engine: the answer to ``AskEmbeddings``; None where it has none any more.

    ``bits``: uint8 (num_embeds, bytes of one), of numbers in ``dtype``.
    """

    number: int
    bits: np.ndarray | None = None
    dtype: str = ""


class Adapters(msgspec.Struct, tag=True):
    """Message from the engine: its adapters now, and the error of what was asked, if any."""

    number: int
    adapters: tuple[AdapterFacts, ...]
    failed: Failed | None = None


ToEngine = (
    Configure | Submit | Abort | AskStats | AskEmbeddings | LoadAdapter | UnloadAdapter | Stop
)
FromEngine = Ready | Failed | Refused | Updates | Stats | Embeddings | Adapters


_encoder = msgspec.msgpack.Encoder(enc_hook=encode_other)
_to_engine = msgspec.msgpack.Decoder(ToEngine, ext_hook=decode_extension)
_from_engine = msgspec.msgpack.Decoder(FromEngine, ext_hook=decode_extension)


def encode(message: ToEngine | FromEngine) -> bytes:
    """Return the bytes of a message."""
    return _encoder.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    """Decode a message that the engine receives."""
    return _to_engine.decode(data)


def decode_from_engine(data: bytes) -> FromEngine:
    """Decode a message that the frontend receives."""
    return _from_engine.decode(data)
