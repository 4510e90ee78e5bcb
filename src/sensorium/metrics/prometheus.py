"""What Prometheus scrapes: histograms that requests fill, and gauges and counters read from the
engine's statistics.

Names follow vLLM's after the prefix, so that its dashboards work with ``--metrics-prefix vllm:``.
Each instance has a registry of its own: two servers in one process do not meet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sensorium.errors import ConfigError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_FINISH_REASONS = ("stop", "length", "abort", "error")
_MEDIA_STAGES = ("fetch", "decode", "preprocess")
_MEDIA_UNITS = (("items", "count"), ("seconds", "seconds"), ("bytes", "num_bytes"))


class Statistics(Protocol):
    """What the gauges and counters are read from: plain numbers, counted since the engine's start.

    ``media`` holds the media pipeline's counters by name: ``processor_cache_queries``,
    ``fetch_seconds``, ``decode_num_bytes`` and so on; a name that is absent counts as zero.
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
    encoder_resident_embeds: int
    num_preemptions: int
    prompt_tokens: int
    generation_tokens: int
    num_vectors: int
    num_steps: int
    media: dict[str, float]


class _Row(NamedTuple):
    """One number of the statistics under its public name."""

    name: str
    field: str
    help: str


_GAUGES = (
    _Row("num_requests_running", "num_running", "Sequences being computed."),
    _Row("num_requests_waiting", "num_waiting", "Sequences waiting to be scheduled."),
    _Row("mm_held_requests", "held_features", "Requests whose media the engine holds."),
    _Row(
        "mm_encoder_cache_resident_embeds",
        "encoder_resident_embeds",
        "Media embeddings held for reuse.",
    ),
)
_COUNTERS = (
    _Row("prefix_cache_queries", "prefix_queries", "Prompt tokens looked up in the prefix cache."),
    _Row("prefix_cache_hits", "prefix_hits", "Prompt tokens found in the prefix cache."),
    _Row("mm_encoder_cache_queries", "encoder_queries", "Media items looked up before encoding."),
    _Row("mm_encoder_cache_hits", "encoder_hits", "Media items whose embeddings were there."),
    _Row("mm_encoder_items", "encoder_items", "Media items encoded."),
    _Row("num_preemptions", "num_preemptions", "Sequences preempted."),
    _Row("prompt_tokens", "prompt_tokens", "Prompt tokens taken in."),
    _Row("generation_tokens", "generation_tokens", "Tokens generated."),
    _Row("vectors", "num_vectors", "Vectors made of prompts."),
    _Row("engine_steps", "num_steps", "Steps of the engine."),
)
_MEDIA_GAUGES = (
    _Row("mm_cache_bytes", "processor_cache_num_bytes", "Bytes of preprocessed media held."),
)
_MEDIA_COUNTERS = (
    _Row("mm_cache_queries", "processor_cache_queries", "Media items looked up preprocessed."),
    _Row("mm_cache_hits", "processor_cache_hits", "Media items found preprocessed."),
)


