"""Uploaded files: on disk in a private folder while the server runs, each seen by its tenant only.

Names of clients are never used as paths: a file on disk has its random id as its name.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from sensorium.config import ServerConfig
from sensorium.errors import (
    MediaTooLargeError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)
from sensorium.processes.private_folder import PrivateFolder, remove_stale

PURPOSES = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")
"""Purposes that an upload may have."""
PREFIX = "sensorium-files-"
BUFFER_BYTES = 1 << 20
"""Bytes of a new file that wait in memory before they are written."""
_RETRY_SECONDS = 30


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A complete file. ``created_at`` and ``expires_at`` are seconds since 1970."""

    id: str
    tenant: str
    filename: str
    purpose: str
    num_bytes: int
    created_at: int
    expires_at: int
    path: Path = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the file object of the API."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.num_bytes,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }

    def read(self) -> bytes:
        """Return the content. Raises NotFoundError when the file has gone meanwhile."""
        try:
            return self.path.read_bytes()
        except OSError:
            raise missing(self.id) from None

    def open(self) -> BinaryIO:
        """Open the content, which stays readable when the file is deleted. Raises as ``read``."""
        try:
            return self.path.open("rb")
        except OSError:
            raise missing(self.id) from None


def missing(file_id: str, param: str | None = None) -> NotFoundError:
    """Return the error for an id that no file of the tenant has."""
    return NotFoundError(
        f"There is no file {file_id[:80]!r}: it was deleted, has expired, or never was.",
        param=param,
    )


