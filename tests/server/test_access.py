"""API keys, CORS, paths below a prefix, and the queue's limit."""

from __future__ import annotations

import asyncio

import pytest

from sensorium.server.admission import Admission
from tests.server.fake_frontend import FakeFrontend, hang
from tests.server.harness import USER, App, until

GUARDED = [
    "/playground/facts",
    "/v1/models",
    "/v1/models/demo",
    "/version",
    "/metrics",
    "/openapi.json",
    "/nope",
]


@pytest.mark.parametrize("path", GUARDED)
async def test_keys_guard_everything(path: str) -> None:
    app = App(api_key=("right", "also-right"))
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer "},
        {"authorization": "right"},
        {"authorization": "Basic right"},
        {"authorization": "Bearer right2"},
        {"authorization": "Bearer r\xefght"},
    ):
        answer = await app.get(path, headers)
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
        assert answer.error["type"] == "authentication_error"
        assert answer.headers["www-authenticate"] == "Bearer"
        assert "right" not in answer.body.decode()
    for key in ("right", "also-right"):
        assert (await app.get(path, {"authorization": f"bearer {key}"})).status in (200, 404)


async def test_keys_guard_posts_before_their_body_is_read() -> None:
    app = App(api_key=("right",), max_body_bytes=100)
    assert (await app.post("/v1/chat/completions", b"not json")).status == 401
    assert not app.frontend.calls


@pytest.mark.parametrize("path", ["/health", "/ping"])
async def test_watchers_need_no_key(path: str) -> None:
    assert (await App(api_key=("right",)).get(path)).status == 200


async def test_metrics_can_be_opened() -> None:
    app = App(api_key=("right",), metrics_require_api_key=False)
    assert (await app.get("/metrics")).status == 200
    assert (await app.get("/v1/models")).status == 401


@pytest.mark.parametrize("path", ["//health", "/health/", "/v1/models/../../health", "/HEALTH"])
async def test_odd_spellings_of_open_paths_are_guarded(path: str) -> None:
    assert (await App(api_key=("right",)).get(path)).status == 401


async def test_without_keys_any_authorization_is_welcome() -> None:
    answer = await App().get("/v1/models", {"authorization": "Bearer whatever"})
    assert answer.status == 200


async def test_a_prefix_of_paths() -> None:
    app = App(root_path="/llm", api_key=("right",))
    assert (await app.get("/llm/health")).status == 200
    assert (await app.get("/health")).status == 200
    assert (await app.get("/llm/v1/models")).status == 401
    headers = {"authorization": "Bearer right"}
    assert (await app.get("/llm/v1/models", headers)).status == 200
    assert (await app.get("/v1/models", headers)).status == 200


async def test_cors_only_where_allowed() -> None:
    preflight = {
        "origin": "https://a.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    app = App(allowed_origins=("https://a.example",), api_key=("right",))
    answer = await app.request("OPTIONS", "/v1/chat/completions", headers=preflight)
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == "https://a.example"
    refused = await app.get("/v1/models", {"origin": "https://a.example"})
    assert refused.status == 401
    assert refused.headers["access-control-allow-origin"] == "https://a.example"
    other = await app.get("/v1/models", {"origin": "https://b.example"})
    assert "access-control-allow-origin" not in other.headers
    plain = await App().get("/v1/models", {"origin": "https://a.example"})
    assert "access-control-allow-origin" not in plain.headers


async def test_past_the_limit_of_waiting_a_request_is_refused() -> None:
    app = App(FakeFrontend(before=hang, max_num_waiting=2))
    waiting = [asyncio.create_task(app.chat()) for _ in range(2)]
    await until(lambda: len(app.frontend.calls) == 2)
    for answer in (await app.chat(), await app.chat(stream=True), await app.complete()):
        assert (answer.status, answer.error["code"]) == (503, "overloaded")
        assert int(answer.headers["retry-after"]) >= 1
    assert len(app.frontend.calls) == 2
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    app.frontend.before = None
    assert (await app.chat()).status == 200
    assert app.app.state.context.models.default.admission.num_waiting == 0


async def test_requests_that_got_a_token_do_not_wait_any_more() -> None:
    app = App(FakeFrontend(between=hang, max_num_waiting=1))
    running = [asyncio.create_task(app.chat(stream=True)) for _ in range(1)]
    await until(lambda: app.frontend.calls and app.frontend.calls[0].num_tokens == 1)
    running.append(asyncio.create_task(app.chat(stream=True)))
    await until(lambda: len(app.frontend.calls) == 2 and app.frontend.calls[1].num_tokens == 1)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    assert app.frontend.num_open == 0


async def test_more_prompts_than_can_ever_wait_are_the_callers_mistake() -> None:
    app = App(FakeFrontend(max_num_waiting=2))
    answer = await app.complete(prompt=["a"] * 3)
    assert (answer.status, answer.error["param"]) == (400, "prompt")
    assert (await app.complete(prompt=["a"] * 2)).status == 200


async def test_refused_requests_hold_no_place() -> None:
    app = App(FakeFrontend(max_num_waiting=1))
    for _ in range(3):
        assert (await app.chat(n=-1)).status == 400
        assert (await app.post("/v1/chat/completions", {"messages": USER})).status == 200


async def test_samples_count_as_load() -> None:
    app = App(FakeFrontend(before=hang, max_num_waiting=8))
    admission = app.app.state.context.models.default.admission
    for answer in (await app.chat(n=9), await app.complete(prompt=["a", "b"], n=5)):
        assert (answer.status, answer.error["param"]) == (400, "n")
        assert "--max-num-waiting" in answer.error["message"]
    waiting = [
        asyncio.create_task(app.chat(n=3)),
        asyncio.create_task(app.complete(prompt=["a", "b"], n=2)),
    ]
    await until(lambda: len(app.frontend.calls) == 3)
    assert admission.num_waiting == 7
    assert (await app.chat(n=2)).error["code"] == "overloaded"
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert admission.num_waiting == 0


async def test_samples_leave_the_queue_one_by_one() -> None:
    admission = Admission(10)
    with admission.enter(2, num_samples=4) as places:
        assert admission.num_waiting == 8
        places[0].keep(3)
        places[0].keep(3)
        places[1].keep(4)
        assert admission.num_waiting == 7
        places[0].keep(0)
        places[0].leave()
        assert admission.num_waiting == 4
    assert admission.num_waiting == 0
