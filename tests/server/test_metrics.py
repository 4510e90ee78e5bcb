"""What the server counts of HTTP, and what /metrics says of its engine."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sensorium.errors import MediaRefusedError
from sensorium.metrics.families import COMMON_LABELS
from sensorium.metrics.servers import OtherServers
from tests.server.fake_frontend import FakeFrontend, fail, hang
from tests.server.harness import USER, App, running, until

CHAT = "/v1/chat/completions"


def values(app: Any, name: str) -> dict[tuple[str, ...], float]:
    """Values of a series by its labels in order of their names, the model's left out."""
    text = app.state.context.metrics.render().decode()
    return {
        tuple(v for k, v in sorted(sample.labels.items()) if k not in COMMON_LABELS): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


def counted(app: Any) -> dict[tuple[str, str, str], float]:
    """Requests by status, route and method."""
    counts = values(app, "http_requests_total")
    assert all(status == f"{code[0]}xx" for code, _, _, status in counts)
    return {labels[:3]: count for labels, count in counts.items()}


async def test_requests_are_counted_by_route_and_status() -> None:
    app = App()
    await app.chat()
    await app.chat(stream=True)
    await app.chat(temperature=-1)
    for name in ("demo", "other", "../../etc"):
        await app.get(f"/v1/models/{name}")
    assert counted(app.app) == {
        ("200", CHAT, "POST"): 2,
        ("400", CHAT, "POST"): 1,
        ("200", "/v1/models/{name:path}", "GET"): 1,
        ("404", "/v1/models/{name:path}", "GET"): 2,
    }
    seconds = values(app.app, "http_request_duration_seconds_count")
    assert seconds == {(CHAT, "POST"): 3, ("/v1/models/{name:path}", "GET"): 3}


async def test_what_clients_make_up_becomes_no_label() -> None:
    app = App(api_key=("right",))
    right = {"authorization": "Bearer right"}
    for number in range(20):
        await app.get(f"/made/up/{number}", right)
        await app.get(f"/v1/models?x={number}")
        await app.request(f"MAKE{number}", "/health", headers=right)
        await app.request("DELETE", CHAT, headers=right)
    assert counted(app.app) == {
        ("404", "none", "GET"): 20,
        ("401", "none", "GET"): 20,
        ("405", "/health", "other"): 20,
        ("405", CHAT, "DELETE"): 20,
    }


async def test_failures_are_counted_as_they_are_answered() -> None:
    app = App(FakeFrontend(before=fail(MediaRefusedError("no"))))
    await app.chat()
    app.frontend.before = fail(RuntimeError("unexpected"))
    await app.chat()
    app.frontend.before = None
    app.frontend.between = fail(RuntimeError("in the middle of a stream"))
    await app.chat(stream=True)
    counts = {("400", CHAT, "POST"): 1, ("500", CHAT, "POST"): 1, ("200", CHAT, "POST"): 1}
    assert counted(app.app) == counts


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_left_is_counted_as_such(stream: bool) -> None:
    frontend = FakeFrontend(**{"between" if stream else "before": hang})
    async with running(frontend) as server:
        reader, writer = await server.send(CHAT, {"messages": USER, "stream": stream})
        await until(lambda: frontend.num_open)
        if stream:
            await asyncio.wait_for(reader.readline(), 60)
        writer.close()
        await until(lambda: counted(server.app))
        assert counted(server.app) == {("499", CHAT, "POST"): 1}


async def test_metrics_say_whether_the_engine_serves() -> None:
    app = App()
    for alive in (True, False, True):
        app.frontend.alive = alive
        assert (await app.get("/metrics")).status == 200
        assert values(app.app, "sensorium:engine_up") == {(): float(alive)}
    assert counted(app.app) == {("200", "/metrics", "GET"): 3}
    app.app.state.context.arrivals.draining = True
    await app.get("/metrics")
    assert values(app.app, "sensorium:engine_up") == {(): 0.0}


async def test_other_processes_are_asked_for_their_metrics() -> None:
    app, other = App(), App()
    await other.chat()

    async def ask() -> OtherServers:
        return OtherServers("a", {"b": other.app.state.context.metrics.of_process()})

    app.app.state.context.ask_others = ask
    text = (await app.get("/metrics")).body.decode()
    own = [line for line in text.splitlines() if line.startswith("http_requests_total{")]
    assert len(own) == 1
    assert 'server="b"' in own[0]
    assert 'server="a"' in text
