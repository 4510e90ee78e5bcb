"""The counters of media: by stage, by code, and of what is under way."""

from __future__ import annotations

import contextlib

import pytest

from sensorium.config import MediaConfig
from sensorium.errors import (
    EngineDeadError,
    MediaRefusedError,
    MediaUndecodableError,
    SensoriumError,
)
from sensorium.multimodal.cache.features import CacheStats, FeatureCache
from sensorium.multimodal.decode.loaders import DecodeJob, Prepared
from sensorium.multimodal.fetch.fetcher import DownloadStats
from sensorium.multimodal.items import Features, MediaRef
from sensorium.multimodal.pipeline import MediaPipeline
from sensorium.multimodal.stats import StageCounters
from sensorium.multimodal.workers.pool import DecoderStats
from tests.multimodal.support import FakeProcessor

CACHE = CacheStats(5, 4, 3, 2, 1, 0)


def flat(counters: StageCounters) -> dict[str, float]:
    return counters.snapshot(CACHE, DecoderStats(6, 7, 8), DownloadStats(5)).flat()


def test_runs_of_a_stage_are_summed() -> None:
    counters = StageCounters()
    counters.add("decode", 0.5, 10)
    counters.add("decode", 0.25, 5)
    numbers = flat(counters)
    stage = [numbers[f"decode_{name}"] for name in ("count", "seconds", "num_bytes")]
    assert stage == [2, 0.75, 15]
    assert (numbers["fetch_count"], numbers["preprocess_seconds"]) == (0, 0)
    assert (numbers["processor_cache_queries"], numbers["processor_cache_evictions"]) == (5, 0)
    assert numbers["downloads_num_requests"] == 5
    assert [numbers[f"num_{n}"] for n in ("busy", "waiting", "worker_restarts")] == [6, 7, 8]


def test_failures_have_their_code() -> None:
    counters = StageCounters()
    for error in (MediaRefusedError, MediaRefusedError, MediaUndecodableError):
        with pytest.raises(error), counters.loading():
            raise error("no")
    numbers = flat(counters)
    assert (numbers["failure_media_refused"], numbers["failure_media_undecodable"]) == (2, 1)
    assert numbers["failures"] == 3


def test_items_are_loading_until_they_are_there_or_failed() -> None:
    counters = StageCounters()
    with counters.loading():
        with pytest.raises(KeyError), counters.loading():
            assert flat(counters)["num_loading"] == 2
            raise KeyError
        assert flat(counters)["num_loading"] == 1
    assert flat(counters)["num_loading"] == 0


class Decoders:
    """Says how many items are loading when it is asked for one, then fails if told to."""

    def __init__(self, error: SensoriumError | None = None) -> None:
        self.pipeline: MediaPipeline | None = None
        self.error = error
        self.num_loading: list[float] = []

    async def prepare(self, job: DecodeJob, source: object) -> Prepared:
        assert self.pipeline is not None
        self.num_loading.append(self.pipeline.stats().flat()["num_loading"])
        if self.error is not None:
            raise self.error
        return Prepared(Features("image", {}, 1, {}), 0.5, 10, 0.25)

    def stats(self) -> DecoderStats:
        return DecoderStats(num_waiting=3)

    def close(self) -> None:
        """Nothing is held."""


async def load(decoders: Decoders) -> dict[str, float]:
    """Two items; the pipeline's numbers afterwards."""
    pipeline = MediaPipeline(MediaConfig(), FakeProcessor(), FeatureCache(0), decoders=decoders)
    decoders.pipeline = pipeline
    try:
        with contextlib.suppress(SensoriumError):
            await pipeline.load(
                [MediaRef("image", "bytes", data, None, "p") for data in (b"a", b"b")]
            )
        return pipeline.stats().flat()
    finally:
        pipeline.close()


async def test_the_pipeline_counts_what_is_under_way() -> None:
    decoders = Decoders()
    numbers = await load(decoders)
    assert decoders.num_loading[0] == 2
    assert len(decoders.num_loading) == 2
    assert (numbers["num_loading"], numbers["num_waiting"]) == (0, 3)
    assert (numbers["decode_count"], numbers["decode_seconds"]) == (2, 1.0)
    assert (numbers["preprocess_seconds"], numbers["decode_num_bytes"]) == (0.5, 20)


@pytest.mark.parametrize("error", [MediaUndecodableError("no"), EngineDeadError("no workers")])
async def test_the_pipeline_counts_failures_of_either_kind(error: SensoriumError) -> None:
    numbers = await load(Decoders(error))
    assert numbers[f"failure_{error.code}"] in (1, 2), "the other item may have been cancelled"
    assert numbers["failures"] == numbers[f"failure_{error.code}"]
    assert numbers["num_loading"] == 0
    assert numbers["decode_count"] == 0
