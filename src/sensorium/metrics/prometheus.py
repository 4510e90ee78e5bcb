"""Prometheus metrics of a server: of its requests, and of the statistics of its engines.

Each server has a registry of its own, so one process may run several.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import Metric

from sensorium.errors import ConfigError
from sensorium.metrics import families
from sensorium.metrics.families import COMMON_LABELS, ENGINE, MetricFamily
from sensorium.metrics.processes import MemoryCollector
from sensorium.metrics.report import RequestReport
from sensorium.metrics.servers import OtherServers, merged, of_process, registry_of
from sensorium.metrics.statistics import EncoderStatistics, Statistics, StatisticsCollector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})


class _Families:
    """The families of one server, each registered once, whatever number of models has series."""

    def __init__(self, prefix: str, registry: CollectorRegistry) -> None:
        if not re.fullmatch(r"[a-zA-Z_:][a-zA-Z0-9_:]*|", prefix):
            raise ConfigError(
                f"metrics_prefix must be letters, digits, '_' and ':', got {prefix!r}.",
                param="metrics_prefix",
            )
        disable_created_metrics()  # they double the series and are of no use
        self.registry = registry
        self.statistics = StatisticsCollector(prefix)
        registry.register(self.statistics)
        registry.register(MemoryCollector(prefix, ("", ENGINE)))  # of no single model
        self.prefix = prefix
        self._known: dict[str, Histogram | Counter] = {}

    def histogram(self, family: MetricFamily) -> Histogram:
        """Return a family of histograms."""
        found = self._known.get(family.name)
        if found is None:
            found = self._known[family.name] = Histogram(
                family.full_name(self.prefix),
                family.help,
                (*COMMON_LABELS, *family.labels),
                buckets=family.buckets,
                registry=self.registry,
            )
        assert isinstance(found, Histogram)
        return found

    def counter(self, family: MetricFamily) -> Counter:
        """Return a family of counters."""
        found = self._known.get(family.name)
        if found is None:
            name, labels = family.full_name(self.prefix), (*COMMON_LABELS, *family.labels)
            found = Counter(name, family.help, labels, registry=self.registry)
            self._known[family.name] = found
        assert isinstance(found, Counter)
        return found


class ServerMetrics:
    """The metrics of a server's HTTP requests, and the registry of all its metrics.

    The middleware calls ``http_request``, ``LagSampler`` ``loop_lag``, and the route of
    ``/metrics`` ``render``. ``model_name`` is the label of requests that name no model. Raises
    ConfigError for a prefix that Prometheus does not allow.
    """

    def __init__(
        self,
        prefix: str = "sensorium:",
        registry: CollectorRegistry | None = None,
        *,
        model_name: str = "",
        families_: _Families | None = None,
    ) -> None:
        self._families = families_ or _Families(prefix, registry or CollectorRegistry())
        self._model_name = model_name
        self._loop_lag = self._families.histogram(families.EVENT_LOOP_LAG)
        if families_ is None:
            self._loop_lag.labels(model_name, ENGINE)  # a series from the start
        self._http_requests = self._families.counter(families.HTTP_REQUESTS)
        self._http_seconds = self._families.histogram(families.HTTP_SECONDS)

    @property
    def registry(self) -> CollectorRegistry:
        """Return the registry."""
        return self._families.registry

    def for_model(self, model_name: str) -> ServingMetrics:
        """Return the metrics of one model, in the same registry."""
        if isinstance(self, ServingMetrics) and model_name == self._model_name:
            return self
        return ServingMetrics(model_name=model_name, families_=self._families)

    def loop_lag(self, seconds: float) -> None:
        """Record how late a timer of the event loop fired."""
        self._loop_lag.labels(self._model_name, ENGINE).observe(seconds)

    def http_request(self, route: str | None, method: str, status: int, seconds: float) -> None:
        """Record an HTTP request.

        ``route`` is the template of its path, or None. Unknown paths and methods do not become
        labels, as clients could make up any number of them.
        """
        handler = route or "none"
        method = method if method in _METHODS else "other"
        labels = (self._model_name, ENGINE, handler, method)
        self._http_requests.labels(*labels, f"{status // 100}xx", str(status)).inc()
        self._http_seconds.labels(*labels).observe(seconds)

    def render(self, others: OtherServers | None = None) -> bytes:
        """Return all metrics in Prometheus' text format, with those of other processes."""
        if others is None:
            return bytes(generate_latest(self.registry))
        families = merged(list(self.registry.collect()), others, self._families.prefix)
        return bytes(generate_latest(registry_of(families)))

    def of_process(self) -> list[Metric]:
        """Return what is of this process, and not of the replicas of engines behind it."""
        return of_process(self.registry.collect())


