"""OpenTelemetry spans of requests, sent to a collector over OTLP.

Names of attributes are those of OpenTelemetry's conventions for generative AI; the span of a
request is called as in vLLM, and so are its id and the time to its first token, which the
conventions leave out.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from sensorium import __version__
from sensorium.errors import ConfigError
from sensorium.tracing.stations import PHASES, Fact, RequestTrace
from sensorium.tracing.writer import QueueWriter

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

OPTION = "otlp_traces_endpoint"
PATH = "/v1/traces"
"""Path of an endpoint that has none, as OTLP prescribes it."""
MOST_WAITING = 1 << 14
"""Spans that wait to be sent; further ones are dropped by the library."""
_NANO = 1_000_000_000


class SpanWriter(QueueWriter):
    """Makes spans of ended traces; the OpenTelemetry library sends them in batches.

    Environment variables of that library hold: ``OTEL_SERVICE_NAME``,
    ``OTEL_EXPORTER_OTLP_HEADERS``, ``OTEL_TRACES_SAMPLER`` and so on. Raises ConfigError when the
    library is not installed, and for an endpoint that is no URL.
    """

    def __init__(self, endpoint: str) -> None:
        self._provider = _provider(_checked(endpoint))
        self._tracer = self._provider.get_tracer("sensorium", __version__)
        super().__init__("sensorium-spans", "spans could not be made in time")

    def _handle(self, trace: RequestTrace) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        clock = time.time() - time.monotonic()  # it may have been set since the last trace

        def nanoseconds(moment: float) -> int:
            return int((clock + moment) * _NANO)

        outer = None
        if trace.parent is not None:
            outer = TraceContextTextMapPropagator().extract({"traceparent": trace.parent})
        last_name, _, last, facts = trace.stations[-1]
        first = min(start for _, start, _, _ in trace.stations)
        root = self._tracer.start_span(
            "llm_request",
            outer,
            SpanKind.SERVER,
            _attributes(trace),
            start_time=nanoseconds(first),
        )
        inner = set_span_in_context(root)
        for name, start, end, told in _spans(trace):
            span = self._tracer.start_span(
                name, inner, attributes=told, start_time=nanoseconds(start)
            )
            span.end(nanoseconds(end))
        for name, start, end, told in trace.stations:
            if start == end:
                root.add_event(name, told, nanoseconds(end))
        if last_name == "failed":
            root.set_status(Status(StatusCode.ERROR, str(facts.get("code", ""))))
        root.end(nanoseconds(last))

    def _finish(self) -> None:
        self._provider.shutdown()


def _checked(endpoint: str) -> str:
    """Return the URL of the collector. Raises ConfigError."""
    try:
        parts = urlsplit(endpoint)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise ConfigError(
            f"{OPTION} must be the URL of a collector that takes OTLP over HTTP, such as "
            f"http://127.0.0.1:4318{PATH}, got {endpoint!r:.200}.",
            param=OPTION,
        )
    return endpoint.rstrip("/") + PATH if parts.path in ("", "/") else endpoint


def _provider(endpoint: str) -> TracerProvider:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"{OPTION} needs packages that are not installed: pip install 'sensorium[otel]'.",
            param=OPTION,
        ) from error
    named = Resource({"service.name": "sensorium"}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=Resource.create().merge(named), shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint)
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=MOST_WAITING))
    return provider


def _attributes(trace: RequestTrace) -> dict[str, Fact | list[str]]:
    """Return the attributes of a request as a whole."""
    work = trace.work
    named = {
        "gen_ai.operation.name": work.operation,
        "gen_ai.provider.name": "sensorium",
        "gen_ai.request.id": trace.request_id,
        "gen_ai.request.model": work.asked,
        "gen_ai.response.model": work.model,
        "sensorium.adapter": work.adapter,
    }
    found: dict[str, Fact | list[str]] = {name: value for name, value in named.items() if value}
    for name, _, end, facts in trace.stations:
        if name == "prepared":
            found["gen_ai.usage.input_tokens"] = facts["tokens"]
        elif name == "first token":
            found["gen_ai.latency.time_to_first_token"] = end - trace.arrival
        elif name == "finished":
            found |= {
                "gen_ai.usage.output_tokens": facts.get("tokens", 0),
                "gen_ai.response.finish_reasons": str(facts.get("reason", "stop")).split(","),
            }
        elif name == "failed":
            found["error.type"] = facts.get("code", "_OTHER")
    found["sensorium.ended"] = trace.stations[-1][0]
    return found


def _spans(trace: RequestTrace) -> list[tuple[str, float, float, dict[str, Fact]]]:
    """Return name, start, end and attributes of phases, and of the work within them."""
    times: dict[str, float] = {}
    for name, _, end, _ in trace.stations:
        times.setdefault(name, end)
    phases: list[tuple[str, float, float, dict[str, Fact]]] = [
        (name, times[begins], times[ends], {})
        for name, begins, ends in PHASES
        if begins in times and ends in times
    ]
    return [*phases, *(station for station in trace.stations if station[1] < station[2])]
