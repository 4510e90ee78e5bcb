"""Checks of folders: shared memory, temporary files, compiled kernels, downloads."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from sensorium.cli.doctor.finding import Finding, note, ok, problem, warning
from sensorium.config import GIB, MIB

AMPLE_SHARED = GIB
LEAST_CACHE = 200 * MIB
LEAST_DOWNLOADS = 5 * GIB
SHARED = Path("/dev/shm")


def shared_memory(folder: Path = SHARED) -> Iterator[Finding]:
    """Yield a finding about the folder in which preprocessed media pass between processes."""
    free = _free(folder)
    if free is None or not _writable(folder):
        yield warning(
            str(folder),
            "there is none, or it cannot be written",
            "preprocessed media go through the temporary folder, which may be slower: mount a "
            "tmpfs there",
        )
    elif free < AMPLE_SHARED:
        yield warning(
            str(folder),
            f"{free / MIB:.0f} MiB free",
            "below 1 GiB the temporary folder is used instead, which may be slower: docker run "
            "--shm-size 2g, or an emptyDir with medium Memory",
        )
    else:
        yield ok(str(folder), f"{free / GIB:.1f} GiB free")


def temporary(folder: Path | None = None) -> Iterator[Finding]:
    """Yield a finding about the folder of temporary files, which sockets and uploads need."""
    try:
        folder = folder or Path(tempfile.gettempdir())
    except OSError as error:
        yield problem("temporary folder", str(error), "set TMPDIR to a folder that can be written")
        return
    free = _free(folder)
    if free is None or not _writable(folder):
        yield problem(
            "temporary folder",
            f"{folder} cannot be written",
            "set TMPDIR to a folder that can be written",
        )
    elif free < LEAST_CACHE:
        yield warning("temporary folder", f"{folder}: {free / MIB:.0f} MiB free", "free some")
    else:
        yield ok("temporary folder", f"{folder}: {free / GIB:.1f} GiB free")


def kernel_cache(environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Yield a finding about the folder of compiled CPU kernels."""
    root = Path(environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    advice = (
        "without it every start compiles for about half a minute: set XDG_CACHE_HOME to a folder "
        "that can be written, in a container to a volume"
    )
    if not root.is_absolute():
        yield problem("kernel cache", f"XDG_CACHE_HOME is {str(root)!r}, no absolute path", advice)
        return
    yield from _cache("kernel cache", root / "sensorium", LEAST_CACHE, advice)


def downloads(environ: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Yield findings about the folder of downloaded models."""
    home = environ.get("HF_HOME") or str(
        Path(environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    )
    folder = Path(environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
    advice = "set HF_HOME to a folder that can be written, with room for models"
    yield from _cache("downloads", folder, LEAST_DOWNLOADS, advice)
    if environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        yield note("downloads", "HF_HUB_OFFLINE is set: nothing is downloaded", "unset it to pull")


def _cache(check: str, folder: Path, least: int, advice: str) -> Iterator[Finding]:
    """Yield a finding about a folder that is made when it is needed."""
    existing = next((path for path in (folder, *folder.parents) if path.exists()), Path("/"))
    if not existing.is_dir() or not _writable(existing):
        yield problem(check, f"{folder} cannot be written", advice)
        return
    free = _free(existing) or 0
    size = f"{free / GIB:.1f} GiB" if free >= GIB else f"{free / MIB:.0f} MiB"
    if free < least:
        yield warning(check, f"{folder}: {size} free", f"free some; {advice}")
    else:
        yield ok(check, f"{folder}: {size} free")


def _writable(folder: Path) -> bool:
    """Return whether a file can be made in a folder, by making one."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _free(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None
