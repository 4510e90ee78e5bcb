"""Gauges and counters of the engine's statistics, read when they are scraped."""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from sensorium.metrics.encoder_families import (
    ENCODER_FALLBACKS,
    ENCODER_REASONS,
    ENCODER_REFUSED,
    ENCODER_ROWS,
)
from sensorium.metrics.families import (
    ACCEPTED_AT,
    CACHE_CONFIG,
    COMMON_LABELS,
    ENGINE_ROWS,
    ENGINE_STAGES,
    ENGINE_UP,
    FAILURE,
    ITERATION_TOKENS,
    KV_USAGE,
    LORA_INFO,
    LORA_ROWS,
    MEDIA_CODES,
    MEDIA_FAILURES,
    MEDIA_ROWS,
    PROMPT_MODALITIES,
    PROMPT_SOURCES,
    SLEEP_STATE,
    STAGE_UNITS,
    STAGES,
    WAITING_REASONS,
    MetricFamily,
)


class Statistics(Protocol):
    """Statistics of an engine, counted since its start.

    ``num_deferred`` of ``num_waiting`` wait for their grammar. ``iteration_counts`` has the numbers
    of steps by bucket of ``ITERATION_TOKENS`` and a last one for larger steps (it is empty before
    the first step); ``iteration_tokens`` is the sum. ``num_accepted_at`` has
    ``num_accepted_tokens`` by position. ``item_tokens`` has the part of ``prompt_tokens`` that
    items fill, by modality. ``media`` has the numbers of the media pipeline
    by name, such as ``processor_cache_queries``, ``fetch_seconds`` and ``failure_media_refused``;
    an absent name counts as zero. ``max_loras``: most LoRA adapters that are loaded, 0 where there
    are none. ``running_adapters`` and ``waiting_adapters`` are names.
    """

    num_running: int
    num_waiting: int
    num_deferred: int
    block_size: int
    cache_dtype: str
    enable_prefix_caching: bool
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
    num_embeddings: int
    num_unusable: int
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_at: list[int]
    num_steps: int
    iteration_counts: list[int]
    iteration_tokens: int
    held_features: int
    item_tokens: dict[str, int]
    media: dict[str, float]
    max_loras: int
    lora_num_bytes: int
    lora_capacity_bytes: int
    running_adapters: list[str]
    waiting_adapters: list[str]


class EncoderStatistics(Protocol):
    """Statistics of replicas that encode media apart from engines.

    ``replicas``: by name, with the fields of ``ENCODER_ROWS``. ``fallbacks``: items that engines
    had to encode, by one of ``ENCODER_REASONS``. ``num_refused``: items that ended encoders.
    """

    @property
    def replicas(self) -> Mapping[str, object]: ...

    @property
    def fallbacks(self) -> Mapping[str, int]: ...

    @property
    def num_refused(self) -> int: ...


