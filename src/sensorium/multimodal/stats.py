"""Counters of the media stages: how often, how long, how many bytes."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from dataclasses import dataclass, field

from sensorium.multimodal.cache import CacheStats


@dataclass(frozen=True, slots=True)
class StageStats:
    """One stage since the start: runs that succeeded, their seconds summed, and the bytes that came out of them."""

    count: int = 0
    seconds: float = 0.0
    num_bytes: int = 0


@dataclass(frozen=True, slots=True)
class MediaStats:
    """A snapshot of the pipeline's counters.

    ``fetch`` counts downloads and files read, ``decode`` decoded files and converted objects, ``preprocess`` runs of
    the model's processor. ``failures`` counts refused items by error code.
    """

    fetch: StageStats
    decode: StageStats
    preprocess: StageStats
    cache: CacheStats
    failures: dict[str, int] = field(default_factory=dict)

    def flat(self) -> dict[str, float]:
        """All counters as plain numbers by name, such as ``decode_seconds``."""
        flat: dict[str, float] = {}
        for stage in ("fetch", "decode", "preprocess"):
            for name, value in dataclasses.asdict(getattr(self, stage)).items():
                flat[f"{stage}_{name}"] = value
        for name, value in dataclasses.asdict(self.cache).items():
            flat[f"processor_cache_{name}"] = value
        flat["failures"] = sum(self.failures.values())
        return flat


class StageCounters:
    """The counters themselves; written by the pipeline from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stages: dict[str, StageStats] = {}
        self._failures: Counter[str] = Counter()

    def add(self, stage: str, seconds: float, num_bytes: int) -> None:
        """Count one run of a stage."""
        with self._lock:
            old = self._stages.get(stage, StageStats())
            self._stages[stage] = StageStats(
                old.count + 1, old.seconds + seconds, old.num_bytes + num_bytes
            )

    def add_failure(self, code: str) -> None:
        """Count one item that was refused."""
        with self._lock:
            self._failures[code] += 1

    def snapshot(self, cache: CacheStats) -> MediaStats:
        """All counters at one moment."""
        with self._lock:
            fetch, decode, preprocess = (
                self._stages.get(stage, StageStats()) for stage in ("fetch", "decode", "preprocess")
            )
            return MediaStats(fetch, decode, preprocess, cache, dict(self._failures))
