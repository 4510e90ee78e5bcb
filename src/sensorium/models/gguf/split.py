"""GGUF files in several parts, as ``gguf-split`` of llama.cpp and its conversions write them.

The parts ``NAME-00001-of-00003.gguf`` and so on lie in one folder. The first has the metadata of
the model; each has its own tensors, and ``split.no``, ``split.count`` and ``split.tensors.count``.
Source: ``tools/gguf-split`` and ``llama_split_path`` of llama.cpp.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from sensorium.errors import ConfigError
from sensorium.models.gguf import reader
from sensorium.models.gguf.reader import GgufFile, TensorInfo

MOST_PARTS = 256
MOST_METADATA_BYTES = 1 << 25
"""Bytes up to the first tensor of a part that is not the first."""
_NAME = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})(?P<end>\.gguf)")


def part_names(name: str) -> list[str]:
    """Return the names of all parts of a file, by that of one: the name alone where it has none.

    A name may have folders before it, as in a repository.
    """
    found = _NAME.fullmatch(name)
    if found is None or not 1 <= int(found["count"]) <= MOST_PARTS:
        return [name]
    stem, count, end = found["stem"], found["count"], found["end"]
    return [f"{stem}-{number:05}-of-{count}{end}" for number in range(1, int(count) + 1)]


def present(path: Path) -> list[Path]:
    """Return the paths of a file's parts that are there, by name; its own if there are none."""
    found = [path.with_name(name) for name in part_names(path.name)]
    return [own for own in found if own.is_file()] or [path]


def is_first(name: str) -> bool:
    """Return whether a file, by its name, is the first part or in no parts."""
    return part_names(name)[0] == name


def check_first(name: str) -> None:
    """Raise ConfigError for the name of a part of a file that is not the first."""
    first = part_names(name)[0]
    if first != name:
        raise ConfigError(f"{name} is a part of a file: name its first, {first}.", param="model")


def read_encoder(path: Path, size: int | None = None) -> GgufFile:
    """Read the metadata and the tensor table of an encoder's file, which is in no parts.

    size: bytes of the whole file, where only its beginning is here. Raises ConfigError as
    ``reader.read`` does, and for a part.
    """
    file = reader.read(path, size)
    count = _number(file, "split.count", 1)
    if count > 1:
        raise ConfigError(
            f"{path.name} is one of {count} parts, and an encoder (mmproj) is read from one file: "
            "join them (gguf-split --merge).",
            param="mmproj",
        )
    return file


def read(path: Path, sizes: Mapping[str, int] | None = None) -> GgufFile:
    """Read the metadata and tensor tables of a file and of all its parts.

    sizes: bytes of whole files by name, where only their beginnings are here. Raises ConfigError as
    ``reader.read`` does, and for parts that are missing or do not belong together.
    """
    sizes = sizes or {}
    first = reader.read(path, sizes.get(path.name))
    count = _number(first, "split.count", 1)
    if count == 1:
        return first
    names = part_names(path.name)
    if len(names) != count:
        _bad(
            first,
            f"is one of {count} parts, and its name is not that of one: give the parts their names "
            f"back (NAME-00001-of-{min(count, 99999):05}.gguf), at most {MOST_PARTS} in one folder",
        )
    check_first(path.name)
    files = [first, *(_part(path.with_name(name), sizes.get(name)) for name in names[1:])]
    for place, file in enumerate(files):
        if _number(file, "split.no", 0) != place or _number(file, "split.count", 1) != count:
            _bad(file, f"does not say that it is part {place + 1} of {count}")
    return _joined(files)


def _part(path: Path, size: int | None) -> GgufFile:
    """Read a part that is not the first. Raises ConfigError that names a missing one."""
    if not path.is_file():
        raise ConfigError(
            f"The part {path.name} is missing: all parts of a GGUF file lie in one folder.",
            param="model",
        )
    file = reader.read(path, size, MOST_METADATA_BYTES)
    # The rest of its metadata is not used, and need not stay in memory.
    own = {name: value for name, value in file.metadata.items() if name.startswith("split.")}
    return dataclasses.replace(file, metadata=own)


def _joined(files: list[GgufFile]) -> GgufFile:
    """Return the parts as one file. Raises ConfigError for tensors that are twice or missing."""
    first, tensors = files[0], dict[str, TensorInfo]()
    for place, file in enumerate(files):
        if len(tensors) + len(file.tensors) > reader.MOST_TENSORS:
            _bad(file, f"has, with the parts before it, more than {reader.MOST_TENSORS} tensors")
        twice = next((name for name in file.tensors if name in tensors), None)
        if twice is not None:
            _bad(file, f"has the tensor {twice!r:.80}, and so has a part before it")
        for name, info in file.tensors.items():
            tensors[name] = dataclasses.replace(info, part=place)
    wanted = first.metadata.get("split.tensors.count", len(tensors))
    if wanted != len(tensors):
        _bad(first, f"has {len(tensors)} tensors in its parts, and says that it has {wanted!r:.40}")
    parts = tuple((file.path, file.size) for file in files[1:])
    return dataclasses.replace(first, tensors=tensors, more=parts)


def _number(file: GgufFile, name: str, default: int) -> int:
    value = file.metadata.get(name, default)
    if type(value) is not int or not 0 <= value < 1 << 16:
        _bad(file, f"has {value!r:.40} as {name}")
    return max(value, 1) if name == "split.count" else value


def _bad(file: GgufFile, reason: str) -> NoReturn:
    raise ConfigError(f"{file.path.name} {reason}.", param="model")