class StatisticsCollector(Collector):
    """Collector of the statistics that were set last, of each engine; of none before the first."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._latest: dict[tuple[str, ...], tuple[Statistics | None, bool, bool]] = {}
        self._media: dict[tuple[str, ...], Mapping[str, float]] = {}
        self._encoders: dict[tuple[str, str], EncoderStatistics] = {}

    def update_encoders(
        self, model_name: str, engine: str, encoders: EncoderStatistics | None
    ) -> None:
        """Set the statistics of replicas that encode media apart; None where engines do.

        ``engine``: label of what is about no single replica.
        """
        if encoders is None:
            self._encoders.pop((model_name, engine), None)
        else:
            self._encoders[model_name, engine] = encoders

    def update(
        self,
        labels: tuple[str, ...],
        stats: Statistics | None,
        *,
        up: bool,
        is_replica: bool = False,
    ) -> None:
        """Set the statistics of an engine; None before its first start.

        ``labels``: its values of ``COMMON_LABELS``. ``up``: it can serve requests. ``is_replica``:
        media are loaded elsewhere, and it only encodes them.
        """
        self._latest[labels] = stats, up, is_replica

    def update_media(self, labels: tuple[str, ...], media: Mapping[str, float]) -> None:
        """Set the numbers of media of a process that loads them for replicas."""
        self._media[labels] = media

    def keep(self, labels: Collection[tuple[str, ...]], model_name: str) -> None:
        """Forget the engines of a model that are not among ``labels``."""
        for known in [key for key in self._latest if key[0] == model_name and key not in labels]:
            del self._latest[known]

    def collect(self) -> Iterator[Metric]:
        """Yield each family with its values for all engines."""
        merged: dict[str, Metric] = {}
        for metric in self._of_all():
            known = merged.setdefault(metric.name, metric)
            if known is not metric:
                known.samples.extend(metric.samples)
        yield from merged.values()
        if self._encoders:
            yield from self._of_encoders()

    def _of_encoders(self) -> Iterator[Metric]:
        for row in ENCODER_ROWS:
            metric = _new(self._prefix, row.family)
            for (model_name, _), encoders in self._encoders.items():
                for name, stats in encoders.replicas.items():
                    metric.add_metric([model_name, name], getattr(stats, row.field))
            yield metric
        fallbacks, refused = (_new(self._prefix, f) for f in (ENCODER_FALLBACKS, ENCODER_REFUSED))
        for labels, encoders in self._encoders.items():
            for reason in ENCODER_REASONS:
                fallbacks.add_metric([*labels, reason], encoders.fallbacks.get(reason, 0))
            refused.add_metric(labels, encoders.num_refused)
        yield fallbacks
        yield refused

    def _of_all(self) -> Iterator[Metric]:
        """Yield families, those of each engine for itself."""
        for labels, (stats, up, is_replica) in self._latest.items():
            engine = _EngineMetrics(self._prefix, labels)
            yield from engine.metrics(stats, up=up)
            if stats is None:
                continue
            encoding = {
                "encode_count": stats.encode_items,
                "encode_seconds": stats.encode_seconds,
                "encode_num_bytes": stats.encode_num_bytes,
            }
            if is_replica:
                yield from engine.stages(encoding, ENGINE_STAGES)
            else:
                yield from engine.media(stats.media)
                yield from engine.stages({**stats.media, **encoding}, STAGES)
        for labels, media in self._media.items():
            process = _EngineMetrics(self._prefix, labels)
            yield from process.media(media)
            yield from process.stages(media, [s for s in STAGES if s not in ENGINE_STAGES])


class _EngineMetrics:
    """The metrics of one engine. ``labels``: values of ``COMMON_LABELS``."""

    def __init__(self, prefix: str, labels: Sequence[str]) -> None:
        self._prefix = prefix
        self._labels = list(labels)

    def metrics(self, stats: Statistics | None, *, up: bool) -> Iterator[Metric]:
        """Yield each family; without statistics only the one that says if the engine is up."""
        yield self._one(ENGINE_UP, float(up))
        if up:
            states = {"awake": 1.0, "weights_offloaded": 0.0, "discard_all": 0.0}
            yield self._many(SLEEP_STATE, states)
        if stats is None:
            return
        used = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
        yield self._one(KV_USAGE, used)
        for row in ENGINE_ROWS:
            yield self._one(row.family, getattr(stats, row.field))
        yield self._many(PROMPT_MODALITIES, _modalities(stats))
        # Not from prompt_tokens, which count at admission: the counter must not fall at the start.
        cached = stats.prefix_hits
        sources = {"local_compute": stats.prefix_queries - cached, "local_cache_hit": cached}
        yield self._many(PROMPT_SOURCES, sources)
        reasons = {
            "capacity": stats.num_waiting - stats.num_deferred,
            "deferred": stats.num_deferred,
        }
        yield self._many(WAITING_REASONS, reasons)
        accepted = {str(place): num for place, num in enumerate(stats.num_accepted_at or [0])}
        yield self._many(ACCEPTED_AT, accepted)
        yield self._iterations(stats)
        yield self._cache_config(stats)
        if stats.max_loras:
            yield self._lora_info(stats)
            for row in LORA_ROWS:
                yield self._one(row.family, getattr(stats, row.field))

    def media(self, media: Mapping[str, float]) -> Iterator[Metric]:
        """Yield the families of the process that loads media, but for the stages."""
        for row in MEDIA_ROWS:
            yield self._one(row.family, media.get(row.field, 0.0))
        yield self._many(MEDIA_FAILURES, _failures(media))

    def stages(self, numbers: Mapping[str, float], stages: Sequence[str]) -> Iterator[Metric]:
        """Yield the families of some stages; ``numbers`` by stage and unit."""
        for family, unit in STAGE_UNITS:
            yield self._many(
                family, {stage: numbers.get(f"{stage}_{unit}", 0.0) for stage in stages}
            )

    def _iterations(self, stats: Statistics) -> Metric:
        family = ITERATION_TOKENS
        metric = HistogramMetricFamily(
            family.full_name(self._prefix), family.help, labels=COMMON_LABELS
        )
        bounds = [*map(str, map(float, family.buckets)), "+Inf"]
        counts = itertools.accumulate(stats.iteration_counts or [0] * len(bounds))
        buckets = list(zip(bounds, counts, strict=True))
        metric.add_metric(self._labels, buckets=buckets, sum_value=stats.iteration_tokens)
        return metric

    def _cache_config(self, stats: Statistics) -> Metric:
        metric = _new(self._prefix, CACHE_CONFIG)
        values = (stats.block_size, stats.kv_blocks_total, stats.cache_dtype)
        metric.add_metric([*self._labels, *map(str, values), str(stats.enable_prefix_caching)], 1.0)
        return metric

    def _lora_info(self, stats: Statistics) -> Metric:
        metric = _new(self._prefix, LORA_INFO)
        names = (stats.waiting_adapters, stats.running_adapters)
        values = [str(stats.max_loras), *map(",".join, names)]
        metric.add_metric([*self._labels, *values], time.time())
        return metric

    def _one(self, family: MetricFamily, value: float) -> Metric:
        metric = _new(self._prefix, family)
        metric.add_metric(self._labels, value)
        return metric

    def _many(self, family: MetricFamily, values: Mapping[str, float]) -> Metric:
        """Return a family with one label of its own; ``values`` by that label."""
        metric = _new(self._prefix, family)
        for label, value in values.items():
            metric.add_metric([*self._labels, label], value)
        return metric


def _new(prefix: str, family: MetricFamily) -> GaugeMetricFamily | CounterMetricFamily:
    new = GaugeMetricFamily if family.kind == "gauge" else CounterMetricFamily
    labels = [*COMMON_LABELS, *family.labels]
    return new(family.full_name(prefix), family.help, labels=labels)


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
