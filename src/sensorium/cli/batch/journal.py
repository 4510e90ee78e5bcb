"""The two files that a batch writes: each line once, however often the run is interrupted.

The id of an output names its line and has its digest, so the files themselves tell what is done,
and which lines have changed since. A line that was cut off when the process or the machine ended is
removed before the next run goes on.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from sensorium.errors import ConfigError
from sensorium.server.batches.lines import (
    OUTPUT_PREFIX,
    Survey,
    digest_in,
    mark_of,
    number_of,
)

SYNC_SECONDS = 1.0
"""Seconds between two times that the files are forced to the disk."""

_COPY_BYTES = 1 << 20
_BEGINNING = b'{"id":"' + OUTPUT_PREFIX.encode()


class _Entry(msgspec.Struct):
    id: Any = None
    custom_id: Any = None


_entry = msgspec.json.Decoder(_Entry)


class Journal:
    """Files of answers and of errors. Use as a context manager, in one thread at a time.

    Attributes:
        num_done: Lines of the input that have an output.
        num_failed: Those of them that are in the file of errors.
    """

    def __init__(
        self, answers: Path, errors: Path, found: Survey, *, overwrite: bool, rerun_changed: bool
    ) -> None:
        """Open the files and read what they have.

        Args:
            answers: File of answers.
            errors: File of errors.
            found: Facts of the input.
            overwrite: Forget what the files have.
            rerun_changed: Forget the outputs of lines that have changed.

        Raises:
            ConfigError: A file cannot be used, is in use, or has lines of another input; or lines
                have changed since they were answered.
        """
        self.num_done = self.num_failed = 0
        self._changed: list[int] = []
        self._found = found
        self._done = bytearray(len(found.marks))
        self._paths = {True: answers, False: errors}
        self._files: dict[bool, BinaryIO] = {}
        self._synced_at = time.monotonic()
        try:
            for succeeded, path in self._paths.items():
                self._files[succeeded] = self._opened(path)
            if overwrite:  # now that both are this run's
                for file in self._files.values():
                    file.truncate(0)
            for succeeded in self._files:
                self._resume(succeeded)
            if self._changed:
                self._forget_changed(rerun_changed)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            self.sync()
        except ConfigError:
            if kind is None:
                raise
        finally:
            self.close()

    def is_done(self, number: int) -> bool:
        """Return true when the line with this number has an output."""
        return bool(self._done[number])

    def write(self, number: int, succeeded: bool, text: bytes) -> None:
        """Append the output of a line. Raises ConfigError when the disk is full."""
        file = self._files[succeeded]
        try:
            _write_all(file, text)
            self._note(number, succeeded)
            if time.monotonic() - self._synced_at >= SYNC_SECONDS:
                self.sync()
        except OSError as error:
            raise _unusable(self._paths[succeeded], error) from error

    def sync(self) -> None:
        """Force all that was written to the disk. Raises ConfigError."""
        for succeeded, file in self._files.items():
            try:
                os.fsync(file.fileno())
            except OSError as error:
                raise _unusable(self._paths[succeeded], error) from error
        self._synced_at = time.monotonic()

    def close(self) -> None:
        """Close the files, and remove a file of errors without any."""
        for succeeded, file in self._files.items():
            with contextlib.suppress(OSError):
                if not succeeded and os.fstat(file.fileno()).st_size == 0:
                    self._paths[succeeded].unlink(missing_ok=True)
                file.close()
        self._files = {}

    def sort(self) -> None:
        """Put the lines of both files into the order of the input.

        A new file takes the place of the old one when it is whole. Memory: 16 bytes a line.
        """
        for succeeded, path in self._paths.items():
            file = self._files[succeeded]
            starts, ends = self._places(file)
            if all(a <= b for a, b in itertools.pairwise(s for s in starts if s >= 0)):
                continue

            def in_order(target: BinaryIO, file: BinaryIO = file) -> None:
                for start, end in zip(starts, ends, strict=True):  # noqa: B023
                    if start >= 0:
                        _copy(file, target, start, end)

            _replace(path, in_order)

    def _opened(self, path: Path) -> BinaryIO:
        try:
            file = path.open("a+b", buffering=0)
        except OSError as error:
            raise _unusable(path, error) from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise ConfigError(f"{str(path)!r} is being written by another run.") from error
        return file

    def _resume(self, succeeded: bool) -> None:
        """Note which lines a file has, and cut off an incomplete last one."""
        file, path = self._files[succeeded], self._paths[succeeded]
        end = 0
        for line, at_end in _lines_of(file):
            number = None if at_end and not line.endswith(b"\n") else self._number(line)
            if number is None:
                if not (at_end and _is_torn(line)):
                    raise ConfigError(
                        f"{str(path)!r} has lines that are not of this input; choose another "
                        "file, or use --overwrite."
                    )
                file.truncate(end)
                break
            if self._done[number]:
                raise ConfigError(
                    f"{str(path)!r} has line {number} twice; choose another file, or use "
                    "--overwrite."
                )
            if self._has_changed(number, line):
                self._changed.append(number)
            else:
                self._note(number, succeeded)
            end += len(line)

    def _has_changed(self, number: int, line: bytes) -> bool:
        """Return true where an output is for other contents; those without a digest are not."""
        digest, own = digest_in(_entry.decode(line).id), self._found.digests[number]
        return digest != own and digest != 0

    def _forget_changed(self, rerun: bool) -> None:
        """Remove the outputs of lines that have changed. Raises ConfigError unless ``rerun``."""
        if not rerun:
            files = " and ".join(repr(str(path)) for path in self._paths.values())
            raise ConfigError(
                f"{len(self._changed)} lines of the input, line {min(self._changed)} first, have "
                f"changed since they were answered in {files}: use --rerun-changed to run them "
                "again in place of those answers, or choose another output.",
                param="rerun_changed",
            )
        for succeeded, path in self._paths.items():
            file = self._files[succeeded]

            def unchanged(target: BinaryIO, file: BinaryIO = file) -> None:
                for line, _ in _lines_of(file):
                    number = self._number(line)
                    assert number is not None
                    if not self._has_changed(number, line):
                        target.write(line)

            _replace(path, unchanged)
            self._files[succeeded] = self._opened(path)
            file.close()
        self._changed = []

    def _number(self, line: bytes) -> int | None:
        """Return the number of the input's line that an output is for; None if it is for none."""
        try:
            entry = _entry.decode(line)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            return None
        number, marks = number_of(entry.id), self._found.marks
        if number is None or not 1 <= number < len(marks):
            return None
        custom_id = entry.custom_id
        mark = mark_of(custom_id) if isinstance(custom_id, str) else 0
        # The id of a line that is too long, or damaged, may be unknown.
        return number if mark in (marks[number], 0) else None

    def _note(self, number: int, succeeded: bool) -> None:
        self._done[number] = 1
        self.num_done += 1
        self.num_failed += not succeeded

    def _places(self, file: BinaryIO) -> tuple[array[int], array[int]]:
        """Return where the output of each line begins and ends; -1 for those that have none."""
        starts = array("q", [-1]) * len(self._done)
        ends = array("q", [-1]) * len(self._done)
        at = 0
        for line, _ in _lines_of(file):
            number = self._number(line)
            assert number is not None
            starts[number], at = at, at + len(line)
            ends[number] = at
        return starts, ends


def _is_torn(line: bytes) -> bool:
    """Return true for the beginning of an output, or what a file system leaves of one."""
    if line.endswith(b"\n"):
        return False
    line = line.rstrip(b"\0")
    return line.startswith(_BEGINNING[: len(line)])


def _write_all(file: BinaryIO, text: bytes) -> None:
    left = memoryview(text)
    while left:
        left = left[file.write(left) :]


def _lines_of(file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """Yield the lines of a file, and whether each is the last."""
    size = os.fstat(file.fileno()).st_size
    with open(file.fileno(), "rb", closefd=False) as reader:
        reader.seek(0)
        at = 0
        for line in reader:
            at += len(line)
            yield line, at >= size


def _replace(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Put a file that ``write`` fills in the place of another when it is whole."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("wb") as target:
            write(target)
            target.flush()
            os.fsync(target.fileno())
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise _unusable(path, error) from error


def _copy(source: BinaryIO, target: BinaryIO, start: int, end: int) -> None:
    while start < end:
        piece = os.pread(source.fileno(), min(_COPY_BYTES, end - start), start)
        if not piece:
            raise OSError("the file has become shorter")
        target.write(piece)
        start += len(piece)


def _unusable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{str(path)!r} cannot be written: {error.strerror or error}.")
