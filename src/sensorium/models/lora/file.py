"""Reading of an adapter's file of tensors by its header, as copies.

A map of a file that somebody shortens meanwhile would end the process that reads it; here that is
an error. Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import math
import os
import stat
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeGuard

import torch

from sensorium.errors import ConfigError

PIECE = 1 << 14
"""Numbers that are read and converted at a time: too few for torch to wake other threads, as these
may be running the model."""
MOST_HEADER = 1 << 23
MOST_TENSORS = 1 << 14
MOST_NAME = 512
"""Characters of a tensor's name."""
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_MOST_DIMENSIONS = 8
_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor: its type and shape, and where in the file its bytes are."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.end - self.begin


class TensorFile:
    """A safetensors file that is open. Raises ConfigError for one that is damaged.

    ``entries``: its tensors by name, as many and with names as long as adapters have. The bytes of
    those whose type is in ``DTYPES`` are as many as their shapes say.
    """

    def __init__(self, path: Path) -> None:
        self._name = path.name
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            weakref.finalize(self, os.close, self._descriptor)
            status = os.fstat(self._descriptor)
            if not stat.S_ISREG(status.st_mode):
                self._fail("it is no regular file")
            self.entries = self._read_header(status.st_size)
        except OSError as error:
            self._fail(str(error.strerror))

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Yield the numbers of a tensor in their order, at most ``PIECE`` at a time.

        Raises ConfigError when the file has become shorter or cannot be read.
        """
        entry = self.entries[name]
        dtype = DTYPES[entry.dtype]
        step = PIECE * dtype.itemsize
        for begin in range(entry.begin, entry.end, step):
            count = min(step, entry.end - begin)
            try:
                data = bytearray(os.pread(self._descriptor, count, begin))
            except OSError as error:
                self._fail(str(error.strerror))
            if len(data) != count:
                self._fail("it has become shorter")
            yield torch.frombuffer(data, dtype=dtype)

    def _read_header(self, size: int) -> Mapping[str, Entry]:
        num_bytes = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if size < 8 or num_bytes > size - 8:
            self._fail("its header is not whole")
        if num_bytes > MOST_HEADER:
            self._fail(f"its header has more than {MOST_HEADER >> 20} MiB")
        data = os.pread(self._descriptor, num_bytes, 8)
        try:
            header = json.loads(data.decode())
        except (ValueError, RecursionError):
            self._fail("its header is not valid JSON")
        if not isinstance(header, dict):
            self._fail("its header is not a JSON object")
        header.pop(_METADATA, None)
        if len(header) > MOST_TENSORS:
            self._fail(f"it has more than {MOST_TENSORS} tensors")
        start = 8 + num_bytes
        return {name: self._entry(name, value, start, size) for name, value in header.items()}

    def _entry(self, name: str, value: object, start: int, size: int) -> Entry:
        if len(name) > MOST_NAME:
            self._fail(f"{name[:100]!r}... is a name of more than {MOST_NAME} characters")
        fields = value if isinstance(value, dict) else {}
        dtype, shape, places = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not (isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(places)):
            self._fail(f"the entry of {name[:200]!r} is damaged")
        if len(shape) > _MOST_DIMENSIONS or len(places) != 2:
            self._fail(f"the entry of {name[:200]!r} is damaged")
        begin, end = places
        if not begin <= end <= size - start:
            self._fail(f"{name[:200]!r} is not whole")
        if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != end - begin:
            self._fail(f"{name[:200]!r} has not as many bytes as its shape says")
        return Entry(dtype[:16], tuple(shape), start + begin, start + end)

    def _fail(self, problem: str) -> NoReturn:
        raise ConfigError(
            f"The adapter cannot be used: {self._name} is not a readable safetensors file: "
            f"{problem}.",
            param="lora_modules",
        )


def _are_sizes(values: object) -> TypeGuard[list[int]]:
    """Return True for a list of sizes or places, as large as any that a file can have."""
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48
        for value in values
    )
