"""A model folder for a GGUF file: configuration, tokenizer and templates written from its metadata.

Everything that reads a model's folder then reads that of a GGUF file, too: the HTTP process, the
engine, media workers, grammars. The weights stay in the file. Folders are private to the user, in
the folder of caches; the key is the file's path, size and times, and the sources that write them.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from sensorium.environment import cache_root, make_private
from sensorium.errors import ConfigError
from sensorium.models.gguf import reader
from sensorium.models.gguf.config import config_of
from sensorium.models.gguf.vision import with_vision

FOLDER = "sensorium-gguf-1"
MARK = "gguf.json"
MOST_FOLDERS = 32
"""Folders that are kept; those that were used least recently make room."""


def folder_of(path: Path, encoder: Path | None = None) -> Path:
    """Return the folder of a file's model, and write it where there is none yet.

    encoder: the file of its vision encoder. Raises ConfigError for a file that cannot be read,
    UnsupportedModelError for a model that does not run.
    """
    path = path.expanduser().absolute()
    encoder = None if encoder is None else encoder.expanduser().absolute()
    root = _root()
    states = (_state(path, "model"), encoder and _state(encoder, "mmproj"))
    key = hashlib.sha256(repr((states, _sources_digest())).encode()).hexdigest()[:32]
    target = root / key
    if (target / MARK).is_file():
        with contextlib.suppress(OSError):
            os.utime(target)  # the time of its last use
        return target
    part = Path(tempfile.mkdtemp(dir=root, prefix=f"{key}."))
    try:
        _write(part, reader.read(path), None if encoder is None else reader.read(encoder))
        with contextlib.suppress(OSError):  # another process was first
            part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    _prune(root)
    return target


def file_of(folder: str | Path) -> Path | None:
    """Return the GGUF file that a folder was written for; None for any other folder.

    Only folders of this module count: another could name any file.
    """
    return _marked(folder, "file")


def encoder_of(folder: str | Path) -> Path | None:
    """Return the file of the vision encoder of a folder's model; None where there is none."""
    return _marked(folder, "mmproj")


def _marked(folder: str | Path, name: str) -> Path | None:
    folder = Path(folder)
    if folder.parent.name != FOLDER or folder.parent not in _roots():
        return None
    try:
        found = json.loads((folder / MARK).read_text(encoding="utf-8"))[name]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Path(found) if isinstance(found, str) else None


def _state(path: Path, param: str) -> tuple[object, ...]:
    """Return what changes when a file does. Raises ConfigError where there is none."""
    try:
        status = path.stat()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ConfigError(f"{path.name} cannot be read: {reason}.", param=param) from error
    times = status.st_mtime_ns, status.st_ctime_ns
    return (str(path), status.st_ino, status.st_size, *times)


def _write(folder: Path, file: reader.GgufFile, encoder: reader.GgufFile | None) -> None:
    """Write the files of a model."""
    # Not before it is needed: the module imports the tokenizers' library.
    from sensorium.models.gguf import tokenizer

    config, contents = config_of(file), dict[str, Any]()
    if encoder is not None:
        config, processor = with_vision(file, encoder, config)
        contents["preprocessor_config.json"] = processor
    made, tokenizer_config, ends = tokenizer.files_of(file)
    templates = tokenizer.templates_of(file)
    if templates:
        named = [{"name": name, "template": text} for name, text in templates.items()]
        tokenizer_config["chat_template"] = named
    made.save(str(folder / "tokenizer.json"), pretty=False)
    contents |= {
        "config.json": config,
        "tokenizer_config.json": tokenizer_config,
        "generation_config.json": {"eos_token_id": ends} if ends else {},
        MARK: {"file": str(file.path), "mmproj": encoder and str(encoder.path)},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def _roots() -> tuple[Path, ...]:
    """Return where folders are: among the user's caches, else among temporary files."""
    root = cache_root()
    own = Path(tempfile.gettempdir()) / f"sensorium-{os.geteuid()}" / FOLDER
    return (root / "sensorium" / FOLDER, own) if root.is_absolute() else (own,)


def _root() -> Path:
    """Return the first of these places that can be written. Raises ConfigError for none."""
    error: OSError | None = None
    for root in _roots():
        try:
            root.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            make_private(root)
            if os.access(root, os.W_OK | os.X_OK):
                return root
        except OSError as raised:
            error = raised
    raise ConfigError(
        "There is no folder to write the configuration of a GGUF file to "
        f"({error or 'it cannot be written'}): set XDG_CACHE_HOME to one that can be written."
    )


def _prune(root: Path) -> None:
    """Remove the folders that were used least recently, as far as there are too many."""
    found = []
    for path in root.iterdir():
        with contextlib.suppress(OSError):
            found.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(found)[: max(0, len(found) - MOST_FOLDERS)]:
        shutil.rmtree(path, ignore_errors=True)


@functools.cache
def _sources_digest() -> str:
    """Return the digest of the sources that write folders."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
