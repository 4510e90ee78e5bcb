"""Precomputed embeddings from clients: safetensors or ``torch.save`` files to dense tensors.

Nothing is executed. A ``torch.save`` file is a zip archive with a pickle and raw storages. The
pickle is not given to Python's unpickler but read by ``_PickleReader``, which knows only the
instructions that a file of dense tensors needs and builds plain values. Storage sizes, offsets and
strides are checked before memory is touched.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from sensorium.errors import InvalidEmbeddingsError, MediaUndecodableError
from sensorium.multimodal.fetch.data_url import decode_base64
from sensorium.multimodal.items import is_tensor
from sensorium.multimodal.parse.data import are_numbers

_MAX_PICKLE_BYTES = 1 << 16
_MAX_DIMENSIONS = 8
_MAX_TENSORS = 16
_MAX_HEADER_BYTES = 1 << 16
_MAX_RECORDS = 1024
_RECORD_MARK = b"PK\x01\x02"

_STORAGES = {
    "FloatStorage": ("float32", 4),
    "DoubleStorage": ("float64", 8),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
}


def decode_embeddings(source: Any, *, max_bytes: int) -> Any:
    """Return dense torch tensors for a tensor, base64 text, or a mapping or list of those.

    The result has the same form, as ``Processor.embeddings`` takes it; numbers in mappings, such as
    sizes, stay numbers. Raises InvalidEmbeddingsError, or MediaTooLargeError beyond ``max_bytes``.
    """
    if isinstance(source, Mapping):
        return {
            str(name): value
            if are_numbers(value)
            else decode_embeddings(value, max_bytes=max_bytes)
            for name, value in source.items()
        }
    if isinstance(source, list | tuple):
        return [decode_embeddings(member, max_bytes=max_bytes) for member in source]
    if isinstance(source, str):
        try:
            data = decode_base64(source.partition("base64,")[2] or source, max_bytes)
        except MediaUndecodableError as error:
            raise InvalidEmbeddingsError(error.message) from None
        source = _from_file(data)
        if isinstance(source, Mapping):
            return {name: _dense(tensor) for name, tensor in source.items()}
        return _dense(source)
    return _dense(
        source
    ).clone()  # the caller may change the tensor; the cached one must not change


def _dense(value: Any) -> Any:
    if not is_tensor(value):
        _bad(f"Embeddings must be torch tensors, got {type(value).__name__}")
    torch = sys.modules["torch"]
    if value.layout != torch.strided or value.is_nested or value.is_meta:
        _bad("Embeddings must be dense tensors, not sparse, nested or without data")
    if value.is_quantized or value.is_complex():
        _bad(f"Embeddings must be real numbers, got a tensor of {value.dtype}")
    return value.detach()


def _from_file(data: bytes) -> Any:
    if data[:4] == b"PK\x03\x04":
        return _read_torch_file(data)
    if data[8:9] == b"{":
        return _read_safetensors(data)
    raise InvalidEmbeddingsError(
        "The data are neither a safetensors file nor one of torch.save (in its zip format)."
    )


def _read_safetensors(data: bytes) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load

    if int.from_bytes(data[:8], "little") > _MAX_HEADER_BYTES:  # millions of tensors without data
        _bad(f"The safetensors file has a header of more than {_MAX_HEADER_BYTES} bytes")
    try:
        tensors = load(data)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError):
        raise InvalidEmbeddingsError("The safetensors file is damaged.") from None
    if not tensors:
        _bad("The safetensors file holds no tensor")
    if len(tensors) > _MAX_TENSORS:
        _bad(f"The safetensors file holds {len(tensors)} tensors; at most {_MAX_TENSORS} are read")
    return next(iter(tensors.values())) if len(tensors) == 1 else tensors


# --- torch.save -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Name:
    """A class or function that the pickle names; never looked up."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    """A raw storage of the archive; ``key`` names its record."""

    dtype: str
    item_bytes: int
    key: str
    num_items: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.storage.item_bytes


def _read_torch_file(data: bytes) -> Any:
    if (
        data.count(_RECORD_MARK) > _MAX_RECORDS
    ):  # each would be an object before any can be looked at
        _bad("The torch.save file holds more records than tensors need")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            if any(info.compress_type != zipfile.ZIP_STORED for info in records.values()):
                _bad("The torch.save file is compressed, which torch.save does not do")
            if "data.pkl" not in records or records["data.pkl"].file_size > _MAX_PICKLE_BYTES:
                _bad("The torch.save file has no data.pkl of a reasonable size")
            if "byteorder" in records and archive.read(records["byteorder"]) != b"little":
                _bad("The torch.save file is not little-endian")
            content = _PickleReader().read(archive.read(records["data.pkl"]))
            tensors = content if isinstance(content, dict) else {"": content}
            _check_tensors(tensors, len(data))
            built: dict[str, Any] = dict.fromkeys(tensors)
            for key in {
                tensor.storage.key for tensor in tensors.values()
            }:  # one in memory at a time
                record = records.get(f"data/{key}")
                raw = bytearray() if record is None else bytearray(archive.read(record))
                for name, tensor in tensors.items():
                    if tensor.storage.key == key:
                        built[name] = _build_tensor(tensor, raw)
            return built if isinstance(content, dict) else built[""]
    except InvalidEmbeddingsError:
        raise
    except (zipfile.BadZipFile, struct.error, EOFError, OSError, RuntimeError, ValueError):
        raise InvalidEmbeddingsError("The torch.save file is damaged.") from None


def _check_tensors(tensors: Mapping[str, Any], file_bytes: int) -> None:
    """Refuse many tensors, and tensors that are together larger than the file."""
    if not tensors or not all(isinstance(tensor, _Tensor) for tensor in tensors.values()):
        _bad("The torch.save file must hold a tensor or a dict of tensors")
    if len(tensors) > _MAX_TENSORS:
        _bad(f"The torch.save file holds {len(tensors)} tensors; at most {_MAX_TENSORS} are read")
    if sum(tensor.num_bytes for tensor in tensors.values()) > file_bytes:
        _bad("The tensors of the torch.save file are larger than the file")


def _build_tensor(tensor: _Tensor, raw: bytearray) -> Any:
    """Build a dense tensor, checked against the size of its storage.

    It is a copy, since a view of one element would keep the storage of millions.
    """
    import torch

    storage = tensor.storage
    if len(raw) != storage.num_items * storage.item_bytes or not raw:
        _bad("A storage of the torch.save file does not have the size that it should")
    num_items, last = 1, tensor.offset
    for size, stride in zip(tensor.shape, tensor.strides, strict=True):
        num_items *= size
        last += (size - 1) * stride
    if not (1 <= num_items <= storage.num_items and last < storage.num_items):
        _bad("A tensor of the torch.save file does not fit its storage")
    flat = torch.frombuffer(raw, dtype=getattr(torch, storage.dtype))
    view = flat.as_strided(tensor.shape, tensor.strides, tensor.offset)
    return view.clone(memory_format=torch.contiguous_format)


class _PickleReader:
    """Reads the pickle of a ``torch.save`` file as data.

    A stack machine for the instructions that describe dense tensors, and dictionaries and tuples of
    plain values. Names of classes stay names. The only calls that it understands, as descriptions,
    are those of torch's rebuilding function and of an empty ordered dictionary.

    A few hundred bytes can describe a tuple of tuples with 2**60 leaves. So no value that may be
    one is hashed, compared in depth or printed: keys and names are checked to be strings first.
    """

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def read(self, data: bytes) -> Any:
        """Return the value that the pickle describes. Raises InvalidEmbeddingsError."""
        try:
            for opcode, argument, _ in pickletools.genops(data):
                if opcode.name == "STOP":
                    return self._stack.pop()
                self._step(opcode.name, argument)
        except InvalidEmbeddingsError:
            raise
        except (IndexError, KeyError, TypeError, ValueError, OverflowError):
            _bad("The pickle of the torch.save file is damaged")
        raise InvalidEmbeddingsError("The pickle of the torch.save file has no end.")

    def _step(self, name: str, argument: Any) -> None:
        if name in _PUSH_ARGUMENT:
            self._stack.append(argument)
        elif name in _PUSH_VALUE:
            self._stack.append(_PUSH_VALUE[name]())
        elif name in _PUSH_TUPLE:
            count = _PUSH_TUPLE[name]
            self._stack[len(self._stack) - count :] = [tuple(self._take(count))]
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        elif name not in ("PROTO", "FRAME"):
            _bad("The torch.save file holds more than dense tensors")

    def _take(self, count: int) -> list[Any]:
        if count > len(self._stack):
            raise IndexError("the stack is too short")
        return self._stack[len(self._stack) - count :]

    def _pop_to_mark(self) -> list[Any]:
        start = self._marks.pop()
        values = self._stack[start:]
        del self._stack[start:]
        return values

    def _mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def _tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._pop_to_mark()))

    def _set_items(self, _: Any) -> None:
        values = self._pop_to_mark()
        self._put_items(zip(values[::2], values[1::2], strict=True))

    def _set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._put_items([(key, value)])

    def _put_items(self, pairs: Any) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict):
            raise TypeError("not a dictionary")
        for key, value in pairs:
            target[_text(key)] = value

    def _remember(self, index: Any) -> None:
        self._memo[len(self._memo) if index is None else index] = self._stack[-1]

    def _recall(self, index: Any) -> None:
        self._stack.append(self._memo[index])

    def _global(self, argument: Any) -> None:
        module, _, name = argument.partition(" ")
        self._stack.append(_Name(module, name))

    def _stack_global(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._stack.append(_Name(_text(module), _text(name)))

    def _persistent(self, _: Any) -> None:
        """Read a storage: ``("storage", type, key, device, number of elements)``."""
        tag, kind, key, _, num_items = self._stack.pop()
        if _text(tag) != "storage" or not isinstance(kind, _Name) or kind.module != "torch":
            raise ValueError("not a storage")
        if kind.name not in _STORAGES:
            _bad(f"Embeddings of storage type {kind.name[:40]!r} are not accepted")
        dtype, item_bytes = _STORAGES[kind.name]
        self._stack.append(_Storage(dtype, item_bytes, _text(key), _count(num_items)))

    def _reduce(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if type(function) is not _Name or type(arguments) is not tuple:
            raise TypeError("not a call")
        if function == _Name("collections", "OrderedDict") and not arguments:
            self._stack.append({})
        elif function == _Name("torch._utils", "_rebuild_tensor_v2"):
            storage, offset, shape, strides = arguments[:4]
            if not isinstance(storage, _Storage) or {type(shape), type(strides)} != {tuple}:
                raise ValueError("not a tensor")
            if len(shape) != len(strides):
                raise ValueError("a size without its stride")
            if len(shape) > _MAX_DIMENSIONS:
                _bad(f"Embeddings have {len(shape)} dimensions; too many")
            sizes, steps = tuple(map(_count, shape)), tuple(map(_count, strides))
            self._stack.append(_Tensor(storage, _count(offset), sizes, steps))
        else:
            _bad("The torch.save file holds more than dense tensors")


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 48:
        raise ValueError("not a count")
    return value


def _text(value: object) -> str:
    if type(value) is not str:
        raise ValueError("not a string")
    return value


_PUSH_ARGUMENT = frozenset(
    ("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE")
)
_PUSH_VALUE: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
}
_PUSH_TUPLE = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_ACTIONS: dict[str, Callable[[_PickleReader, Any], None]] = {
    "MARK": _PickleReader._mark,
    "TUPLE": _PickleReader._tuple,
    "SETITEM": _PickleReader._set_item,
    "SETITEMS": _PickleReader._set_items,
    "BINPUT": _PickleReader._remember,
    "LONG_BINPUT": _PickleReader._remember,
    "MEMOIZE": _PickleReader._remember,
    "BINGET": _PickleReader._recall,
    "LONG_BINGET": _PickleReader._recall,
    "GLOBAL": _PickleReader._global,
    "STACK_GLOBAL": _PickleReader._stack_global,
    "BINPERSID": _PickleReader._persistent,
    "REDUCE": _PickleReader._reduce,
}


def _bad(message: str) -> NoReturn:
    raise InvalidEmbeddingsError(f"{message}.")