class FileStore:
    """The files of all tenants, bounded in bytes, number and age. Belongs to one event loop.

    Where there are several API keys, none may take more than half of the bytes and the number.
    """

    def __init__(self, config: ServerConfig, clock: Callable[[], float] = time.time) -> None:
        self._config = config
        self.clock = clock
        self._folder: PrivateFolder | None = None
        self._files: dict[str, StoredFile] = {}
        self._num_of: Counter[str] = Counter()
        self._bytes_of: Counter[str] = Counter()
        self._timer: asyncio.TimerHandle | None = None
        self._removing: set[asyncio.Task[None]] = set()

    @property
    def num_bytes(self) -> int:
        """Number of bytes of all files."""
        return self._bytes_of.total()

    @property
    def num_files(self) -> int:
        """Number of files, those that are being written included."""
        return self._num_of.total()

    def clear_stale(self) -> None:
        """Remove the files of servers that were killed."""
        remove_stale(Path(self._config.file_folder or tempfile.gettempdir()), PREFIX)

    def close(self) -> None:
        """Remove all files."""
        if self._timer is not None:
            self._timer.cancel()
        for file in list(self._files.values()):
            self._forget(file)
        if self._folder is not None:
            self._folder.close()

    def create(self, tenant: str) -> NewFile:
        """Begin a file. Raises OverloadedError when there are too many files."""
        self.expire()
        self._check_number(tenant)
        try:
            new = NewFile(self, tenant, *self._new_path())
        except OSError:
            raise self.no_room() from None
        self._num_of[tenant] += 1
        return new

    def get(self, file_id: str, tenant: str, param: str | None = None) -> StoredFile:
        """Return a file. Raises NotFoundError, also for another tenant's.

        Callable from any thread.
        """
        found = self._files.get(file_id)
        if found is None or found.tenant != tenant or found.expires_at <= self.clock():
            raise missing(file_id, param)
        return found

    def of_tenant(self, tenant: str) -> list[StoredFile]:
        """Return the files of a tenant, oldest first."""
        self.expire()
        return [file for file in self._files.values() if file.tenant == tenant]

    async def delete(self, file_id: str, tenant: str) -> None:
        """Delete a file. Raises NotFoundError."""
        found = self.get(file_id, tenant)
        self._forget(found)
        await asyncio.to_thread(found.path.unlink, missing_ok=True)

    def expire(self) -> None:
        """Remove the files whose time is over."""
        now = self.clock()
        for file in [file for file in self._files.values() if file.expires_at <= now]:
            self._forget(file)
            task = asyncio.create_task(asyncio.to_thread(file.path.unlink, missing_ok=True))
            self._removing.add(task)
            task.add_done_callback(self._removing.discard)
        self._set_timer()

    def reserve(self, tenant: str, num_bytes: int) -> None:
        """Count more bytes of a tenant, before they are written. Raises OverloadedError."""
        most = self._config.max_stored_file_bytes
        share = self._config.share_of(most)
        if self._bytes_of[tenant] + num_bytes > share:
            what = f"Your files take {self._bytes_of[tenant]} bytes; at most {share} are"
        elif self.num_bytes + num_bytes > most:
            what = f"The files stored here take {self.num_bytes} bytes; at most {most} are"
        else:
            self._bytes_of[tenant] += num_bytes
            return
        raise self._full(f"{what} kept (--max-stored-file-bytes)")

    def release(self, tenant: str, num_bytes: int) -> None:
        """Count bytes of a tenant no longer, which were not written."""
        self._bytes_of[tenant] -= num_bytes

    def check_size(self, num_bytes: int) -> None:
        """Raise MediaTooLargeError for a file of more bytes than one may have.

        That is also all that may be stored: beyond it no other file's end would make room.
        """
        share = self._config.share_of(self._config.max_stored_file_bytes)
        most, flag = min(
            (self._config.max_file_bytes, "--max-file-bytes"), (share, "--max-stored-file-bytes")
        )
        if num_bytes > most:
            raise MediaTooLargeError(
                f"The file has more than {most} bytes, the limit ({flag}).", param="file"
            )

    def no_room(self) -> UnavailableError:
        """Return the error for a disk that takes no more."""
        error = OverloadedError("There is no room for the file on this server; try again later.")
        error.retry_after = _RETRY_SECONDS
        return error

    def _check_number(self, tenant: str) -> None:
        """Raise OverloadedError when the tenant may begin no further file."""
        most = self._config.max_stored_files
        share = self._config.share_of(most)
        if self._num_of[tenant] >= share:
            what = f"You have {self._num_of[tenant]} files; at most {share} are"
        elif self.num_files >= most:
            what = f"{self.num_files} files are stored; at most {most} are"
        else:
            return
        raise self._full(f"{what} kept (--max-stored-files)")

    def _full(self, what: str) -> OverloadedError:
        error = OverloadedError(
            f"{what}. Delete files that are no longer needed, or wait until some have expired."
        )
        error.retry_after = _RETRY_SECONDS
        return error

    def _new_path(self) -> tuple[str, Path, BinaryIO]:
        if self._folder is None:
            self._folder = PrivateFolder(self._config.file_folder, PREFIX)
        file_id = f"file-{secrets.token_hex(16)}"
        path = self._folder.path / file_id
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        return file_id, path, os.fdopen(descriptor, "wb", buffering=0)

    def add(self, new: NewFile, filename: str, purpose: str, seconds: float | None) -> StoredFile:
        """Add a complete file, for ``seconds`` or the longest time allowed."""
        now = self.clock()
        age = self._config.max_file_age
        expires_at = now + (age if seconds is None else min(seconds, age))
        stored = StoredFile(
            new.id,
            new.tenant,
            filename,
            purpose,
            new.num_bytes,
            int(now),
            max(int(now) + 1, int(expires_at)),
            new.path,
        )
        self._files[stored.id] = stored
        self._set_timer()
        return stored

    def drop(self, file: StoredFile | NewFile) -> None:
        """Count a file no longer."""
        self._num_of[file.tenant] -= 1
        self._bytes_of[file.tenant] -= file.num_bytes

    def _forget(self, file: StoredFile) -> None:
        del self._files[file.id]
        self.drop(file)

    def _set_timer(self) -> None:
        """Wake up when the next file expires, so that it goes though nobody asks."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._files:
            first = min(file.expires_at for file in self._files.values())
            delay = max(0.0, first - self.clock())
            self._timer = asyncio.get_running_loop().call_later(delay, self.expire)


class NewFile:
    """A file that is being written; ``num_bytes`` so far, of which the last wait in memory."""

    def __init__(
        self, store: FileStore, tenant: str, file_id: str, path: Path, file: BinaryIO
    ) -> None:
        self.id = file_id
        self.tenant = tenant
        self.path = path
        self.num_bytes = 0
        self._store = store
        self._file = file
        self._buffer = bytearray()
        self._is_open = True
        self._writing = threading.Lock()

    async def write(self, data: bytes) -> None:
        """Append bytes; none of them when this raises.

        Raises MediaTooLargeError, and OverloadedError when there is no room. What waits in memory
        then is tried again with the next bytes.
        """
        self._store.check_size(self.num_bytes + len(data))
        self._store.reserve(self.tenant, len(data))
        self.num_bytes += len(data)
        self._buffer += data
        if len(self._buffer) >= BUFFER_BYTES:
            try:
                await self._flush()
            except OverloadedError:
                self._take_back(len(data))
                raise

    async def finish(self, filename: str, purpose: str, seconds: float | None) -> StoredFile:
        """Close the file and make it known.

        Raises OverloadedError when the disk is full; it may then be finished ``without_rest``.
        """
        await self._flush()
        self._is_open = False
        self._file.close()
        return self._store.add(self, filename, purpose, seconds)

    def without_rest(self) -> bytes:
        """Forget what waits in memory, and return it: the file ends with what is on the disk."""
        rest = bytes(self._buffer)
        self._take_back(len(rest))
        return rest

    def discard(self) -> None:
        """Remove the file unless it is finished."""
        if self._is_open:
            self._is_open = False
            with self._writing, contextlib.suppress(OSError):  # a thread may still write
                self._file.close()
            self.path.unlink(missing_ok=True)
            self._store.drop(self)

    def _take_back(self, num_bytes: int) -> None:
        """Forget the last bytes, which are not on the disk."""
        del self._buffer[len(self._buffer) - num_bytes :]
        self.num_bytes -= num_bytes
        self._store.release(self.tenant, num_bytes)

    async def _flush(self) -> None:
        """Write what waits in memory, or nothing of it. Raises OverloadedError."""
        start = self.num_bytes - len(self._buffer)
        try:
            await asyncio.to_thread(self._append, start, bytes(self._buffer))
        except OSError:
            raise self._store.no_room() from None
        self._buffer.clear()

    def _append(self, start: int, data: bytes) -> None:
        """Write all of ``data`` after ``start`` bytes, or nothing of it. Raises OSError."""
        done = 0
        with self._writing:
            if not self._is_open:  # discarded meanwhile
                return
            try:
                while done < len(data):
                    done += os.pwrite(self._file.fileno(), data[done:], start + done)
            except OSError:
                os.ftruncate(self._file.fileno(), start)
                raise
