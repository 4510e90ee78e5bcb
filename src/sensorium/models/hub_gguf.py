"""GGUF files of a repository of the Hugging Face hub, of which the beginnings alone are fetched."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sensorium.config import ModelConfig
from sensorium.errors import ConfigError
from sensorium.models.gguf import config, split
from sensorium.models.gguf.reader import GgufFile, TensorInfo
from sensorium.models.loading import checkpoint, hub, weight_files

GGUF_BEGINNING = 64 << 20
"""Bytes of a GGUF file that are fetched to read its metadata, which takes a few MiB."""
GGUF_PART_BEGINNING = 1 << 20
"""Bytes of each of its further parts, which have a table of tensors alone."""
MOST_FACTORS_BYTES = 1 << 16
"""Bytes of a tensor of rotary factors; models have some hundreds of them."""


def beginning(model: str, file: str, options: ModelConfig) -> tuple[GgufFile, list[hub.HubFile]]:
    """Return the metadata of a GGUF file of a repository, and its parts: itself if it has none.

    Raises ConfigError, before anything is asked for, where it is a part and not the first.
    """
    split.check_first(file)
    parts = _listed(model, split.part_names(file), "model", options)
    with _fetched(model, parts, options) as folder:
        sizes = {Path(part.name).name: part.size for part in parts}
        return split.read(folder / Path(file).name, sizes), parts


def config_of(
    file: GgufFile, model: str, parts: list[hub.HubFile], options: ModelConfig
) -> dict[str, Any]:
    """Return the configuration of a file of which ``beginning`` was fetched. Raises ConfigError.

    Factors of rotary positions are tensors, which may lie anywhere: each is fetched by itself.
    """

    def read(info: TensorInfo) -> bytes:
        part = parts[info.part].name
        if info.nbytes > MOST_FACTORS_BYTES:
            reason = f"{info.name} has {info.nbytes} bytes; at most {MOST_FACTORS_BYTES} are read"
            raise ConfigError(f"{part}: {reason}.", param="model")
        return hub.piece(model, part, options.revision, info.start, info.nbytes)

    return config.config_of(file, read)


def encoder(model: str, options: ModelConfig) -> tuple[GgufFile | None, list[hub.HubFile]]:
    """Return the file of the vision encoder that is named, here or in the repository, if any is."""
    if options.mmproj is None:
        return None, []
    path = Path(options.mmproj).expanduser()
    if path.is_file():
        return split.read_encoder(path), [hub.HubFile(path.name, path.stat().st_size, True)]
    parts = _listed(model, [options.mmproj], "mmproj", options)
    with _fetched(model, parts, options) as folder:
        return split.read_encoder(folder / Path(options.mmproj).name, parts[0].size), parts


@contextmanager
def _fetched(model: str, parts: list[hub.HubFile], options: ModelConfig) -> Iterator[Path]:
    """Fetch the beginnings of a file's parts into a folder, which goes in the end."""
    with tempfile.TemporaryDirectory() as folder:
        for place, part in enumerate(parts):
            size = min(part.size, GGUF_PART_BEGINNING if place else GGUF_BEGINNING)
            data = hub.beginning(model, part.name, options.revision, size)
            (Path(folder) / Path(part.name).name).write_bytes(data)
        yield Path(folder)


def _listed(model: str, files: list[str], param: str, options: ModelConfig) -> list[hub.HubFile]:
    """Return GGUF files of a repository. Raises ConfigError about ``param`` if one is not there."""
    listed = hub.files(model, options.revision, download_dir=options.download_dir)
    found = {own.name: own for own in listed}
    missing = next((file for file in files if file not in found), None)
    if missing is not None:
        others = [name for name in found if name.endswith(checkpoint.GGUF)]
        has = weight_files.listing("others", others)
        raise ConfigError(f"Model {model!r} has no file {missing!r}; it has {has}.", param=param)
    return [found[file] for file in files]
