"""GGUF files written byte by byte, right or wrong in one place."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


def string(text: str | bytes) -> bytes:
    """A string: its length, then its bytes."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def value(kind: int, data: bytes) -> bytes:
    """A value of the metadata, with its type."""
    return struct.pack("<I", kind) + data


def array(element: int, count: int, data: bytes) -> bytes:
    return value(9, struct.pack("<IQ", element, count) + data)


@dataclass
class Tensor:
    """An entry of the tensor table."""

    name: str | bytes = "a.weight"
    dims: Sequence[int] = (4, 2)
    kind: int = 0
    offset: int = 0

    def packed(self) -> bytes:
        dims = b"".join(struct.pack("<Q", size) for size in self.dims)
        end = struct.pack("<IQ", self.kind, self.offset)
        return string(self.name) + struct.pack("<I", len(self.dims)) + dims + end


@dataclass
class Raw:
    """A file: one value and one tensor of eight float32 numbers unless they are given."""

    values: Sequence[tuple[str | bytes, bytes]] = (
        ("general.architecture", value(8, string("llama"))),
    )
    tensors: Sequence[Tensor] = field(default_factory=lambda: [Tensor()])
    magic: bytes = b"GGUF"
    version: int = 3
    num_tensors: int | None = None
    num_values: int | None = None
    alignment: int = 32
    data: bytes = bytes(32)

    def packed(self) -> bytes:
        num_tensors = len(self.tensors) if self.num_tensors is None else self.num_tensors
        num_values = len(self.values) if self.num_values is None else self.num_values
        head = self.magic + struct.pack("<IQQ", self.version, num_tensors, num_values)
        head += b"".join(string(name) + data for name, data in self.values)
        head += b"".join(tensor.packed() for tensor in self.tensors)
        return head + bytes(-len(head) % self.alignment) + self.data

    def write(self, folder: Path) -> Path:
        path = folder / "model.gguf"
        path.write_bytes(self.packed())
        return path
