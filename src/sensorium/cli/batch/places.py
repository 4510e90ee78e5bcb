"""Inputs and outputs of batches that are no local files of lines: other formats, file systems.

An input becomes a local file of lines, whose numbers stay the same as long as the input does. So
all that makes a run go on where it stopped holds for them, too. An output is such a file first, and
is converted or copied when the run ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sensorium import environment
from sensorium.config import MediaConfig
from sensorium.errors import ConfigError
from sensorium.processes.private_folder import PrivateFolder
from sensorium.server.batches.urls import without_secrets

_PREFIX = "sensorium-batch-"
_COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Wishes:
    """Options by which rows that are no requests become some.

    Attributes:
        prompt: Text beside each image; None where none is asked for.
        body: Members of the body of each request, below those of a row.
        inline: Images of a local folder are put into the lines, for those who do not have it.
        most_image_bytes: Bytes of the largest image that is put into a line.
    """

    prompt: str | None = None
    body: Mapping[str, Any] = field(default_factory=dict)
    inline: bool = False
    most_image_bytes: int = MediaConfig.max_media_bytes


@dataclass(frozen=True, slots=True)
class Lines:
    """A local file of lines. ``is_made``: this program has written them, not somebody else."""

    path: Path
    is_made: bool


def is_url(name: str) -> bool:
    """Return true for a place that is no path of this machine."""
    return "://" in name and not name.startswith("file://")


def local_path(name: str) -> Path:
    """Return a path of this machine."""
    return Path(name.removeprefix("file://")).expanduser()


def shown(name: str) -> str:
    """Return a place as messages show it."""
    return without_secrets(name) if is_url(name) else name


def is_folder(name: str) -> bool:
    """Return true for a folder of this machine."""
    return not is_url(name) and local_path(name).is_dir()


@contextlib.contextmanager
def lines_of(name: str, wishes: Wishes) -> Iterator[Lines]:
    """Give an input as a file of lines. Raises ConfigError."""
    is_table = name.endswith(".parquet")
    if not (is_url(name) or is_table or is_folder(name)):
        if wishes.prompt is not None or wishes.body:
            raise ConfigError(
                "--prompt and --body are for images and tables; the lines of a file have all in "
                "their bodies.",
                param="prompt",
            )
        yield Lines(local_path(name), is_made=False)
        return
    folder = PrivateFolder("", _PREFIX)
    try:
        path = folder.path / "lines.jsonl"
        with _usable(name):
            is_made = _write_lines(name, path, wishes)
        yield Lines(path, is_made)
    finally:
        folder.close()


@contextlib.contextmanager
def local_output(name: str, *, overwrite: bool) -> Iterator[Path]:
    """Give the file of lines that becomes an output when the block ends. Raises ConfigError."""
    is_table = name.endswith(".parquet")
    if not is_url(name) and not is_table:
        yield local_path(name)
        return
    path = _journal_path(name)
    with _usable(name):
        if is_table:
            from sensorium.cli.batch import tables

            tables.require_pyarrow()
        path.parent.mkdir(parents=True, exist_ok=True)
        if not overwrite:
            _take_up(name, path, is_table=is_table)
    before = _state(path)
    try:
        yield path
    finally:
        with _usable(name):
            # A run that ends before it has written a line leaves what an earlier one delivered.
            if _state(path) != before or not _is_delivered(name, path, is_table=is_table):
                _deliver(path, name, is_table=is_table)


def _state(path: Path) -> tuple[int, int] | None:
    """Return size and time of the lines of an output, None where there are none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return (status.st_size, status.st_mtime_ns) if status.st_size else None


def _is_delivered(name: str, path: Path, *, is_table: bool) -> bool:
    """Return true where an output is there, and is of the lines that are here.

    A run that was killed may have left lines that it had not delivered. Whether a table elsewhere
    is of these lines cannot be told; it counts as delivered.
    """
    known = _state(path)
    if known is None:
        return True
    system, place = _opened(name)
    if not system.exists(place):
        return False
    num_bytes, written_at = known
    if not is_table:
        return bool(system.size(place) == num_bytes)
    return is_url(name) or local_path(name).stat().st_mtime_ns >= written_at


def _is_there(name: str) -> bool:
    system, place = _opened(name)
    return bool(system.exists(place))


