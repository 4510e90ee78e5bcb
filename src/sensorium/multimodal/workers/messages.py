"""Messages between the pool of decoders and its worker processes.

Arrays do not travel: a worker writes the features into a file of shared memory, and answers with
their shapes. Answers are checked, for a worker has read untrusted files.
"""

from __future__ import annotations

from typing import Any

import msgspec

from sensorium.errors import (
    InvalidRequestError,
    MediaUndecodableError,
    OverloadedError,
    RequestError,
    SensoriumError,
    error_of,
)
from sensorium.multimodal.decode.loaders import DecodeJob, InspectJob
from sensorium.multimodal.items import PageFacts
from sensorium.multimodal.shared_memory import ArraySpec, NoRoomError, check
from sensorium.multimodal.workers.packing import decode_extension, encode_other

MOST_EMBEDS = 1 << 24
MOST_MESSAGE_CHARS = 1000
MOST_PAGES = 1 << 20
MOST_PAGE_CHARS = 1 << 20


class DecodeRequest(msgspec.Struct):
    """Message to a worker: the job, the file to write, the number of bytes that follow."""

    job: DecodeJob | InspectJob
    path: str
    num_bytes: int


class Done(msgspec.Struct, tag=True):
    """Message from a worker: the features, and what they cost.

    The arrays lie in the request's file.
    """

    specs: dict[str, ArraySpec]
    num_embeds: int
    meta: dict[str, Any]
    precomputed: bool
    decode_seconds: float
    decoded_bytes: int
    preprocess_seconds: float


class Inspected(msgspec.Struct, tag=True):
    """Message from a worker: the facts of each page of a PDF."""

    pages: list[PageFacts]


class Failed(msgspec.Struct, tag=True):
    """Message from a worker: the error of the item; ``code`` is that of its class."""

    message: str
    code: str
    param: str | None = None

    def error(self) -> SensoriumError:
        """Return the error to raise: one of an item, for a worker cannot speak for the engine."""
        message = self.message[:MOST_MESSAGE_CHARS]
        error = error_of(self.code, message, self.param, MediaUndecodableError)
        if isinstance(error, RequestError | OverloadedError):
            return error
        return MediaUndecodableError(message, param=self.param)


class NoRoom(msgspec.Struct, tag=True):
    """Message from a worker: the features have so many bytes, for which there is no room now.

    ``total_bytes``: what the file system has in all.
    """

    num_bytes: int
    total_bytes: int

    def error(self) -> NoRoomError:
        """Return the error to raise."""
        return NoRoomError(self.num_bytes, self.total_bytes)


Reply = Done | Inspected | Failed | NoRoom
encode = msgspec.msgpack.Encoder(enc_hook=encode_other).encode
decode_request = msgspec.msgpack.Decoder(DecodeRequest, ext_hook=decode_extension).decode
_decode_reply = msgspec.msgpack.Decoder(Reply, ext_hook=decode_extension).decode


def encode_request(request: DecodeRequest) -> bytes:
    """Return a request as bytes. Raises InvalidRequestError for options that cannot be encoded."""
    try:
        return encode(request)
    except (TypeError, ValueError, OverflowError, RecursionError):
        raise InvalidRequestError(
            "mm_processor_kwargs holds a value that is no plain one (a number below 2**64, a text, "
            "a list or a mapping of those).",
            param="mm_processor_kwargs",
        ) from None


def decode_reply(data: bytes, path: str, job: DecodeJob | InspectJob) -> Reply:
    """Return a worker's reply to a job, whose arrays lie in the file ``path``.

    Raises ValueError, TypeError or OSError for one that cannot be true.
    """
    reply = _decode_reply(data)
    wanted = Inspected if isinstance(job, InspectJob) else Done | NoRoom
    if not isinstance(reply, Failed | wanted):
        raise TypeError("a worker cannot have answered another job")
    if isinstance(reply, Done):
        check(path, reply.specs)
        if not 0 <= reply.num_embeds <= MOST_EMBEDS:
            raise ValueError(f"a worker cannot have made {reply.num_embeds} embeddings")
    elif isinstance(reply, Inspected) and (
        len(reply.pages) > MOST_PAGES
        or any(min(page.width, page.height) < 1 for page in reply.pages)
        or any(len(page.text) > MOST_PAGE_CHARS for page in reply.pages)
    ):
        raise ValueError("a worker cannot have found such pages")
    return reply
