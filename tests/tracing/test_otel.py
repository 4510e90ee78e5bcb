"""OpenTelemetry: what a collector gets of a request, and what happens without one."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from sensorium.errors import ConfigError, InvalidRequestError
from sensorium.tracing import Tracer, asked_model, caller_span
from tests.server.harness import App

PARENT = f"00-{'ab' * 16}-{'cd' * 8}-01"


class Collector:
    """A server that takes spans."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.spans: list[Any] = []
        self.services: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                outer.take(self.path, ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Nothing is logged."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def take(self, path: str, request: ExportTraceServiceRequest) -> None:
        self.paths.append(path)
        for part in request.resource_spans:
            named = {a.key: a.value.string_value for a in part.resource.attributes}
            self.services.append(named["service.name"])
            for scope in part.scope_spans:
                self.spans += scope.spans


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.server.shutdown()
    made.server.server_close()


def facts_of(span: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


def test_a_request_is_a_span_with_one_for_each_station(collector: Collector) -> None:
    tracer = Tracer(None, collector.url, "folder/model")
    token, asked = caller_span.set(PARENT), asked_model.set("alias")
    arrival = time.monotonic() - 10
    trace = tracer.request("request-1", arrival, operation="chat", adapter="french")
    asked_model.reset(asked)
    caller_span.reset(token)
    assert trace is not None
    trace.station("rendered", arrival, arrival + 0.5, tokens=9)
    place = "messages[0].content[0]"
    trace.station("decoded", arrival + 0.5, arrival + 0.75, item=place, modality="image")
    trace.station("prepared", end=arrival + 0.8, tokens=40, items=1)
    trace.station("submitted", end=arrival + 1)
    trace.prefilled(arrival + 2, arrival + 3, [(arrival + 2, arrival + 2.5, 1)])
    trace.station("first token", end=arrival + 3.5)
    trace.end("finished", reason="length", tokens=7)
    tracer.close()

    spans = {span.name: span for span in collector.spans}
    assert collector.paths == ["/v1/traces"]
    assert collector.services == ["sensorium"]
    assert len(spans) == len(collector.spans)
    root = spans.pop("llm_request")
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == ("ab" * 16, "cd" * 8)
    facts = facts_of(root)
    [reason] = facts.pop("gen_ai.response.finish_reasons").values
    assert reason.string_value == "length"
    assert facts == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "sensorium",
        "gen_ai.request.id": "request-1",
        "gen_ai.request.model": "alias",
        "gen_ai.response.model": "folder/model",
        "sensorium.adapter": "french",
        "gen_ai.usage.input_tokens": 40,
        "gen_ai.usage.output_tokens": 7,
        "gen_ai.latency.time_to_first_token": pytest.approx(3.5),
        "sensorium.ended": "finished",
    }
    phases = {"prepare", "queue", "prefill", "decode"}
    assert set(spans) == {*phases, "rendered", "decoded", "encoded"}
    assert {span.parent_span_id for span in spans.values()} == {root.span_id}
    taken = {
        name: (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
        for name, span in spans.items()
    }
    decode = taken.pop("decode")
    assert taken == pytest.approx(
        {
            "prepare": 1,
            "queue": 1,
            "prefill": 1,
            "rendered": 0.5,
            "decoded": 0.25,
            "encoded": 0.5,
        },
        abs=1e-3,
    )
    assert decode > 6
    assert facts_of(spans["decoded"]) == {"item": place, "modality": "image"}
    assert {event.name for event in root.events} >= {"received", "scheduled", "first token"}
    assert abs(root.start_time_unix_nano / 1e9 - time.time()) < 3600


def test_a_request_that_failed_says_so(collector: Collector) -> None:
    tracer = Tracer(None, f"{collector.url}/elsewhere")
    trace = tracer.request("request-2", time.monotonic())
    assert trace is not None
    trace.end_by(InvalidRequestError("What and why."))
    tracer.close()
    [span] = collector.spans
    assert collector.paths == ["/elsewhere"]
    assert span.status.code == span.status.STATUS_CODE_ERROR
    assert span.status.message == "invalid_request"
    assert facts_of(span)["error.type"] == "invalid_request"
    assert span.parent_span_id == b""


@pytest.mark.parametrize(
    "endpoint", ["", "collector:4318", "grpc://collector:4317", "http://", "http://a:x/"]
)
def test_what_is_no_url_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigError, match="otlp_traces_endpoint must be the URL"):
        Tracer(None, endpoint)


@pytest.mark.parametrize(
    ("value", "known"), [(PARENT, True), ("00-1-2-3", False), ("x" * 9000, False), (None, False)]
)
async def test_the_span_of_a_client_reaches_its_request(value: str | None, known: bool) -> None:
    seen: list[tuple[str | None, str | None]] = []
    app = App()
    app.frontend.before = lambda call: seen.append((caller_span.get(), asked_model.get()))
    headers = {} if value is None else {"traceparent": value}
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    assert (await app.post("/v1/chat/completions", body, headers)).status == 200
    assert seen == [(value if known else None, app.models.default.name)]
    assert (caller_span.get(), asked_model.get()) == (None, None)
