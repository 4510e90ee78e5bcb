"""States of a model: loading, ready, stopped, failed; what its requests get in each."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sensorium.config import EngineConfig, ServerConfig
from sensorium.errors import ConfigError, OverloadedError
from sensorium.server.models import served as served_module
from sensorium.server.models.served import ServedModel
from tests.fakes import ManualClock
from tests.server.fake_frontend import FakeFrontend, hang
from tests.server.harness import USER, App, app_of_models, running, served, until

CHAT = "/v1/chat/completions"


class Starts:
    """Starts of one model's engine, each waiting for ``gate`` where there is one."""

    def __init__(self, *outcomes: FakeFrontend | Exception, gate: asyncio.Event | None = None):
        self.outcomes = list(outcomes)
        self.configs: list[EngineConfig] = []
        self.gate = gate

    async def __call__(self, engine: EngineConfig) -> Any:
        self.configs.append(engine)
        if self.gate is not None:
            await self.gate.wait()
        outcome = self.outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


class Server(App):
    """An application whose models are given."""

    def __init__(self, *models: ServedModel, **options: Any) -> None:
        self.app = app_of_models(models, ServerConfig(disable_access_log=True), **options)
        self.models = self.app.state.context.models


def lazy(
    name: str, *outcomes: FakeFrontend | Exception, **options: Any
) -> tuple[ServedModel, Starts]:
    """A model that is started on demand."""
    starts = Starts(*outcomes, gate=options.pop("gate", None))
    clock = options.pop("clock", ManualClock())
    waiting = options.pop("max_num_waiting", 64)
    config = ServerConfig(**{"on_demand": True, **options})
    model = served(
        FakeFrontend(model_name=name, max_num_waiting=waiting), config, starts, clock=clock
    )
    return model, starts


async def test_the_first_request_starts_the_engine_and_all_that_come_meanwhile_wait() -> None:
    gate = asyncio.Event()
    model, starts = lazy("a", FakeFrontend(model_name="a"), gate=gate)
    server = Server(model)
    assert model.state == "stopped"
    assert (await server.get("/health")).status == 200
    asked = [asyncio.create_task(server.chat(model="a")) for _ in range(3)]
    await until(lambda: starts.configs)
    assert model.state == "loading"
    gate.set()
    assert [answer.status for answer in await asyncio.gather(*asked)] == [200] * 3
    assert (model.state, len(starts.configs)) == ("ready", 1)


