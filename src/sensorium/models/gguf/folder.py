"""A model folder for a GGUF file: configuration, tokenizer and templates written from its metadata.

Everything that reads a model's folder then reads that of a GGUF file, too: the HTTP process, the
engine, media workers, grammars. The weights stay in the file. Folders are private to the user, in
the folder of caches; the key is the file's path, size and times, and the sources that write them.
A process holds a shared lock on the mark of each folder that it uses, so that no other removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from sensorium.environment import cache_root, make_private
from sensorium.errors import ConfigError
from sensorium.models.gguf import reader, split
from sensorium.models.gguf.config import config_of, sampling_of
from sensorium.models.gguf.encoders.find import with_vision

FOLDER = "sensorium-gguf-1"
MARK = "gguf.json"
MOST_FOLDERS = 32
"""Folders that are kept; those that were used least recently, and are not in use, make room."""
MOST_HELD = 16
"""Folders that one process holds against removal; those that it asked for last."""
_TRASH = ".trash"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)
_WRITING_SECONDS = 3600
"""Age from which on a folder without mark is what an ended process left."""

_held: dict[Path, int] = {}  # descriptors of marks, each with a shared lock
_holding = threading.Lock()


def folder_of(path: Path, encoder: Path | None = None) -> Path:
    """Return the folder of a file's model, and write it where there is none yet.

    It stays while this process lives. encoder: the file of its vision encoder. Raises ConfigError
    for a file that cannot be read and a disk that cannot be written, UnsupportedModelError for a
    model that does not run.
    """
    path = path.expanduser().absolute()
    encoder = None if encoder is None else encoder.expanduser().absolute()
    root = _root()
    parts = [_state(own, "model") for own in split.present(path)]
    states = (str(path), parts, encoder and _state(encoder, "mmproj"))
    key = hashlib.sha256(repr((states, _sources_digest())).encode()).hexdigest()[:32]
    target = root / key
    if _hold(target):
        with contextlib.suppress(OSError):
            os.utime(target)  # the time of its last use
        return target
    try:
        part = Path(tempfile.mkdtemp(dir=root, prefix=f"{key}."))
        try:
            _write(part, split.read(path), None if encoder is None else split.read_encoder(encoder))
            _place(part, target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise ConfigError(
            f"The configuration of {path.name} cannot be written to {root} "
            f"({error.strerror or type(error).__name__}): free some space there, or set "
            "XDG_CACHE_HOME to a folder that can be written.",
            param="model",
        ) from error
    _prune(root)
    return target


def _place(part: Path, target: Path) -> None:
    """Give a folder that was written its name, and hold it; another process may be first.

    What has the name and no mark is what remains of a folder, and goes. Raises OSError.
    """
    for _ in range(2):
        with contextlib.suppress(OSError):
            part.rename(target)
        if _hold(target):
            return
        _remove(target)
    part.rename(target)
    _hold(target)


def _hold(target: Path) -> bool:
    """Hold a folder against removal for as long as this process lives.

    Returns false where there is no such folder, or none with a mark.
    """
    with _holding:
        try:
            mark = os.open(target / MARK, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(mark, fcntl.LOCK_SH)
        if not _is_at(mark, target / MARK):  # it was removed meanwhile
            os.close(mark)
            return False
        before = _held.pop(target, None)
        if before is not None:
            os.close(before)
        _held[target] = mark
        while len(_held) > MOST_HELD:
            os.close(_held.pop(next(iter(_held))))
        return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether a path is that of an open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


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
        config, files = with_vision(file, encoder, config)
        contents |= files
    made, tokenizer_config, ends = tokenizer.files_of(file)
    templates = tokenizer.templates_of(file)
    if templates:
        named = [{"name": name, "template": text} for name, text in templates.items()]
        tokenizer_config["chat_template"] = named
    (folder / "tokenizer.json").write_text(made.to_str(pretty=False), encoding="utf-8")
    contents |= {
        "config.json": config,
        "tokenizer_config.json": tokenizer_config,
        "generation_config.json": sampling_of(file) | ({"eos_token_id": ends} if ends else {}),
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
    """Remove the folders that were used least recently and are free, as far as there are too many.

    What cannot be removed stays.
    """
    found = []
    with contextlib.suppress(OSError):
        for path in root.iterdir():
            with contextlib.suppress(OSError):
                found.append((path.stat().st_mtime, path))
    trash = [path for _, path in found if path.name.endswith(_TRASH)]
    for path in trash:
        shutil.rmtree(path, ignore_errors=True)
    too_many = len(found) - len(trash) - MOST_FOLDERS
    for used, path in sorted(own for own in found if own[1] not in trash):
        if too_many <= 0:
            break
        too_many -= _remove(path, time.time() - used)


def _remove(folder: Path, age: float = math.inf) -> bool:
    """Remove a folder unless a process uses or writes it. Its name is free at once.

    age: seconds since its last use. Returns whether it is gone.
    """
    with contextlib.ExitStack() as stack:
        try:
            mark = os.open(folder / MARK, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, mark)
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            if age <= _WRITING_SECONDS:
                return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                return False
        trash = folder.with_name(f"{folder.name}.{time.time_ns()}{_TRASH}")
        try:
            folder.rename(trash)
        except OSError:
            return False
    shutil.rmtree(trash, ignore_errors=True)
    return True


@functools.cache
def _sources_digest() -> str:
    """Return the digest of the sources that write folders."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
