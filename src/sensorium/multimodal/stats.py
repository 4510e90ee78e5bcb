"""Counters of the media stages: runs, seconds, bytes."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sensorium.errors import RequestError, UnavailableError
from sensorium.multimodal.cache.features import CacheStats
from sensorium.multimodal.fetch.fetcher import DownloadStats
from sensorium.multimodal.workers.pool import DecoderStats


@dataclass(frozen=True, slots=True)
class StageStats:
    """Counters of one stage since the start: successful runs, their seconds, bytes of output."""

    count: int = 0
    seconds: float = 0.0
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class MediaStats:
    """Counters of the media pipeline.

    Attributes:
        fetch: Downloads and files read.
        decode: Decoded files and converted objects.
        preprocess: Runs of the model's processor.
        cache: The processor cache.
        decoders: The worker processes.
        failures: Refused items by error code.
        num_loading: Items that are being loaded.
        downloads: Shared and cached downloads.
    """

    fetch: StageStats
    decode: StageStats
    preprocess: StageStats
    cache: CacheStats
    decoders: DecoderStats
    failures: dict[str, int] = field(default_factory=dict)
    num_loading: int = 0
    downloads: DownloadStats = field(default_factory=DownloadStats)

    def flat(self) -> dict[str, float]:
        """Return all counters as plain numbers by name, such as ``decode_seconds``."""
        flat: dict[str, float] = {}
        for stage in ("fetch", "decode", "preprocess"):
            for name, value in dataclasses.asdict(getattr(self, stage)).items():
                flat[f"{stage}_{name}"] = value
        for name, value in dataclasses.asdict(self.cache).items():
            flat[f"processor_cache_{name}"] = value
        flat |= dataclasses.asdict(self.decoders)
        for name, value in dataclasses.asdict(self.downloads).items():
            flat[f"downloads_{name}"] = value
        flat["num_loading"] = self.num_loading
        flat["failures"] = sum(self.failures.values())
        for code, value in self.failures.items():
            flat[f"failure_{code}"] = value
        return flat


class StageCounters:
    """Counters that the pipeline updates, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stages: dict[str, StageStats] = {}
        self._failures: Counter[str] = Counter()
        self._num_loading = 0

    def add(self, stage: str, seconds: float, num_bytes: int) -> None:
        """Count one run of a stage."""
        with self._lock:
            old = self._stages.get(stage, StageStats())
            self._stages[stage] = StageStats(
                old.count + 1, old.seconds + seconds, old.num_bytes + num_bytes
            )

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Count an item as being loaded within the block, and its error if it is refused."""
        with self._lock:
            self._num_loading += 1
        try:
            yield
        except (RequestError, UnavailableError) as error:
            with self._lock:
                self._failures[error.code] += 1
            raise
        finally:
            with self._lock:
                self._num_loading -= 1

    def snapshot(
        self, cache: CacheStats, decoders: DecoderStats, downloads: DownloadStats
    ) -> MediaStats:
        """Return all counters at one moment."""
        with self._lock:
            fetch, decode, preprocess = (
                self._stages.get(stage, StageStats()) for stage in ("fetch", "decode", "preprocess")
            )
            return MediaStats(
                fetch,
                decode,
                preprocess,
                cache,
                decoders,
                dict(self._failures),
                self._num_loading,
                downloads,
            )
