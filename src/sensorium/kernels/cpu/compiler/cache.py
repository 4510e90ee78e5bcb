"""Compiled kernels on disk: their folder, their files, and the turns of processes that miss one."""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
from numba.core import caching as numba_caching
from numba.core.registry import cpu_target

from sensorium import environment

log = logging.getLogger(__name__)

# Numba's cache is not part of its public interface and has no types.
caching: Any = numba_caching
NO_CACHE: Any = caching.NullCache()

MOST_WAITING = 120.0
"""Seconds for which a process waits for another that compiles a kernel; none takes as long."""
_POLL = 0.02


@functools.cache
def source_digest() -> str:
    """Return the digest of the kernels' sources, the compiler and the CPU.

    A cached kernel is valid for exactly these.
    """
    cpu = cpu_target.target_context.codegen().magic_tuple()
    versions = (numba.__version__, llvmlite.__version__, sys.version)
    digest = hashlib.sha256(repr((versions, cpu)).encode())
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


@functools.cache
def cache_folder() -> Path | None:
    """Return the folder of compiled kernels for these sources, None if it cannot be written.

    A warning is logged in that case.
    """
    root = environment.cache_root()
    folder = root / "sensorium" / "kernels" / source_digest()
    if not folder.is_absolute():
        # XDG's rule says to ignore such a path; "~" also stays as it is where the user has no
        # home.
        return warn_not_kept(str(root), "it is not an absolute path")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        return warn_not_kept(str(root), error.strerror)
    if not os.access(folder, os.W_OK | os.X_OK):
        return warn_not_kept(str(root), os.strerror(errno.EACCES))
    if not any(folder.iterdir()):
        log.info("compiling CPU kernels into %s; later starts load them from there", folder)
    return folder


@functools.cache
def warn_not_kept(root: str, reason: str | None) -> None:
    """Log once that kernels are compiled at every start, and how to avoid it."""
    log.warning(
        "compiled CPU kernels cannot be kept in %r (%s), so every start compiles them again, which "
        "takes about half a minute: set XDG_CACHE_HOME to a folder that can be written",
        root,
        reason,
    )


class _Locator(caching._CacheLocator):
    """Location of Numba's cache files: ``cache_folder``, one file per kernel and element type."""

    def __init__(self, folder: Path, variant: str) -> None:
        self._folder = folder
        self._variant = variant

    def get_cache_path(self) -> str:
        return str(self._folder)

    def get_source_stamp(self) -> str:
        return source_digest()

    def get_disambiguator(self) -> str:
        return self._variant

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> _Locator | None:
        folder = cache_folder()
        return None if folder is None else cls(folder, py_func.variant)


class _CacheFiles(caching.CompileResultCacheImpl):
    _locator_classes = [_Locator]  # noqa: RUF012 - Numba's own name and type


class KernelCache(caching.Cache):
    """Numba's cache, keyed by a kernel's name, element type, sources and CPU.

    Of several processes that miss the same kernel one compiles it; the others wait and load it.
    """

    _impl_class = _CacheFiles

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        self._lock: int | None = None

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return (sig, codegen.magic_tuple())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the cached kernel, or None, for the caller to compile and then to ``release``."""
        found = self._load(sig, target_context)
        if found is None and self._take_turn():
            found = self._load(sig, target_context)
        return found

    def release(self) -> None:
        """Let the next process load this kernel, or compile it."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _load(self, sig: Any, target_context: Any) -> Any:
        """Return the cached kernel, or None; empty the index of a file that cannot be read."""
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:
            log.warning("a compiled CPU kernel in the cache is damaged: %s", type(error).__name__)
            self.flush()
            return None

    def _take_turn(self) -> bool:
        """Wait for the lock of this kernel; return False where it cannot be had.

        The kernel is then compiled without: in a file system without locks, or beside a process
        that does not get on. The lock of one that ends is free at once.
        """
        path = os.path.join(self.cache_path, f"{self._impl.filename_base}.lock")
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._lock = os.open(path, flags, 0o600)
            return _lock(self._lock, path, self._py_func.__qualname__)
        except OSError as error:
            log.debug("%s cannot be locked: %s", path, error.strerror)
            return False


def _lock(descriptor: int, path: str, kernel: str) -> bool:
    """Lock the file of a kernel when its holder has let it go. Return False where it is late."""
    end = time.monotonic() + (0.0 if LATE else MOST_WAITING)
    waits = False
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                if not LATE:
                    log.warning(
                        "another process holds %s for more than %g s; kernels are compiled here "
                        "without waiting for it, or for others, from now on",
                        path,
                        MOST_WAITING,
                    )
                LATE.append(kernel)
                return False
        if not waits:
            log.info("waiting for another process, which compiles the CPU kernel %s", kernel)
            waits = True
        time.sleep(_POLL)


LATE: list[str] = []
"""Kernels that another process did not compile in time: this one waits for none any more."""
