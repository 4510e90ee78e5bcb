"""Gauges and counters that are read from the engine's statistics when they are scraped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sensorium.metrics.families import (
    ENGINE_ROWS,
    ENGINE_UP,
    FAILURE,
    KV_USAGE,
    MEDIA_CODES,
    MEDIA_FAILURES,
    MEDIA_ROWS,
    PROMPT_MODALITIES,
    STAGE_UNITS,
    STAGES,
    Family,
)


class Statistics(Protocol):
    """What the gauges and counters are read from: plain numbers, counted since the engine's start.

    ``item_tokens`` are those of ``prompt_tokens`` that items of a modality fill. ``media`` holds the media pipeline's
    numbers by name: ``processor_cache_queries``, ``fetch_seconds``, ``failure_media_refused`` and so on; a name that is
    absent counts as zero.
    """

    num_running: int
    num_waiting: int
    kv_blocks_total: int
    kv_blocks_used: int
    prefix_queries: int
    prefix_hits: int
    encoder_queries: int
    encoder_hits: int
    encoder_items: int
    encoder_evictions: int
    encoder_resident_embeds: int
    encoder_num_bytes: int
    encoder_capacity_bytes: int
    encode_items: int
    encode_seconds: float
    encode_num_bytes: int
    encode_failures: int
    num_preemptions: int
    num_engine_restarts: int
    prompt_tokens: int
    generation_tokens: int
    num_vectors: int
    num_unusable: int
    num_steps: int
    held_features: int
    item_tokens: dict[str, int]
    media: dict[str, float]


class StatisticsCollector(Collector):
    """Metrics of the statistics that were given last; nothing before the first."""

    def __init__(self, prefix: str, model_name: str) -> None:
        self._prefix = prefix
        self._labels = [model_name]
        self._stats: Statistics | None = None
        self._up = False

    def update(self, stats: Statistics, *, up: bool) -> None:
        """Take these numbers; ``up`` says whether the engine can serve."""
        self._stats, self._up = stats, up

    def collect(self) -> Iterator[Metric]:
        """Each family with its values."""
        stats = self._stats
        if stats is None:
            return
        yield self._one(ENGINE_UP, float(self._up))
        used = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
        yield self._one(KV_USAGE, used)
        for row in ENGINE_ROWS:
            yield self._one(row.family, getattr(stats, row.field))
        yield self._many(PROMPT_MODALITIES, _modalities(stats))
        for row in MEDIA_ROWS:
            yield self._one(row.family, stats.media.get(row.field, 0.0))
        stages = {
            **stats.media,
            "encode_count": stats.encode_items,
            "encode_seconds": stats.encode_seconds,
            "encode_num_bytes": stats.encode_num_bytes,
        }
        for family, unit in STAGE_UNITS:
            yield self._many(
                family, {stage: stages.get(f"{stage}_{unit}", 0.0) for stage in STAGES}
            )
        yield self._many(MEDIA_FAILURES, _failures(stats.media))

    def _one(self, family: Family, value: float) -> Metric:
        metric = self._new(family)
        metric.add_metric(self._labels, value)
        return metric

    def _many(self, family: Family, values: Mapping[str, float]) -> Metric:
        """A family with one label of its own: values by that label's."""
        metric = self._new(family)
        for label, value in values.items():
            metric.add_metric([*self._labels, label], value)
        return metric

    def _new(self, family: Family) -> GaugeMetricFamily | CounterMetricFamily:
        new = GaugeMetricFamily if family.kind == "gauge" else CounterMetricFamily
        labels = ["model_name", *family.labels]
        return new(family.full_name(self._prefix), family.help, labels=labels)


def _modalities(stats: Statistics) -> dict[str, float]:
    items = {
        modality: stats.item_tokens.get(modality, 0) for modality in ("image", "video", "audio")
    }
    return {"text": stats.prompt_tokens - sum(items.values()), **items}


def _failures(media: Mapping[str, float]) -> dict[str, float]:
    occurred = {
        name.removeprefix(FAILURE): value
        for name, value in media.items()
        if name.startswith(FAILURE)
    }
    return {**dict.fromkeys(MEDIA_CODES, 0.0), **occurred}
