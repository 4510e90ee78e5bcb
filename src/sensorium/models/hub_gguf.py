"""GGUF files of a repository of the Hugging Face hub, of which the beginnings alone are fetched."""

from __future__ import annotations

import tempfile
from pathlib import Path

from sensorium.config import ModelConfig
from sensorium.errors import ConfigError
from sensorium.models.gguf import split
from sensorium.models.gguf.reader import GgufFile
from sensorium.models.loading import checkpoint, hub, weight_files

GGUF_BEGINNING = 64 << 20
"""Bytes of a GGUF file that are fetched to read its metadata, which takes a few MiB."""
GGUF_PART_BEGINNING = 1 << 20
"""Bytes of each of its further parts, which have a table of tensors alone."""


def beginning(
    model: str, file: str, param: str, options: ModelConfig
) -> tuple[GgufFile, list[hub.HubFile]]:
    """Return the metadata of a GGUF file of a repository, and its parts: itself if it has none."""
    names = split.part_names(file)
    parts = _listed(model, names, param, options)
    with tempfile.TemporaryDirectory() as folder:
        for place, part in enumerate(parts):
            size = min(part.size, GGUF_PART_BEGINNING if place else GGUF_BEGINNING)
            data = hub.beginning(model, part.name, options.revision, size)
            (Path(folder) / Path(part.name).name).write_bytes(data)
        sizes = {Path(part.name).name: part.size for part in parts}
        return split.read(Path(folder) / Path(file).name, sizes), parts


def encoder(model: str, options: ModelConfig) -> tuple[GgufFile | None, list[hub.HubFile]]:
    """Return the file of the vision encoder that is named, here or in the repository, if any is."""
    if options.mmproj is None:
        return None, []
    path = Path(options.mmproj).expanduser()
    if path.is_file():
        return split.read(path), [hub.HubFile(path.name, path.stat().st_size, True)]
    return beginning(model, options.mmproj, "mmproj", options)


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