async def test_more_requests_than_may_wait_are_refused_while_a_model_loads() -> None:
    gate = asyncio.Event()
    model, starts = lazy("a", FakeFrontend(model_name="a"), gate=gate, max_num_waiting=2)
    server = Server(model)
    asked = [asyncio.create_task(server.chat()) for _ in range(2)]
    await until(lambda: starts.configs)
    refused = await server.chat()
    assert (refused.status, refused.error["code"]) == (503, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    gate.set()
    assert [answer.status for answer in await asyncio.gather(*asked)] == [200, 200]


async def test_a_model_that_cannot_be_loaded_says_why_and_is_tried_again_later() -> None:
    clock = ManualClock()
    broken = ConfigError("There is no such folder.")
    model, starts = lazy("a", broken, broken, FakeFrontend(model_name="a"), clock=clock)
    server = Server(model)
    for _ in range(2):
        answer = await server.chat()
        assert (answer.status, answer.error["code"]) == (503, "engine_unavailable")
        assert int(answer.headers["retry-after"]) == served_module.FIRST_RETRY
    assert len(starts.configs) == 1, "not tried before its time"
    [card] = (await server.get("/v1/models")).json()["data"]
    assert (card["state"], card["reason"]) == ("failed", "There is no such folder.")
    assert (await server.get("/health")).status == 503
    clock.advance(served_module.FIRST_RETRY)
    assert (await server.get("/health")).status == 200, "a request would be tried"
    answer = await server.chat()
    assert int(answer.headers["retry-after"]) == 2 * served_module.FIRST_RETRY
    clock.advance(2 * served_module.FIRST_RETRY)
    assert (await server.chat()).status == 200
    [card] = (await server.get("/v1/models")).json()["data"]
    assert (card["state"], card["reason"]) == ("ready", None)


async def test_the_place_of_a_model_stays_on_the_server(caplog: pytest.LogCaptureFixture) -> None:
    broken = ConfigError("Model '/srv/secret/x': there is no such folder.")
    model, _ = lazy("/srv/secret/x", broken, served_model_name=("public",))
    server = Server(model)
    assert (await server.chat(model="public")).status == 503
    listed = (await server.get("/v1/models")).body
    assert b"Model 'public': there is no such folder." in listed
    assert b"secret" not in listed
    assert "failed to load the model 'public': Model '/srv/secret/x'" in caplog.text


async def test_an_error_of_ours_while_loading_tells_clients_nothing() -> None:
    model, _ = lazy("a", RuntimeError("secret"))
    server = Server(model)
    answer = await server.chat()
    assert answer.status == 503
    listed = (await server.get("/v1/models")).body
    assert b"secret" not in answer.body + listed
    assert b"RuntimeError" not in listed


async def test_no_room_after_a_failure_is_no_failure() -> None:
    clock = ManualClock()
    model, _ = lazy("a", ConfigError("It is broken."), OverloadedError("No room."), clock=clock)
    server = Server(model)
    assert (await server.chat()).error["code"] == "engine_unavailable"
    clock.advance(served_module.FIRST_RETRY)
    assert (await server.chat()).error["code"] == "overloaded"


async def test_a_client_that_leaves_does_not_end_the_load() -> None:
    gate = asyncio.Event()
    model, starts = lazy("a", FakeFrontend(model_name="a"), gate=gate)
    server = Server(model)
    asked = asyncio.create_task(server.chat())
    await until(lambda: starts.configs)
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    gate.set()
    assert (await server.chat()).status == 200
    assert len(starts.configs) == 1
    assert model.is_idle


async def test_an_idle_model_is_ended_and_the_next_request_starts_it_again() -> None:
    clock = ManualClock()
    first, second = FakeFrontend(model_name="a"), FakeFrontend(model_name="a")
    model, starts = lazy("a", first, second, clock=clock, model_idle_timeout=30.0)
    server = Server(model, clock=clock)
    await server.chat()
    clock.advance(29.0)
    assert await server.models.end_idle() == 1.0
    assert model.state == "ready"
    clock.advance(1.0)
    assert await server.models.end_idle() == 30.0
    assert (model.state, first.closing) == ("stopped", True)
    assert b'engine_up{engine="0",model_name="a"} 0.0' in (await server.get("/metrics")).body
    assert (await server.chat()).status == 200
    assert (len(starts.configs), len(second.calls)) == (2, 1)


async def test_a_model_is_not_idle_before_the_last_byte_of_its_answers() -> None:
    clock = ManualClock()
    go_on = asyncio.Event()
    frontend = FakeFrontend(model_name="a", between=lambda call: go_on.wait())
    model, _ = lazy("a", frontend, clock=clock, model_idle_timeout=30.0)
    server = Server(model, clock=clock)
    answer = asyncio.create_task(server.chat(stream=True))
    await until(lambda: frontend.calls and frontend.calls[0].num_tokens)
    clock.advance(1000.0)
    await server.models.end_idle()
    assert model.state == "ready"
    go_on.set()
    assert (await answer).events()
    assert await server.models.end_idle() == 30.0


async def test_a_response_in_the_background_holds_its_model() -> None:
    clock = ManualClock()
    frontend = FakeFrontend(model_name="a", before=hang)
    model, _ = lazy("a", frontend, clock=clock, model_idle_timeout=30.0)
    server = Server(model, clock=clock)
    body = {"input": "Hi", "background": True}
    queued = (await server.post("/v1/responses", body)).json()
    await until(lambda: frontend.num_open)
    clock.advance(1000.0)
    await server.models.end_idle()
    assert model.state == "ready"
    await server.post(f"/v1/responses/{queued['id']}/cancel", {})
    assert model.is_idle


async def test_requests_that_wait_for_a_model_are_answered_when_the_server_stops() -> None:
    gate = asyncio.Event()
    model, starts = lazy("a", FakeFrontend(model_name="a"), gate=gate)
    async with running(app=app_of_models([model], ServerConfig()), shutdown_timeout=3600) as server:
        reader, writer = await server.send(CHAT, {"messages": USER})
        await until(lambda: starts.configs)
        server.signals.on_signal()
        status = int((await asyncio.wait_for(reader.readline(), 60)).split()[1])
        assert status == 503
        await asyncio.wait_for(server.task, 60)
        writer.close()
    assert model.state == "stopped"


@pytest.mark.parametrize("parser", ["tool_call_parser", "reasoning_parser"])
async def test_an_engine_whose_parser_is_unknown_is_ended_again(parser: str) -> None:
    frontend = FakeFrontend(model_name="a")
    model, _ = lazy("a", frontend, **{parser: "unknown"})
    Server(model)
    with pytest.raises(ConfigError, match="unknown"):
        await model.start()
    assert (model.state, frontend.closing) == ("failed", True)
