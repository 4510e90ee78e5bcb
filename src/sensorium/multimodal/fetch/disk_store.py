"""Bytes by key in a folder, least recently used first out. Several processes may share a folder.

One file per entry, ``<folder>/sensorium-downloads-1/<2 hex digits>/<62 more>``, named by the key's digest:

    8 bytes    mark and version
    32 bytes   BLAKE3 of all that follows
    4 + 8      lengths of note and body, little-endian
    …          note, body

Its time of modification is the moment until which the entry is valid, its time of access the last use: both change
without the file being written again. A file is written beside its place and renamed into it, so that it is there whole
or not at all; what is damaged all the same is found by its digest, counts as missing and is removed.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from sensorium.errors import ConfigError

_FOLDER = "sensorium-downloads-1"
_MARK = b"SENSDL1\n"
_LENGTHS = struct.Struct("<IQ")
_OVERHEAD = len(_MARK) + 32 + _LENGTHS.size
_MAX_NOTE = 1 << 16
_BLOCK_BYTES = 4096
_PART = "part-"
_STALE_PART_SECONDS = 3600.0
MAX_PENDING_BYTES = 64 << 20
"""Bytes that wait to be written; what comes beyond, from a disk that is too slow, is not kept."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """``note`` and ``body`` as they were put; ``valid_until`` in seconds since the epoch, to about a microsecond."""

    note: bytes
    body: bytes
    valid_until: float


@dataclass(frozen=True, slots=True)
class _File:
    path: str
    num_bytes: int
    used: float


class DiskStore:
    """At most ``capacity_bytes`` of entries, in the disk's blocks, of which one takes a quarter at most.

    Each process counts what it adds and looks at the whole folder after every sixteenth part of the capacity: several
    together may exceed it by as much each. Thread-safe. A disk that fails costs entries and one warning, no error.
    """

    def __init__(
        self, folder: str, capacity_bytes: int, clock: Callable[[], float] = time.time
    ) -> None:
        """Make the folder, for this user alone. Raises ConfigError when that cannot be done."""
        self.capacity_bytes = capacity_bytes
        self._clock = clock
        self._root = _private_folder(folder)
        self._lock = threading.Lock()
        self._num_pending = 0
        self._warned = False
        # The writer's own, one thread:
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="sensorium-download-cache")
        self._num_bytes: int | None = None
        self._num_new_bytes = 0

    def get(self, key: bytes, max_bytes: int) -> Entry | None:
        """The entry under a key, which becomes the most recently used; None without one of at most ``max_bytes``."""
        path = self._path(key)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._warn(error)
            return None
        try:
            with os.fdopen(descriptor, "rb", buffering=0) as file:
                status = os.fstat(descriptor)
                if status.st_size > max_bytes + _OVERHEAD + _MAX_NOTE:
                    return None
                content = _read(file.fileno(), status)
                if content is not None:
                    self._set_times(descriptor, status.st_mtime_ns)
        except OSError as error:
            self._warn(error)
            return None
        if content is None:
            _logger.info("a damaged entry of the download cache was removed")
            _unlink(path)
            return None
        note, body = content
        return Entry(note, body, status.st_mtime_ns / 1e9) if len(body) <= max_bytes else None

    def put(self, key: bytes, note: bytes, body: bytes, valid_until: float) -> None:
        """Keep an entry, in place of what was there; it is written soon, unless too much waits already."""
        size = _OVERHEAD + len(note) + len(body)
        if size > self.capacity_bytes // 4 or len(note) > _MAX_NOTE:
            self.remove(key)
            return
        with self._lock:
            if self._num_pending + size > MAX_PENDING_BYTES and self._num_pending:
                return
            self._num_pending += size
        self._writer.submit(self._write, key, note, body, valid_until, size)

    def renew(self, key: bytes, valid_until: float) -> None:
        """Change until when an entry is valid, if it is there."""
        self._writer.submit(self._set_times, self._path(key), int(valid_until * 1e9))

    def remove(self, key: bytes) -> None:
        """Forget an entry, if it is there."""
        self._writer.submit(_unlink, self._path(key))

    def flush(self) -> None:
        """Wait until all that was put is written."""
        self._writer.submit(int).result()

    def close(self) -> None:
        """Write what was put, and free the writer."""
        self._writer.shutdown(wait=True)

    def _path(self, key: bytes) -> str:
        name = blake3(key).hexdigest()
        return os.path.join(self._root, name[:2], name[2:])

    def _write(self, key: bytes, note: bytes, body: bytes, valid_until: float, size: int) -> None:
        path = self._path(key)
        try:
            self._make_room(size)
            folder = os.path.dirname(path)
            for needed in (self._root, folder):  # someone may have tidied up meanwhile
                with contextlib.suppress(FileExistsError):
                    os.mkdir(needed, 0o700)
            descriptor, part = tempfile.mkstemp(prefix=_PART, dir=folder)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    _write_entry(file.write, note, body)
                self._set_times(part, int(valid_until * 1e9))
                os.replace(part, path)
            except OSError:
                _unlink(part)
                raise
        except OSError as error:
            self._warn(error)
        finally:
            with self._lock:
                self._num_pending -= size

    def _set_times(self, file: str | int, valid_until_ns: int) -> None:
        """Note that a file is used now, and until when it is valid."""
        try:
            os.utime(file, ns=(int(self._clock() * 1e9), valid_until_ns))
        except FileNotFoundError:
            return
        except OSError as error:
            self._warn(error)

    def _make_room(self, size: int) -> None:
        """Count a file of ``size`` bytes more; when it is time to, look at the folder and remove what was used least
        recently."""
        size = _on_disk(size)
        slack = self.capacity_bytes // 16
        total = self._num_bytes
        if total is None or total + size > self.capacity_bytes or self._num_new_bytes > slack:
            files = sorted(self._files(), key=lambda file: file.used)
            total = sum(file.num_bytes for file in files)
            goal = self.capacity_bytes - size - slack
            for file in files if total + size > self.capacity_bytes else ():
                if total <= goal:
                    break
                _unlink(file.path)
                total -= file.num_bytes
            self._num_new_bytes = 0
        self._num_bytes = total + size
        self._num_new_bytes += size

    def _files(self) -> Iterator[_File]:
        """All entries; parts that a process left behind when it died are removed."""
        for folder in _scan(self._root):
            if not folder.is_dir(follow_symlinks=False):
                continue
            for found in _scan(folder.path):
                try:
                    status = found.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                if found.name.startswith(_PART):
                    # Not the time of modification, which is set before the file is renamed.
                    if time.time() - status.st_ctime > _STALE_PART_SECONDS:
                        _unlink(found.path)
                    continue
                yield _File(found.path, _on_disk(status.st_size), status.st_atime)

    def _warn(self, error: OSError) -> None:
        with self._lock:
            warned, self._warned = self._warned, True
        if not warned:
            reason = errno.errorcode.get(error.errno or 0, "unknown")
            _logger.warning(
                "the download cache (--media-download-cache) cannot be used: %s; downloads go on without it",
                reason,
            )


def _on_disk(num_bytes: int) -> int:
    """What a file of that many bytes takes: whole blocks, also on disks that could pack it closer."""
    return -(-num_bytes // _BLOCK_BYTES) * _BLOCK_BYTES


def _private_folder(folder: str) -> str:
    """The cache's own folder below ``folder``, made and closed to others. Raises ConfigError."""
    root = os.path.join(os.path.abspath(os.path.expanduser(folder)), _FOLDER)
    try:
        os.makedirs(root, mode=0o700, exist_ok=True)
        status = os.lstat(root)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "it belongs to another user or is a link")
        if stat.S_IMODE(status.st_mode) & 0o077:
            os.chmod(root, 0o700)
    except OSError as error:
        raise ConfigError(
            f"media_download_cache must be a folder that can be made and written, got {folder!r}: {error.strerror}.",
            param="media_download_cache",
        ) from None
    return root


