"""Reading of a GGUF file's metadata and table of tensors, with all that a file claims checked.

A file may come from anywhere. Every count, length, offset and size is compared with what the file
holds, and with a bound of its own, before memory is taken for it; so a damaged or hostile file
costs at most the bounds below beside its size. Nothing of the tensors themselves is read.

Layout (version 2 and 3, little endian): ``GGUF``, version, number of tensors, number of values;
then the values (name, type, value), the tensors (name, dimensions, kind, offset) and, from a
multiple of the alignment on, their data. No torch.
"""

from __future__ import annotations

import math
import os
import re
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from sensorium.errors import ConfigError
from sensorium.models.gguf.kinds import KINDS, OTHERS, Kind

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MOST_ALIGNMENT = 1 << 20
MOST_VALUES = 1 << 14
"""Values of the metadata."""
MOST_TENSORS = 1 << 16
MOST_DIMENSIONS = 4
MOST_NAME_BYTES = 1 << 10
MOST_STRINGS = 1 << 21
"""Strings of all arrays together; vocabularies with their merges have about 800,000 at most."""
MOST_NUMBERS = 1 << 22
"""Numbers of all arrays together."""
CHUNK_BYTES = 1 << 18
"""Bytes that are read at a time."""
MOST_METADATA_BYTES = 1 << 28
"""Bytes up to the first tensor."""

