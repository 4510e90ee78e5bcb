"""Downloads kept in a folder for a time to live; several servers may share the folder.

One file per URL, ``<folder>/sensorium-downloads-2/<digest of the URL>``: the content digest of the
body (32 bytes), then the body. It expires at its time of modification; access is its last use.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from sensorium.config import MediaConfig
from sensorium.errors import ConfigError
from sensorium.multimodal.cache.digest import encoded_digest, framed
from sensorium.multimodal.items import Fetched

FOLDER = "sensorium-downloads-2"
MAX_PENDING_BYTES = 64 << 20  # to be written; while a disk is slower, more are not kept
STALE_SECONDS = 3600.0  # beyond its end; half written files are removed then, too
_DIGEST_BYTES, _BLOCK_BYTES = 32, 4096


class DiskCache:
    """Downloads by URL in a folder of bounded size, least recently used first out; thread-safe.

    One download takes a quarter at most. Each process scans the folder after adding a sixteenth, so
    that several may exceed the size by as much each. A failing disk costs entries and a warning.
    """

    def __init__(self, config: MediaConfig) -> None:
        """Make the folder, for this user alone. Raises ConfigError if that fails."""
        self._capacity_bytes = int(config.media_download_cache_gb * (1 << 30))
        self._seconds = config.media_download_cache_seconds
        folder = config.media_download_cache
        self._root = os.path.join(os.path.abspath(os.path.expanduser(folder)), FOLDER)
        try:
            os.makedirs(self._root, mode=0o700, exist_ok=True)
            status = os.lstat(self._root)
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, "it belongs to another user or is a link")
            os.chmod(self._root, 0o700)
        except OSError as error:
            name, reason = "media_download_cache", error.strerror
            text = (
                f"{name} must be a folder that can be made and written, got {folder!r}: {reason}."
            )
            raise ConfigError(text, param=name) from None
        self._lock = threading.Lock()
        self._num_pending_bytes, self._has_warned = 0, False
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="sensorium-download-cache")
        self._num_unscanned_bytes = self._capacity_bytes  # the writer's alone

    def get(self, url: str, listed: bool, max_bytes: int) -> Fetched | None:
        """Return a download of at most ``max_bytes`` that has not expired.

        ``listed``: the guard lets the host be private; an entry serves under the same rule only.
        """
        path, now = self._path(url, listed), time.time()
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(descriptor, "rb", 0) as file:
                status = os.fstat(descriptor)
                is_fresh = now < status.st_mtime <= now + self._seconds
                if not is_fresh or status.st_size > max_bytes + _DIGEST_BYTES:
                    return None
                digest, data = file.read(_DIGEST_BYTES), file.read()
                with contextlib.suppress(OSError):
                    os.utime(descriptor, ns=(int(now * 1e9), status.st_mtime_ns))
        except OSError as error:
            self._warn(error)
            return None
        if encoded_digest(data) == digest:
            return Fetched(data, digest, cached=True, reusable=True)
        _unlink(path)
        return None

    def put(self, url: str, listed: bool, fetched: Fetched, seconds: float) -> None:
        """Keep a download for the time to live, at most ``seconds``; another thread writes it."""
        size = _DIGEST_BYTES + len(fetched.data)
        with self._lock:
            is_slow = self._num_pending_bytes and self._num_pending_bytes + size > MAX_PENDING_BYTES
            if is_slow or seconds <= 0 or size > self._capacity_bytes // 4:
                return
            self._num_pending_bytes += size
        expires = time.time() + min(seconds, self._seconds)
        self._writer.submit(self._write, self._path(url, listed), fetched, expires, size)

    def close(self) -> None:
        """Write what was put, and stop the writer."""
        self._writer.shutdown(wait=True)

    def _path(self, url: str, listed: bool) -> str:
        name = framed("download", [url.partition("#")[0], int(listed)])
        return os.path.join(self._root, name.hex())

    def _write(self, path: str, fetched: Fetched, expires: float, size: int) -> None:
        try:
            os.makedirs(self._root, mode=0o700, exist_ok=True)  # an operator may have removed it
            self._make_room(size)
            descriptor, part = tempfile.mkstemp(dir=self._root)
            try:
                with os.fdopen(descriptor, "wb") as file:
                    file.writelines((fetched.digest, fetched.data))
                os.utime(part, (time.time(), expires))
                os.replace(part, path)
            except OSError:
                _unlink(part)
                raise
        except OSError as error:
            self._warn(error)
        finally:
            with self._lock:
                self._num_pending_bytes -= size

    def _make_room(self, size: int) -> None:
        """Count new bytes; from time to time scan the folder and evict files until they fit."""
        slack = self._capacity_bytes // 16
        self._num_unscanned_bytes += size + _BLOCK_BYTES  # of its last block, a file takes all
        if self._num_unscanned_bytes <= slack:
            return
        files, total = [], size + _BLOCK_BYTES
        for file in os.scandir(self._root):
            with contextlib.suppress(FileNotFoundError):
                status = file.stat(follow_symlinks=False)
                is_stale = status.st_mtime + STALE_SECONDS < time.time()
                files.append((0.0 if is_stale else status.st_atime, file.path, status.st_size))
                total += status.st_size + _BLOCK_BYTES
        for last_use, path, num_bytes in sorted(files):
            if not last_use or total > self._capacity_bytes - slack:
                _unlink(path)
                total -= num_bytes + _BLOCK_BYTES
        self._num_unscanned_bytes = 0  # not before: a scan that fails is tried again

    def _warn(self, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError) and not self._has_warned:
            self._has_warned = True
            reason = errno.errorcode.get(error.errno or 0, "unknown")
            logging.getLogger(__name__).warning("--media-download-cache failed: %s", reason)


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
