"""Folders that only this process uses and that go with it, even when it is killed."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

_LOCK = ".lock"
_YOUNG_SECONDS = 10.0
"""Age below which a folder may belong to a process that has not locked it yet."""
_STOP_SECONDS = 5.0
_JANITOR = 'read -r _; rm -rf -- "$0"'
"""Waits until the pipe is closed, by the process or by its end, and removes the folder."""

logger = logging.getLogger(__name__)


class PrivateFolder:
    """Creates a folder of mode 0700 with a name that nobody can guess.

    A tiny process waits for the end of this one and removes the folder; ``close`` does so at once.
    Where that process was killed as well (the machine lost power), the next folder with the same
    parent and prefix removes it: its lock is free.
    """

    def __init__(self, parent: str, prefix: str) -> None:
        """Create the folder, in the system's folder of temporary files if ``parent`` is empty.

        Raises OSError.
        """
        place = Path(parent or tempfile.gettempdir())
        remove_stale(place, prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=place)).absolute()
        self._lock = os.open(self.path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._janitor = _start_janitor(self.path)

    def close(self) -> None:
        """Remove the folder and all that is in it. A second call does nothing."""
        if self._lock < 0:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        self._lock = -1
        if self._janitor is not None and self._janitor.stdin is not None:
            self._janitor.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._janitor.wait(_STOP_SECONDS)


def remove_stale(place: Path, prefix: str, now: float | None = None) -> None:
    """Remove folders of processes that have ended: those of this user whose lock is free.

    ``now``: seconds since 1970, by the system's clock if not given.
    """
    now = time.time() if now is None else now
    for folder in place.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            status = folder.lstat()
            young = now - status.st_ctime < _YOUNG_SECONDS
            if status.st_uid == os.getuid() and folder.is_dir() and not young:
                _remove_if_free(folder)


def _remove_if_free(folder: Path) -> None:
    if folder.is_symlink():
        return
    descriptor = os.open(folder / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
        logger.info("removed a folder that an earlier process had left behind")
    finally:
        os.close(descriptor)


def _start_janitor(path: Path) -> subprocess.Popen[bytes] | None:
    """Start the process that outlives this one; None where there is no shell."""
    try:
        return subprocess.Popen(
            ["/bin/sh", "-c", _JANITOR, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
    except OSError:
        logger.info("no shell: the folder is removed at the next start if this process is killed")
        return None