_SCALARS: dict[int, tuple[str, Any]] = {
    0: ("<B", np.uint8),
    1: ("<b", np.int8),
    2: ("<H", np.uint16),
    3: ("<h", np.int16),
    4: ("<I", np.uint32),
    5: ("<i", np.int32),
    6: ("<f", np.float32),
    7: ("<B", np.bool_),
    10: ("<Q", np.uint64),
    11: ("<q", np.int64),
    12: ("<d", np.float64),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_PRINTABLE = re.compile(r"[ -~]+")

Value = Any
"""A value of the metadata: bool, int, float, str, list of str, or an array of numbers of numpy."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of a file: ``start`` is its first byte in the file, ``shape`` as torch has it."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    start: int
    part: int = 0
    """Place of its file among those of a file in several parts."""

    @property
    def num_values(self) -> int:
        """Return the number of its elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Return the bytes that it takes in the file."""
        return self.num_values // self.kind.values * self.kind.num_bytes


@dataclass(frozen=True, slots=True)
class GgufFile:
    """A file whose metadata and tensor table were read and checked."""

    path: Path
    size: int
    version: int
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]
    more: tuple[tuple[Path, int], ...] = ()
    """Paths and sizes of the further parts of a file in several: see ``split``."""

    @property
    def parts(self) -> tuple[tuple[Path, int], ...]:
        """Return paths and sizes of all its files, by ``TensorInfo.part``."""
        return ((self.path, self.size), *self.more)

    @property
    def architecture(self) -> str:
        """Return ``general.architecture``; empty where it is missing or no string."""
        value = self.metadata.get("general.architecture")
        return value if isinstance(value, str) else ""

    def own(self, name: str, default: Any = None) -> Any:
        """Return a value under the name of the architecture, such as ``block_count``."""
        return self.metadata.get(f"{self.architecture}.{name}", default)


def integers(value: Value) -> list[int] | None:
    """Return the numbers of an array of integers; None for any other value of the metadata."""
    if not isinstance(value, np.ndarray) or value.dtype.kind not in "iu":
        return None
    found: list[int] = value.tolist()
    return found


def is_gguf(path: Path) -> bool:
    """Return whether a file begins as GGUF files do."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read(path: Path, size: int | None = None, most_bytes: int = MOST_METADATA_BYTES) -> GgufFile:
    """Read the metadata and the tensor table of a file.

    size: bytes of the whole file, where only its beginning is at ``path``. most_bytes: bound of
    what is before the tensors. Raises ConfigError that says what is wrong for a file that is
    damaged, incomplete, or beyond the bounds of this module.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path.name} is no file.", param="model")
        if status.st_size < 24:
            raise ConfigError(f"{path.name} is no GGUF file: it is too short.", param="model")
        return _Reader(path, descriptor, status.st_size, size or status.st_size, most_bytes).read()
    except OSError as error:
        raise _unreadable(path, error) from error
    finally:
        os.close(descriptor)


def _unreadable(path: Path, error: OSError) -> ConfigError:
    reason = error.strerror or type(error).__name__
    return ConfigError(f"{path.name} cannot be read: {reason}.", param="model")


@dataclass(slots=True)
class _Reader:
    """The state of reading: the place in the file, and what arrays have taken so far."""

    path: Path
    descriptor: int
    here: int
    """Bytes of the file that there are: fewer than ``size`` of one whose beginning was fetched."""
    size: int
    most_bytes: int
    place: int = 0
    num_strings: int = 0
    num_numbers: int = 0
    start: int = 0
    held: bytes = b""
    """Bytes that were read from ``start`` on."""
    metadata: dict[str, Value] = field(default_factory=dict)

    def read(self) -> GgufFile:
        """Read all of it. Raises ConfigError."""
        version, num_tensors, num_values = self._header()
        for _ in range(num_values):
            self._value_of_metadata()
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not _is_alignment(alignment):
            self._fail(f"its alignment {alignment!r:.40} is no power of two up to {MOST_ALIGNMENT}")
        entries = [self._entry() for _ in range(num_tensors)]
        start = -(-self.place // alignment) * alignment
        tensors = self._placed(entries, start, alignment)
        return GgufFile(self.path, self.size, version, self.metadata, tensors)

    def _header(self) -> tuple[int, int, int]:
        """Return version, number of tensors and number of values."""
        if self._take(len(MAGIC)) != MAGIC:
            self._fail("it does not begin with 'GGUF'")
        version = self._number("<I")
        if version and not version & 0xFFFF:
            self._fail("it has the byte order of another machine; take the little-endian file")
        if version not in VERSIONS:
            self._fail(f"it has version {version}; versions 2 and 3 are read")
        num_tensors, num_values = self._number("<Q"), self._number("<Q")
        self._check_count(num_tensors, MOST_TENSORS, 33, "tensors")
        self._check_count(num_values, MOST_VALUES, 14, "values of metadata")
        return version, num_tensors, num_values

    def _value_of_metadata(self) -> None:
        name = self._name("a value")
        if name in self.metadata:
            self._fail(f"its metadata has {name!r:.80} twice")
        self.metadata[name] = self._value(self._number("<I"), name)

    def _value(self, kind: int, name: str) -> Value:
        if kind in _SCALARS:
            value = self._number(_SCALARS[kind][0])
            return bool(value) if kind == _BOOL else value
        if kind == _STRING:
            return self._string(MOST_METADATA_BYTES, name)
        if kind != _ARRAY:
            self._fail(f"{name!r:.80} has the unknown type {kind}")
        element, count = self._number("<I"), self._number("<Q")
        if element == _STRING:
            self._check_count(count, MOST_STRINGS - self.num_strings, 8, f"strings in {name!r:.80}")
            self.num_strings += count
            return [self._string(MOST_METADATA_BYTES, name) for _ in range(count)]
        if element not in _SCALARS:
            what = "arrays" if element == _ARRAY else f"the unknown type {element}"
            self._fail(f"{name!r:.80} is an array of {what}")
        dtype = np.dtype(_SCALARS[element][1])
        most = MOST_NUMBERS - self.num_numbers
        self._check_count(count, most, dtype.itemsize, f"numbers in {name!r:.80}")
        self.num_numbers += count
        raw = self._take(count * dtype.itemsize)
        if element == _BOOL:
            return np.frombuffer(raw, np.uint8) != 0
        return np.frombuffer(raw, dtype.newbyteorder("<")).astype(dtype)

    def _entry(self) -> tuple[str, tuple[int, ...], Kind, int]:
        """Return name, shape, kind and offset of the next tensor."""
        name = self._name("a tensor")
        num_dims = self._number("<I")
        if not 1 <= num_dims <= MOST_DIMENSIONS:
            self._fail(f"tensor {name!r:.80} has {num_dims} dimensions, not 1 to {MOST_DIMENSIONS}")
        dims = tuple(self._number("<Q") for _ in range(num_dims))
        number, offset = self._number("<I"), self._number("<Q")
        kind = KINDS.get(number)
        if kind is None:
            known = ", ".join(known.name for known in KINDS.values())
            self._fail(
                f"tensor {name!r:.80} is of the kind {OTHERS.get(number, number)}; those that are "
                f"read are {known}"
            )
        if min(dims) < 1 or math.prod(dims) > 8 * self.size:
            self._fail(f"tensor {name!r:.80} claims {dims} values, more than fit into the file")
        if dims[0] % kind.values:
            self._fail(
                f"tensor {name!r:.80} has rows of {dims[0]} values, no multiple of the "
                f"{kind.values} that a block of {kind.name} has"
            )
        return name, tuple(reversed(dims)), kind, offset

    def _placed(
        self,
        entries: Iterable[tuple[str, tuple[int, ...], Kind, int]],
        start: int,
        alignment: int,
    ) -> dict[str, TensorInfo]:
        """Return the tensors by name: within the file, aligned, none inside another."""
        found: dict[str, TensorInfo] = {}
        for name, shape, kind, offset in entries:
            if name in found:
                self._fail(f"it has two tensors {name!r:.80}")
            if offset % alignment:
                self._fail(f"tensor {name!r:.80} is not at a multiple of {alignment} bytes")
            info = TensorInfo(name, shape, kind, start + offset)
            missing = info.start + info.nbytes - self.size
            if missing > 0:
                self._fail(
                    f"tensor {name!r:.80} ends {missing} bytes behind the end of the file: the "
                    "download is not complete"
                )
            found[name] = info
        end, before = start, ""
        for info in sorted(found.values(), key=lambda info: info.start):
            if info.start < end:
                self._fail(f"tensors {before!r:.80} and {info.name!r:.80} overlap")
            end, before = info.start + info.nbytes, info.name
        return found

    def _name(self, what: str) -> str:
        name = self._string(MOST_NAME_BYTES, f"the name of {what}")
        if not _PRINTABLE.fullmatch(name):
            self._fail(f"the name of {what}, {name!r:.80}, is not printable ASCII")
        return name

    def _string(self, most: int, what: str) -> str:
        length = self._number("<Q")
        self._check_count(length, most, 1, f"bytes in {what!r:.80}")
        try:
            return str(self._take(length), "utf-8")
        except UnicodeDecodeError:
            self._fail(f"{what!r:.80} has text that is not UTF-8")

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _take(self, count: int) -> bytes:
        end = self.place + count
        if end > self.here:
            self._fail_short()
        if end > self.most_bytes:
            self._fail(f"its metadata is larger than {self.most_bytes >> 20} MiB")
        first = self.place - self.start
        if first + count > len(self.held):
            # Not mapped: a file that another program cuts short would end this process.
            self.held = _bytes_at(self.descriptor, self.place, max(count, CHUNK_BYTES))
            self.start, first = self.place, 0
        if len(self.held) < first + count:
            self._fail_short()
        taken = self.held[first : first + count]
        if count > CHUNK_BYTES:
            self.held = b""
        self.place = end
        return taken

    def _check_count(self, count: int, most: int, least_bytes: int, what: str) -> None:
        """Raise ConfigError where so many are too many, or cannot be in the rest of the file."""
        if count > most:
            self._fail(f"it claims {count} {what}; at most {most} are read")
        if count * least_bytes > self.size - self.place:
            self._fail(
                f"it claims {count} {what}, more than fit into the file: it is damaged, or the "
                "download is not complete"
            )
        if count * least_bytes > self.here - self.place:
            self._fail_short()

    def _fail_short(self) -> NoReturn:
        if self.here < self.size:
            self._fail(
                f"its metadata does not end within its first {self.here} bytes, and no more are "
                "fetched to describe it"
            )
        self._fail("it ends in the middle of its metadata: the download is not complete")

    def _fail(self, reason: str) -> NoReturn:
        raise ConfigError(
            f"{self.path.name} is no GGUF file that can be read: {reason}.", param="model"
        )


def _bytes_at(descriptor: int, place: int, count: int) -> bytes:
    """Return bytes of a file; fewer where it ends. Raises OSError."""
    found = os.pread(descriptor, count, place)
    while len(found) < count:
        more = os.pread(descriptor, count - len(found), place + len(found))
        if not more:
            break
        found += more
    return found


def _is_alignment(value: int) -> bool:
    return 1 <= value <= MOST_ALIGNMENT and not value & (value - 1)