def _write_entry(write: Callable[[bytes], object], note: bytes, body: bytes) -> None:
    lengths = _LENGTHS.pack(len(note), len(body))
    digest = blake3(lengths).update(note).update(body).digest()
    for part in (_MARK, digest, lengths, note, body):
        write(part)


def _read(descriptor: int, status: os.stat_result) -> tuple[bytes, bytes] | None:
    """Note and body of an entry's file; None when it is damaged."""
    if not stat.S_ISREG(status.st_mode):
        return None
    head = _read_exactly(descriptor, _OVERHEAD)
    if head is None or not head.startswith(_MARK):
        return None
    lengths = head[len(_MARK) + 32 :]
    num_note, num_body = _LENGTHS.unpack(lengths)
    if num_note > _MAX_NOTE or _OVERHEAD + num_note + num_body != status.st_size:
        return None
    note = _read_exactly(descriptor, num_note)
    body = _read_exactly(descriptor, num_body)
    if note is None or body is None:
        return None
    digest = blake3(lengths).update(note).update(body).digest()
    return (note, body) if digest == head[len(_MARK) : len(_MARK) + 32] else None


def _read_exactly(descriptor: int, num_bytes: int) -> bytes | None:
    """The next bytes of a file; None when it ends before."""
    pieces: list[bytes] = []
    while num_bytes:
        piece = os.read(descriptor, num_bytes)
        if not piece:
            return None
        pieces.append(piece)
        num_bytes -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _scan(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except FileNotFoundError:
        return []


def _unlink(path: str) -> None:
    """Remove a file, if it is there and can be removed."""
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        _logger.debug("a file of the download cache cannot be removed: %s", error.strerror)