def _take_up(name: str, path: Path, *, is_table: bool) -> None:
    """Go on from what an earlier run has delivered, perhaps from another machine.

    Lines that are here stay, unless those that were delivered go on from them: a run that was
    killed had delivered nothing, and may have taken back answers to lines that have changed.

    Raises ConfigError for a table whose lines are not here: it would be replaced.
    """
    if is_table:
        if not path.exists() and _is_there(name):
            raise ConfigError(
                f"{shown(name)!r} is there, but not the lines that it was made of ({path}), "
                "without which no run can go on from it: name another output, or replace it with "
                "--overwrite.",
                param="output",
            )
        return
    system, place = _opened(name)
    known = _state(path)
    if system.exists(place) and system.size(place) > (0 if known is None else known[0]):
        _copy(system, place, path, only_if=_continues)


def _journal_path(name: str) -> Path:
    """Return where the lines of an output are kept: beside a local one, else among the caches."""
    if not is_url(name):
        path = local_path(name)
        return path.with_name(f"{path.name}.jsonl")
    key = hashlib.sha256(name.encode()).hexdigest()[:32]
    return environment.cache_root() / "sensorium" / "batches" / f"{key}.jsonl"


def _write_lines(name: str, path: Path, wishes: Wishes) -> bool:
    """Write an input as lines; return False where they are those of a file elsewhere."""
    from sensorium.cli.batch import tables
    from sensorium.cli.batch.images import Folder

    system, place = _opened(name)
    if name.endswith(".parquet"):
        with system.open(place, "rb") as file, path.open("wb") as target:
            target.writelines(tables.lines_of_table(file, wishes.prompt, wishes.body))
        return True
    if system.isdir(place):
        if wishes.prompt is None:
            raise ConfigError(
                f"{shown(name)!r} is a folder: say with --prompt what is asked about each image.",
                param="prompt",
            )
        folder = Folder(
            system,
            place,
            is_local=not is_url(name),
            inline=wishes.inline or is_url(name),
            most_bytes=wishes.most_image_bytes,
        )
        with path.open("wb") as target:
            target.writelines(folder.lines(wishes.prompt, wishes.body))
        return True
    _copy(system, place, path)
    return False


def _continues(path: Path, known: Path) -> bool:
    """Return true for a file that begins with all that another has."""
    if not known.exists():
        return True
    with path.open("rb") as file, known.open("rb") as before:
        while piece := before.read(_COPY_BYTES):
            if file.read(len(piece)) != piece:
                return False
    return True


def _copy(
    system: Any,
    place: str,
    path: Path,
    only_if: Callable[[Path, Path], bool] = lambda new, old: True,
) -> None:
    """Copy a file; what is there of it when that is broken off does not count.

    ``only_if``: a condition on the copy and the file in whose place it would come.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with system.open(place, "rb") as file, unfinished.open("wb") as target:
            shutil.copyfileobj(file, target, _COPY_BYTES)
        if only_if(unfinished, path):
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _deliver(path: Path, name: str, *, is_table: bool) -> None:
    """Convert or copy the lines that are there. A reader never sees half of an output."""
    from sensorium.cli.batch import tables

    if not path.exists():
        if _is_there(name):  # no line has failed this time
            system, place = _opened(name)
            system.rm_file(place)
        return
    if not is_url(name):
        unfinished = local_path(name).with_name(
            f".{local_path(name).name}.{os.getpid()}.unfinished"
        )
        with unfinished.open("wb") as target:
            tables.write_table(path, target)
        os.replace(unfinished, local_path(name))
        return
    system, place = _opened(name)
    with system.open(place, "wb") as target:
        if is_table:
            tables.write_table(path, target)
        else:
            with path.open("rb") as file:
                shutil.copyfileobj(file, target, _COPY_BYTES)


def _opened(name: str) -> tuple[Any, str]:
    """Return the file system of a place, and its path there."""
    import fsspec

    if not is_url(name):
        return fsspec.filesystem("file"), str(local_path(name).absolute())
    system, place = fsspec.core.url_to_fs(name)
    return system, place


@contextlib.contextmanager
def _usable(name: str) -> Iterator[None]:
    """Raise ConfigError for a place that cannot be used."""
    try:
        yield
    except ConfigError:
        raise
    except ImportError as error:
        raise ConfigError(f"{shown(name)!r} cannot be opened: {error}.") from error
    except Exception as error:  # each file system has errors of its own
        what = without_secrets(str(error), name)[:300]
        raise ConfigError(f"{shown(name)!r} cannot be opened: {what}.") from None