class ServingMetrics(ServerMetrics):
    """The metrics of one model, and of the HTTP requests that name it.

    The frontend calls ``first_token``, ``inter_token``, ``queue`` and ``finished``, the route of
    ``/metrics`` ``update``.
    """

    def __init__(
        self,
        prefix: str = "sensorium:",
        registry: CollectorRegistry | None = None,
        *,
        model_name: str = "",
        families_: _Families | None = None,
    ) -> None:
        super().__init__(prefix, registry, model_name=model_name, families_=families_)
        self._first_token = self._histogram(families.TIME_TO_FIRST_TOKEN)
        self._inter_token = self._histogram(families.INTER_TOKEN)
        self._queue = self._histogram(families.QUEUE_TIME)
        self._prefill = self._histogram(families.PREFILL_TIME)
        self._decode = self._histogram(families.DECODE_TIME)
        self._inference = self._histogram(families.INFERENCE_TIME)
        self._time_per_token = self._histogram(families.TIME_PER_TOKEN)
        self._end_to_end = self._histogram(families.END_TO_END)
        self._prompt_tokens = self._histogram(families.PROMPT_TOKENS)
        self._generation_tokens = self._histogram(families.GENERATION_TOKENS)
        self._longest_sample = self._histogram(families.LONGEST_SAMPLE)
        self._cached_tokens = self._histogram(families.CACHED_TOKENS)
        self._computed_tokens = self._histogram(families.COMPUTED_TOKENS)
        self._num_samples = self._histogram(families.PARAM_N)
        self._max_tokens = self._histogram(families.PARAM_MAX_TOKENS)
        success = self._families.counter(families.SUCCESS)
        self._success = {r: success.labels(model_name, ENGINE, r) for r in families.FINISH_REASONS}
        self._lora_requests = self._families.counter(families.LORA_REQUESTS)
        self._adapters: set[str] = set()

    def first_token(self, seconds: float) -> None:
        """Record the time from a request's arrival to its first token."""
        self._first_token.observe(seconds)

    def inter_token(self, seconds: float) -> None:
        """Record the time between two tokens of a request."""
        self._inter_token.observe(seconds)

    def queue(self, seconds: float) -> None:
        """Record the time from a request's arrival to its first step."""
        self._queue.observe(seconds)

    def finished(self, report: RequestReport) -> None:
        """Record a request that has ended."""
        self._success[report.finish_reason].inc()
        if report.adapter:
            self._count_adapter(report.adapter)
        self._end_to_end.observe(report.e2e_seconds)
        self._prompt_tokens.observe(report.num_prompt_tokens)
        self._cached_tokens.observe(report.num_cached_tokens)
        self._computed_tokens.observe(report.num_prompt_tokens - report.num_cached_tokens)
        self._generation_tokens.observe(report.num_generation_tokens)
        self._longest_sample.observe(report.longest_sample)
        self._num_samples.observe(report.num_samples)
        if report.max_tokens:
            self._max_tokens.observe(report.max_tokens)
        for histogram, seconds in (
            (self._prefill, report.prefill_seconds),
            (self._decode, report.decode_seconds),
            (self._inference, report.inference_seconds),
            (self._time_per_token, report.seconds_per_token),
        ):
            if seconds is not None:
                histogram.observe(seconds)

    def update(self, stats: Statistics | None, *, up: bool = True) -> None:
        """Set the engine's statistics for the next renderings; None before its first start.

        ``up``: it can serve requests.
        """
        self._families.statistics.update((self._model_name, ENGINE), stats, up=up)

    def update_replicas(
        self,
        replicas: Mapping[str, tuple[Statistics, bool]],
        media: Mapping[str, float],
        *,
        up: bool = True,
    ) -> None:
        """Set the statistics of replicas, by the name that is their label ``engine``.

        ``media``: numbers of this process, which loads media for them; see ``Statistics``. ``up``:
        the server takes requests; of each replica likewise. Those that were set before and are not
        among them are forgotten.
        """
        statistics = self._families.statistics
        for name, (stats, is_up) in replicas.items():
            labels = (self._model_name, name)
            statistics.update(labels, stats, up=up and is_up, is_replica=True)
        statistics.keep([(self._model_name, name) for name in replicas], self._model_name)
        statistics.update_media((self._model_name, ENGINE), media)

    def update_encoders(self, encoders: EncoderStatistics | None) -> None:
        """Set the statistics of replicas that encode media apart; None where engines do."""
        self._families.statistics.update_encoders(self._model_name, ENGINE, encoders)

    def _count_adapter(self, name: str) -> None:
        """Count a request of an adapter. Names beyond the limit share a series."""
        if name not in self._adapters:
            if len(self._adapters) < families.MOST_ADAPTERS:
                self._adapters.add(name)
            else:
                name = families.OTHER_ADAPTERS
        self._lora_requests.labels(self._model_name, ENGINE, name).inc()

    def _histogram(self, family: MetricFamily) -> Histogram:
        return self._families.histogram(family).labels(self._model_name, ENGINE)
