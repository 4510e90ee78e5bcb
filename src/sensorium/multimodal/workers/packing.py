"""Plain values and numpy arrays as MessagePack, between processes of one machine. No pickle."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

_ARRAY = 1
"""Extension code of a numpy array: its dtype and shape in MessagePack, after the length of that,
then its bytes."""


def encode_other(value: Any) -> Any:
    """Encode a value that msgspec does not know.

    Raises TypeError for all but numpy's.
    """
    if isinstance(value, np.ndarray):
        head = msgspec.msgpack.encode((value.dtype.str, value.shape))
        size = len(head).to_bytes(4, "little")
        return msgspec.msgpack.Ext(_ARRAY, size + head + np.ascontiguousarray(value).tobytes())
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be sent to another process")


def decode_extension(code: int, data: memoryview) -> Any:
    """Decode an extension: the array of ``encode_other``, copied."""
    if code != _ARRAY:
        raise ValueError(f"unknown extension {code}")
    size = int.from_bytes(data[:4], "little")
    dtype, shape = msgspec.msgpack.decode(data[4 : 4 + size])
    return np.frombuffer(bytes(data[4 + size :]), np.dtype(dtype)).reshape(shape)