class ServingMetrics:
    """The metrics of one server.

    The front end calls ``first_token``, ``inter_token``, ``queue`` and ``finished``; the handler
    of ``/metrics`` calls ``update`` and ``render``. Raises ConfigError for a prefix that
    Prometheus does not allow.
    """

    def __init__(
        self,
        prefix: str = "sensorium:",
        registry: CollectorRegistry | None = None,
        *,
        model_name: str = "",
    ) -> None:
        if not re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*|", prefix):
            raise ConfigError(
                f"metrics_prefix must be letters, digits, '_' and ':', got {prefix!r}.",
                param="metrics_prefix",
            )
        self.registry = registry or CollectorRegistry()
        self._prefix = prefix
        self._model_name = model_name
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _SECONDS
        )
        self._inter_token = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a request.", _SECONDS
        )
        self._queue = self._histogram(
            "request_queue_time_seconds", "From arrival to the first step.", _SECONDS
        )
        self._end_to_end = self._histogram(
            "e2e_request_latency_seconds", "From arrival to the last token.", _SECONDS
        )
        self._prompt_tokens = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", _TOKENS
        )
        self._generation_tokens = self._histogram(
            "request_generation_tokens", "Tokens generated for a request.", _TOKENS
        )
        self._cached_tokens = self._histogram(
            "request_cached_tokens", "Prompt tokens of a request that were cached.", (0, *_TOKENS)
        )
        self._success = Counter(
            f"{prefix}request_success",
            "Requests finished, by reason.",
            ("model_name", "finished_reason"),
            registry=self.registry,
        )
        for reason in _FINISH_REASONS:
            self._success.labels(model_name, reason)
        self._engine = _EngineCollector(prefix, model_name)
        self.registry.register(self._engine)

    def first_token(self, seconds: float) -> None:
        """A request got its first token, this long after its arrival."""
        self._first_token.observe(seconds)

    def inter_token(self, seconds: float) -> None:
        """A request got a further token, this long after the one before."""
        self._inter_token.observe(seconds)

    def queue(self, seconds: float) -> None:
        """A request was scheduled for the first time, this long after its arrival."""
        self._queue.observe(seconds)

    def finished(
        self,
        finish_reason: str,
        num_prompt_tokens: int,
        num_generation_tokens: int,
        num_cached_tokens: int,
        e2e_seconds: float,
    ) -> None:
        """A request ended."""
        self._success.labels(self._model_name, finish_reason).inc()
        self._prompt_tokens.observe(num_prompt_tokens)
        self._generation_tokens.observe(num_generation_tokens)
        self._cached_tokens.observe(num_cached_tokens)
        self._end_to_end.observe(e2e_seconds)

    def update(self, stats: Statistics) -> None:
        """Take the engine's numbers for the renderings that follow."""
        self._engine.stats = stats

    def render(self) -> bytes:
        """Everything in Prometheus' text format."""
        return bytes(generate_latest(self.registry))

    def _histogram(self, name: str, help: str, buckets: Iterable[float]) -> Any:
        histogram = Histogram(
            f"{self._prefix}{name}",
            help,
            ("model_name",),
            buckets=tuple(buckets),
            registry=self.registry,
        )
        return histogram.labels(self._model_name)


class _EngineCollector(Collector):
    """Gauges and counters of the statistics that were given last; nothing before the first."""

    def __init__(self, prefix: str, model_name: str) -> None:
        self.stats: Statistics | None = None
        self._prefix = prefix
        self._labels = [model_name]

    def collect(self) -> Iterator[Metric]:
        stats = self.stats
        if stats is None:
            return
        for row in _GAUGES:
            yield self._gauge(row.name, row.help, getattr(stats, row.field))
        used = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
        yield self._gauge("kv_cache_usage_perc", "Part of the KV cache in use, 0 to 1.", used)
        for row in _COUNTERS:
            yield self._counter(row.name, row.help, getattr(stats, row.field))
        for row in _MEDIA_GAUGES:
            yield self._gauge(row.name, row.help, stats.media.get(row.field, 0.0))
        for row in _MEDIA_COUNTERS:
            yield self._counter(row.name, row.help, stats.media.get(row.field, 0.0))
        for unit, field in _MEDIA_UNITS:
            family = CounterMetricFamily(
                f"{self._prefix}media_stage_{unit}",
                f"{unit.capitalize()} that went through a stage of media loading.",
                labels=["model_name", "stage"],
            )
            for stage in _MEDIA_STAGES:
                value = stats.media.get(f"{stage}_{field}", 0.0)
                family.add_metric([*self._labels, stage], value)
            yield family

    def _gauge(self, name: str, help: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"{self._prefix}{name}", help, labels=["model_name"])
        family.add_metric(self._labels, value)
        return family

    def _counter(self, name: str, help: str, value: float) -> Metric:
        family = CounterMetricFamily(f"{self._prefix}{name}", help, labels=["model_name"])
        family.add_metric(self._labels, value)
        return family
