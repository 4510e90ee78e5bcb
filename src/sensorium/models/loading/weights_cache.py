"""Quantized weights kept on disk, so that the next start neither calibrates nor quantizes.

A file per checkpoint, formats and version of the sources that make the weights. Whatever is wrong
with one, weights are made from the checkpoint; whatever is wrong with the disk, a start goes on.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from sensorium.config import MIB
from sensorium.forks import OWN_THREADS
from sensorium.kernels import ops
from sensorium.kernels.cpu.attention import route
from sensorium.kernels.cpu.compiler.cache import source_digest
from sensorium.kernels.weight import PackedWeight
from sensorium.models.loading.stored import SUFFIX, DamagedError, StoredWeights, StoredWriter
from sensorium.models.loading.weight_files import FileState

logger = logging.getLogger(__name__)

FOLDER = "sensorium-weights-1"
MOST_READERS = 4
"""Threads that read a file."""
READ_AHEAD = 256 << 20
"""Bytes of weights that are read before they are asked for; one weight may have more."""
PACKAGE = Path(__file__).parents[2]
SOURCES = ("distributed", "kernels", "layers", "models")
"""Folders of the package whose sources cut weights for ranks, calibrate, quantize and pack."""


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """Place and bounds of the weights that are kept.

    least_bytes: models with less are not worth a file.
    """

    folder: Path
    most_bytes: int
    least_bytes: int = 0

    def open(self, files: Iterable[FileState], *settings: object) -> WeightsCache:
        """Return the cache of the weights of these files under some settings."""
        return WeightsCache(self, list(files), settings)


class WeightsCache:
    """Weights of one model: those that were kept, and those that are to be.

    ``begin`` it, ``find`` each weight, else make and ``add`` it, then ``finish``. As a context
    manager it closes files and ends threads.
    """

    def __init__(
        self, settings: CacheSettings, files: list[FileState], key: tuple[object, ...]
    ) -> None:
        self._settings, self._files = settings, files
        self._key_of = key
        self._key, self._path = "", settings.folder / FOLDER
        self._stored: StoredWeights | None = None
        self._readers: ThreadPoolExecutor | None = None
        self._waiting: dict[str, int] = {}  # bytes of the weights that nobody reads yet
        self._found: dict[str, Future[PackedWeight]] = {}
        self._ahead: dict[str, int] = {}  # bytes of those in ``_found``
        self._writing = ThreadPoolExecutor(1, thread_name_prefix=f"{OWN_THREADS}weights-writer")
        self._writer: StoredWriter | None = None
        self._keeps = False
        self._error: Exception | None = None
        self._weights: list[tuple[str, PackedWeight]] = []
        self._num_found = self._num_written = 0
        self._began = 0.0

    def begin(self, names: Iterable[str], num_bytes: int) -> None:
        """Look for the file, and read the weights of these names in this order.

        num_bytes: about what they take, which decides if they are kept.
        """
        self._began = time.monotonic()
        names = list(names)
        if not names or num_bytes < self._settings.least_bytes:
            return
        try:
            self._key = key_of(self._files, *self._key_of)
            self._path = self._settings.folder / FOLDER / f"{self._key}{SUFFIX}"
            self._keeps = num_bytes <= self._settings.most_bytes
            self._stored = StoredWeights.open(self._path, self._key)
            if self._stored is not None:
                present = set(self._stored.names)
                self._waiting = {n: self._stored.nbytes(n) for n in names if n in present}
        except (OSError, DamagedError) as error:
            self._warn_unreadable(error)
        if not self._waiting:
            return
        workers = max(1, min(MOST_READERS, torch.get_num_threads()))
        self._readers = ThreadPoolExecutor(workers, f"{OWN_THREADS}weights-reader")
        self._read_ahead()

    def find(self, name: str, shape: tuple[int, int], dtype: torch.dtype) -> PackedWeight | None:
        """Return a weight (N, K) that was kept, for activations of ``dtype``.

        It has memory of its own. None where it has to be made.
        """
        self._read(name)
        future = self._found.pop(name, None)
        if future is None:
            return None
        del self._ahead[name]
        self._read_ahead()
        try:
            weight = future.result()
            if (weight.shape, weight.dtype) != (shape, dtype):
                raise DamagedError(f"{name} is a weight of {weight.shape} for {weight.dtype}")
        except (OSError, DamagedError) as error:
            self._warn_unreadable(error)
            self._found.clear()  # one warning is enough
            self._waiting.clear()
            return None
        self._weights.append((name, weight))
        self._num_found += 1
        return weight

    def add(self, name: str, weight: object) -> None:
        """Take a weight that was made, which is to be in the file."""
        if not isinstance(weight, PackedWeight) or type(weight).__name__ not in ops.STORED_KINDS:
            return
        self._weights.append((name, weight))
        if not self._keeps:
            return
        # Another thread writes, while this one makes the next weights.
        for own in self._weights[self._num_written :]:
            self._writing.submit(self._write, *own)
        self._num_written = len(self._weights)

    def finish(self) -> None:
        """Make the weights that were added the file, if it lacked any, and log what was done."""
        seconds = time.monotonic() - self._began
        size = sum(weight.nbytes for _, weight in self._weights) / MIB
        if not self._weights or not self._key:
            return
        if self._num_found == len(self._weights):
            logger.info(
                "weights cache: hit: %d quantized weights (%.1f MiB) loaded in %.2f s from %s",
                *(self._num_found, size, seconds, self._path),
            )
            return
        self._writing.submit(self._end).result()
        logger.info(
            "weights cache: miss: %d of %d quantized weights made, all loaded in %.2f s; %s",
            len(self._weights) - self._num_found,
            len(self._weights),
            seconds,
            f"{size:.1f} MiB kept in {self._path}" if self._is_kept() else "they are not kept",
        )

    def __enter__(self) -> WeightsCache:
        return self

    def __exit__(self, *error: object) -> None:
        for pool in (self._readers, self._writing):
            if pool is not None:
                pool.shutdown(cancel_futures=True)
        self._abandon()
        if self._stored is not None:
            self._stored.close()

    def _read_ahead(self) -> None:
        """Let readers go on with the next weights, as far as ``READ_AHEAD`` lets them."""
        ahead = sum(self._ahead.values())
        while self._waiting:
            name, num_bytes = next(iter(self._waiting.items()))
            ahead += num_bytes
            if self._ahead and ahead > READ_AHEAD:
                break
            self._read(name)

    def _read(self, name: str) -> None:
        """Let a reader read a weight, if it waits for that."""
        if name in self._waiting and self._readers is not None and self._stored is not None:
            self._ahead[name] = self._waiting.pop(name)
            self._found[name] = self._readers.submit(self._stored.load, name)

    def _write(self, name: str, weight: PackedWeight) -> None:
        """Write a weight, in the writer's thread; a disk that refuses gives one warning."""
        if self._error is not None:
            return
        try:
            if self._writer is None:
                most = self._settings.most_bytes
                self._writer = StoredWriter.begin(self._path, self._key, most)
            self._writer.write(name, weight)
        except Exception as error:  # whatever it is: a file that lacks a weight is of no use
            self._give_up(error)

    def _end(self) -> None:
        if self._writer is None or self._error is not None:
            return
        try:
            if any(FileState.of(file.path) != file for file in self._files):
                raise OSError("the checkpoint has changed meanwhile")
            self._writer.end()
            self._writer = None
        except Exception as error:  # the weights are there, so the start goes on
            self._give_up(error)

    def _is_kept(self) -> bool:
        return self._keeps and self._error is None

    def _abandon(self) -> None:
        if self._writer is not None:
            self._writer.abandon()
            self._writer = None

    def _give_up(self, error: Exception) -> None:
        self._error = error
        self._abandon()
        logger.warning(
            "quantized weights cannot be kept in %s (%s), so the next start makes them again; "
            "--weights-cache names another folder, or is off",
            self._path.parent,
            getattr(error, "strerror", None) or str(error) or type(error).__name__,
        )

    def _warn_unreadable(self, error: Exception) -> None:
        logger.warning(
            "weights cache: %s cannot be used (%s): weights are made from the checkpoint",
            self._path,
            getattr(error, "strerror", None) or error,
        )


def key_of(files: Iterable[FileState], *settings: object) -> str:
    """Return the key of the weights of some files.

    It depends on the files, the settings, the sources that quantize, calibrate and pack, the
    compiler, torch and the CPU. Raises OSError.
    """
    made_by = (source_digest(), sources_digest(), torch.__version__)
    digest = hashlib.sha256(repr((made_by, settings)).encode())
    for file in files:
        digest.update(file.identity())
    return digest.hexdigest()[:40]


@functools.cache
def sources_digest(package: Path = PACKAGE) -> str:
    """Return the digest of the sources in a package that calibrate, quantize and pack."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((package / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def calibrated_by() -> tuple[object, ...]:
    """Return what calibration runs through on this CPU, besides the sources.

    Times that were measured on this machine choose it, and its rounding is in the mean squares.
    """
    return ops.products(), route.slower_as_measured()
