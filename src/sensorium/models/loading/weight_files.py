"""Selection of the files of a folder that are the checkpoint's weights. No torch."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sensorium.errors import ConfigError

logger = logging.getLogger(__name__)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_LISTED = 6
SAMPLES, SAMPLE_BYTES = 256, 4096
"""Pieces of a file, at equal distances, by which its content is told, and their size."""
MOST_HEADER = 100 << 20
"""Bytes of a header of safetensors, as the format limits them."""
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
"""Names of files in the hub's cache: git's digest of small ones, SHA-256 of large ones."""


@dataclass(frozen=True, slots=True)
class FileState:
    """A file of a checkpoint as it was found: what changes when its content does."""

    path: Path
    size: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Return the state of a file now. Raises OSError."""
        status = path.stat()
        return cls(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    def identity(self) -> bytes:
        """Return a digest of size, times and samples of the content. Raises OSError.

        Times alone do not tell files apart on file systems that have none, such as those of images.
        The name does not count.
        """
        digest = hashlib.sha256(repr((self.size, self.modified_ns, self.changed_ns)).encode())
        digest.update(self.content())
        return digest.digest()

    def content(self) -> bytes:
        """Return a digest of size and samples, the same for copies. Raises OSError."""
        digest = hashlib.sha256(str(self.size).encode())
        with self.path.open("rb", buffering=0) as file:
            last = max(0, self.size - SAMPLE_BYTES)
            for start in sorted({last * index // (SAMPLES - 1) for index in range(SAMPLES)}):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
        return digest.digest()


def identity_of_checkpoint(folder: Path) -> str:
    """Return a digest of a checkpoint's configuration and safetensors files.

    A file of the hub's cache is told by the digest of its whole content, which is its name there.
    Others are told by name, size, time of change, header and samples: the same for copies that
    keep the time. Empty where there are no weights, or a file cannot be read.
    """
    weights = sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    try:
        for path in [*sorted(folder.glob("*.json")), *weights]:
            real = path.resolve()
            is_blob = real.parent.name == "blobs" and _BLOB.fullmatch(real.name) is not None
            what = real.name.encode() if is_blob else _file_identity(path)
            digest.update(repr((path.name, what)).encode())
    except OSError:
        return ""
    return digest.hexdigest() if weights else ""


def identity_of_files(paths: Sequence[Path]) -> str:
    """Return a digest of files of weights, such as GGUF, by size, time of change and samples.

    The same for copies that keep the time. Empty where a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for path in paths:
            state = FileState.of(path)
            digest.update(repr((path.name, state.size, state.modified_ns)).encode())
            digest.update(state.content())
    except OSError:
        return ""
    return digest.hexdigest()


def _file_identity(path: Path) -> bytes:
    """Return a digest of a file that is no blob of the hub's cache. Raises OSError."""
    if path.suffix == ".json":
        return hashlib.sha256(path.read_bytes()).digest()
    state = FileState.of(path)
    digest = hashlib.sha256(repr((state.size, state.modified_ns)).encode())
    with path.open("rb") as file:
        # Eight bytes of length, then names, types, shapes and offsets.
        digest.update(file.read(min(int.from_bytes(file.read(8), "little"), MOST_HEADER)))
    digest.update(state.content())
    return digest.digest()


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint: ``model.safetensors``, else those of its index.

    Nothing else in the folder counts: adapters, optimizer states, averaged or previous copies. A
    second candidate is ignored with a warning. Raises ConfigError when there is none, when the
    index cannot be read, or when it names a file that does not exist.
    """
    single, index = folder / SINGLE, folder / INDEX
    indexed = index_names(folder)
    if single.is_file() and SINGLE not in (indexed or ()):
        present = [name for name in indexed or () if (folder / name).is_file()]
        if present:
            logger.warning(
                "The model's folder has %s, and %s with %d files (%s). %s is loaded and the others "
                "are ignored: delete whichever is out of date.",
                SINGLE,
                INDEX,
                len(present),
                abbreviated(present),
                SINGLE,
            )
        return [single]
    if indexed is None:
        raise ConfigError(_nothing_there(folder), param="model")
    absent = [name for name in indexed if not (folder / name).is_file()]
    if absent:
        raise ConfigError(
            listing(f"of the files that {index.name} names are missing", absent)
            + ": the download is not complete.",
            param="model",
        )
    return [folder / name for name in indexed]


def index_names(folder: Path) -> list[str] | None:
    """Return the files that the index of a checkpoint names, sorted; None without an index.

    Raises ConfigError for an index that cannot be read, or names files outside the folder.
    """
    weights = indexed_weights(folder)
    if weights is None:
        return None
    names = sorted(set(weights.values()))
    outside = [name for name in names if not _is_beside(name)]
    if outside:
        what = f"of the names in {INDEX} of the model are no files of its folder"
        raise ConfigError(f"{listing(what, outside)}.", param="model")
    return names


def indexed_weights(folder: Path) -> dict[str, str] | None:
    """Return the file of each weight, by the checkpoint's own names; None without an index."""
    index = folder / INDEX
    if not index.is_file():
        return None
    try:
        weights = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weights.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{index.name} of the model cannot be read.", param="model") from error


def weight_names(folder: Path) -> list[str] | None:
    """Return the names of a checkpoint's weights, from its one file, else from its index.

    None where neither exists, or the one file is damaged (loading it raises the error). In a folder
    of the hub's cache only the index is read, so that the result does not depend on whether the
    weights were downloaded before.
    """
    single = folder / SINGLE
    if single.is_file() and folder.parent.name != "snapshots":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(single), framework="numpy") as file:
                return list(file.keys())
        except (SafetensorError, OSError):
            return None
    weights = indexed_weights(folder)
    return None if weights is None else list(weights)


def _nothing_there(folder: Path) -> str:
    """Explain why a folder without ``model.safetensors`` and index has no loadable weights."""
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return (
            f"The model's folder has neither {SINGLE} nor {INDEX}, which say what the weights are. "
            f"Its other safetensors files ({abbreviated(others)}) are not loaded: adapters, "
            "optimizer states and copies look the same. Rename the one that is the model to "
            f"{SINGLE}; for shards, add the index written with them."
        )
    if folder.parent.name == "snapshots":
        return (
            "The model's repository on the Hugging Face hub has no safetensors files, that is "
            f"neither {SINGLE} nor {INDEX}, or they are not in the local cache and HF_HUB_OFFLINE "
            "is set. Unset it, or take a repository that has them, or use load_format='dummy' for "
            "random weights."
        )
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        return (
            "The model has its weights as pickle files (.bin, .pth) only. Safetensors files are "
            "needed: take a revision that has them, or convert it with transformers "
            "(from_pretrained, then save_pretrained)."
        )
    return (
        "The model's folder has no safetensors files. Add them, or use load_format='dummy' for "
        "random weights."
    )


def _is_beside(name: str) -> bool:
    """Return whether a name stays within the folder.

    Links are followed: the hub's cache consists of them.
    """
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts


def listing(what: str, names: Sequence[str]) -> str:
    """Return text such as ``3 are missing (a, b, c)``; empty where there are no names."""
    return f"{len(names)} {what} ({abbreviated(names)})" if names else ""


def abbreviated(names: Sequence[str]) -> str:
    """Return the first names, and the number of the others."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
