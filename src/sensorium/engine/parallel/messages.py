"""Messages between the first rank of a model and the others: MessagePack on a stream socket.

The first rank has the scheduler and resolves its plan to what a decoder computes with: ids,
lengths and blocks. That is what it sends, ahead of the tensors, which the ranks exchange as
``Collectives``.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import msgspec

from sensorium.config import EngineConfig
from sensorium.multimodal.workers.packing import decode_extension, encode_other
from sensorium.processes.framing import receive_frame, send_frame

if TYPE_CHECKING:
    import torch

    from sensorium.models.interface import Model

MOST_BYTES = 1 << 30
"""Longest message: one id, position or block is a few bytes."""


class Begin(msgspec.Struct, tag=True):
    """First message to a rank: what to load, and its place among ``size`` ranks."""

    config: EngineConfig
    rank: int
    size: int


class Start(msgspec.Struct, tag=True):
    """Message to a rank that has loaded: allocate the KV cache, answer, and meet the others.

    meeting, secret: of ``Collectives.join``; timeout in seconds.
    """

    num_blocks: int
    meeting: str
    secret: bytes
    timeout: float


class Embed(msgspec.Struct, tag=True):
    """Message to a rank: look up embeddings of ids, int64, and sum them over all ranks."""

    ids: bytes


class Forward(msgspec.Struct, tag=True):
    """Message to a rank: compute one step; embeddings and rotary factors are broadcast next.

    width: numbers of an embedding. rotary_size: numbers of cos, and of sin, of a row. block_table:
    int32, a row per sequence. The other fields are those of ``AttentionBatch``.
    """

    width: int
    rotary_size: int
    query_lens: list[int]
    kv_lens: list[int]
    num_decodes: int
    invariant: bool
    block_table: bytes
    runs: list[tuple[int, int, int]] = []
    """Lane, first row and end of rows with adapters."""


class Logits(msgspec.Struct, tag=True):
    """Message to a rank: compute its part of the logits of rows, which are broadcast next."""

    num_rows: int


class Item(msgspec.Struct):
    """Features of an item, see ``Features``; arrays of numpy."""

    modality: str
    num_embeds: int
    meta: dict[str, Any]
    arrays: dict[str, Any]


class Encode(msgspec.Struct, tag=True):
    """Message to one rank: encode items, answer ``Encoded``, and send their embeddings.

    number: comes back with the answer, and differs from message to message. lane: that of the
    adapter of all of them.
    """

    number: int
    items: list[Item]
    lane: int | None = None


class Encoded(msgspec.Struct, tag=True):
    """Message from a rank: items are encoded; no embeddings follow if that has failed."""

    number: int
    failed: bool = False


class AdapterPart(msgspec.Struct, tag=True):
    """Message to a rank: a module of an adapter, of which it takes its part.

    name: of the weight. a (rank, inputs), b (outputs, rank): numbers of the whole module, in the
    dtype of the model. affine: (2, outputs) float32, see ``LowRank``; empty for none.
    """

    name: str
    rank: int
    scale: float
    a: bytes
    b: bytes
    affine: bytes = b""


class SetLane(msgspec.Struct, tag=True):
    """Message to a rank: the modules since the last one are the adapter of a lane.

    Its answer is ``LaneSet``.
    """

    lane: int


class ClearLane(msgspec.Struct, tag=True):
    """Message to a rank: a lane is empty."""

    lane: int


class LaneSet(msgspec.Struct, tag=True):
    """Message from a rank: it has set a lane, or could not."""

    failed: bool = False


class Loaded(msgspec.Struct, tag=True):
    """Message from a rank: it has loaded its part of the model, of so many bytes.

    model: dtype and sizes of the whole model, as text; the same at all ranks.
    """

    weight_bytes: int
    model: str


class Allocated(msgspec.Struct, tag=True):
    """Message from a rank: it has its KV cache and is about to meet the others."""


class Ready(msgspec.Struct, tag=True):
    """Message from a rank: it has met the others and waits for work."""


class Failed(msgspec.Struct, tag=True):
    """Message from a rank: it could not start; ``code`` is that of the error."""

    message: str
    code: str
    param: str | None = None


ToRank = Begin | Start | Embed | Forward | Logits | Encode | AdapterPart | SetLane | ClearLane
FromRank = Loaded | Allocated | Ready | Failed | Encoded | LaneSet

_encoder = msgspec.msgpack.Encoder(enc_hook=encode_other)
_to_rank = msgspec.msgpack.Decoder(ToRank, ext_hook=decode_extension)
_from_rank = msgspec.msgpack.Decoder(FromRank)


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype as options have it."""
    return str(dtype).removeprefix("torch.")


def described(model: Model) -> str:
    """Return dtype and sizes of a model, in which all ranks agree."""
    shape = model.shape
    return (
        f"{name_of(model.dtype)}, {shape.num_layers} layers of {shape.hidden_size}, "
        f"{shape.num_heads} and {shape.num_kv_heads} heads of {shape.head_dim}, "
        f"{shape.vocab_size} tokens"
    )


def encode(message: ToRank | FromRank) -> bytes:
    """Return the bytes of a message."""
    return _encoder.encode(message)


def send(to: socket.socket, message: bytes) -> None:
    """Send an encoded message. Raises OSError when the other side has gone."""
    send_frame(to, message)


def receive_at_rank(source: socket.socket) -> ToRank | None:
    """Return the next message to a rank; None when the first rank has closed or gone."""
    data = receive_frame(source, MOST_BYTES)
    return None if data is None else _to_rank.decode(data)


def receive_from_rank(source: socket.socket) -> FromRank | None:
    """Return the next message from a rank; None when it has gone."""
    data = receive_frame(source, MOST_BYTES)
    return None if data is None else _from_rank.decode(data)
