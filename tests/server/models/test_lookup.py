"""Several models in one application: names, routes, states, and the memory that they share."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sensorium.config import (
    GIB,
    EngineConfig,
    ServedConfig,
    ServerConfig,
    check_models,
    engine_config,
)
from sensorium.errors import ConfigError
from sensorium.models.embedder import Embedder
from sensorium.server.models.facts import ModelFacts
from sensorium.server.models.memory import FRONT_BYTES, SharedMemory
from tests.fakes import ManualClock
from tests.server.fake_frontend import FakeFrontend, hang
from tests.server.harness import App, app_of_models, served, until
from tests.server.models.test_served import Server, lazy


def embedding(name: str) -> FakeFrontend:
    return FakeFrontend(model_name=name, modalities=(), embedder=Embedder("last", None))


class Several(App):
    """A model that writes, with two names, one that embeds, and one that hears."""

    def __init__(self) -> None:
        self.writer = FakeFrontend(model_name="writer")
        self.embedder = embedding("embedder")
        self.hearer = FakeFrontend(model_name="hearer", modalities=("audio",))
        config = ServerConfig(disable_access_log=True)
        models = [
            served(self.writer, ServerConfig(served_model_name=("writer", "alias"))),
            served(self.embedder, config),
            served(self.hearer, config),
        ]
        frontends = [self.writer, self.embedder, self.hearer]
        self.app = app_of_models(models, config, frontends)
        self.models = self.app.state.context.models


REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/responses/input_tokens": {"input": "Hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/embeddings": {"input": "Hi"},
    "/v1/score": {"text_1": "a", "text_2": "b"},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1]},
}


@pytest.mark.parametrize("path", REQUESTS)
async def test_each_route_finds_its_model_by_name(path: str) -> None:
    app = Several()
    embeds = path in ("/v1/embeddings", "/v1/score", "/v1/rerank")
    own, other = ("embedder", "writer") if embeds else ("alias", "embedder")
    answer = await app.post(path, {**REQUESTS[path], "model": own})
    assert answer.status == 200, answer.body
    if "model" in answer.json():
        assert answer.json()["model"] == own
    if path not in ("/tokenize", "/detokenize"):
        assert (await app.post(path, {**REQUESTS[path], "model": other})).status == 400
    unknown = await app.post(path, {**REQUESTS[path], "model": "nobody"})
    error = unknown.json()["error"]
    assert (unknown.status, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "'writer', 'alias', 'embedder', 'hearer'" in error["message"]
    assert all(model.is_idle for model in app.models)


async def test_a_request_without_a_model_goes_to_the_first() -> None:
    app = Several()
    assert (await app.chat()).json()["model"] == "writer"
    assert len(app.writer.calls) == 1


async def test_sounds_go_to_the_model_of_their_form() -> None:
    app = Several()
    for model, status in (("hearer", 200), ("writer", 400), ("nobody", 404)):
        parts = [
            f'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n{model}\r\n',
            '--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nRIFF\r\n',
            "--b--\r\n",
        ]
        headers = {"content-type": "multipart/form-data; boundary=b"}
        path = "/v1/audio/transcriptions"
        answer = await app.request("POST", path, ["".join(parts).encode()], headers)
        assert answer.status == status, answer.body
    assert len(app.hearer.calls) == 1


async def test_the_list_has_each_name_with_its_state() -> None:
    app = Several()
    app.embedder.alive = False
    cards = {card["id"]: card for card in (await app.get("/v1/models")).json()["data"]}
    assert {name: card["root"] for name, card in cards.items()} == {
        "writer": "writer",
        "alias": "writer",
        "embedder": "embedder",
        "hearer": "hearer",
    }
    assert cards["alias"]["state"] == "ready"
    assert cards["embedder"]["state"] == "loading"
    assert cards["hearer"]["modalities"] == ["text", "audio"]
    assert (await app.get("/v1/models/alias")).json() == cards["alias"]
    assert (await app.get("/v1/models/nobody")).status == 404


async def test_one_dead_engine_does_not_touch_the_other_models() -> None:
    app = Several()
    app.writer.alive = False
    assert (await app.get("/health")).status == 200
    assert (await app.post("/v1/embeddings", {"input": "a", "model": "embedder"})).status == 200
    app.embedder.alive = app.hearer.alive = False
    answer = await app.get("/health")
    assert (answer.status, answer.headers["retry-after"]) == (503, "7")


async def test_metrics_have_the_name_of_each_model() -> None:
    app = Several()
    await app.chat(model="alias")
    await app.post("/v1/embeddings", {"input": "a", "model": "embedder"})
    await app.get("/health")
    text = (await app.get("/metrics")).body.decode()
    lines = text.splitlines()
    for name in ("writer", "embedder", "hearer"):
        assert f'sensorium:engine_up{{engine="0",model_name="{name}"}} 1.0' in lines
    assert len([line for line in lines if line == "# TYPE sensorium:engine_up gauge"]) == 1
    requests = [line for line in lines if line.startswith("http_requests_total")]
    assert [('model_name="writer"' in line, 'model_name=""' in line) for line in requests] == [
        (True, False),
        (False, False),
        (False, True),
    ], requests


async def test_the_page_gets_the_facts_of_the_chosen_model() -> None:
    app = Several()
    found = (await app.get("/playground/facts?model=embedder")).json()
    assert (found["model"], found["runner"], found["modalities"]) == (
        "embedder",
        "pooling",
        ["text"],
    )
    assert found["models"] == [
        {"name": name, "state": "ready", "reason": None}
        for name in ("writer", "embedder", "hearer")
    ]
    assert (await app.get("/playground/facts")).json()["model"] == "writer"
    assert (await app.get("/playground/facts?model=nobody")).status == 404


async def test_a_batch_line_names_its_model() -> None:
    app = Several()
    context = app.app.state.context
    new = context.files.create("")
    line = '{"custom_id":"%d","method":"POST","url":"/v1/chat/completions","body":{"model":"%s","messages":[{"role":"user","content":"Hi"}]}}\n'
    await new.write((line % (1, "alias") + line % (2, "nobody")).encode())
    stored = await new.finish("in.jsonl", "batch", None)
    batch = context.batches.create(
        "",
        endpoint="/v1/chat/completions",
        input_file_id=stored.id,
        completion_window="1h",
        seconds=3600,
    )
    await until(lambda: batch.has_ended)
    assert (batch.num_completed, batch.num_failed, len(app.writer.calls)) == (1, 1, 1)
    await context.batches.close()
    context.files.close()


def test_two_models_of_one_name_are_refused() -> None:
    def config(model: str, *names: str) -> ServedConfig:
        return ServedConfig(
            engine=engine_config(model=model), server=ServerConfig(served_model_name=names)
        )

    check_models([config("a", "x", "x"), config("a", "y")])
    with pytest.raises(ConfigError, match="Two models have the name 'x': 'a' and 'b'"):
        check_models([config("a", "x"), config("b", "y", "x")])


def test_the_memory_of_encoders_in_several_processes_is_not_estimated() -> None:
    def config(model: str, **options: Any) -> ServedConfig:
        return ServedConfig(engine=engine_config(model=model, **options), server=ServerConfig())

    options = {"tensor_parallel_size": 2, "encoder_ranks": "all"}
    check_models([config("a", tensor_parallel_size=2), config("b")])
    check_models([config("a", **options)])
    check_models([config("a", **options, max_memory_gb=4.0), config("b")])
    with pytest.raises(ConfigError, match=r"'a' is all.* give it a max_memory_gb") as caught:
        check_models([config("a", **options), config("b")])
    assert caught.value.param == "encoder_ranks"


# ---- starting


async def test_a_model_that_fails_does_not_keep_the_others_from_starting() -> None:
    broken, _ = lazy("broken", ConfigError("It is broken."), on_demand=False)
    good, _ = lazy("good", FakeFrontend(model_name="good"), on_demand=False)
    other, starts = lazy("other", FakeFrontend(model_name="other"), on_demand=False)
    later, later_starts = lazy("later", FakeFrontend(model_name="later"))
    server = Server(broken, good, other, later)
    await server.models.start()
    assert (broken.state, good.state) == ("failed", "ready")
    await until(lambda: other.state == "ready")
    assert (len(starts.configs), later_starts.configs, later.state) == (1, [], "stopped")
    assert (await server.chat(model="broken")).status == 503
    assert (await server.chat(model="later")).status == 200
    await server.models.close()


async def test_a_server_none_of_whose_models_can_be_loaded_does_not_start() -> None:
    one, _ = lazy("one", ConfigError("First."), on_demand=False)
    two, _ = lazy("two", ConfigError("Second."), on_demand=False)
    with pytest.raises(ConfigError, match=r"Second|First"):
        await Server(one, two).models.start()


async def test_facts_that_cannot_be_read_do_not_keep_others_from_being_read() -> None:
    def read(config: EngineConfig) -> ModelFacts:
        if config.model.model == "odd":
            raise RuntimeError
        return ModelFacts("generate", (), {})

    odd, _ = lazy("odd")
    plain, _ = lazy("plain")
    server = Server(odd, plain, read_facts=read)
    await server.models.start()
    await until(lambda: plain.facts is not None)
    assert odd.facts is None
    await server.models.close()


# ---- memory


def sharing(total: float, *sizes: float) -> tuple[Server, list[FakeFrontend], ManualClock]:
    """A server whose models need so many GiB each, of so many in all; all on demand."""
    clock = ManualClock()
    names = [chr(ord("a") + i) for i in range(len(sizes))]
    frontends = [FakeFrontend(model_name=name) for name in names]
    models = [
        lazy(name, frontend, frontend, frontend, clock=clock)[0]
        for name, frontend in zip(names, frontends, strict=True)
    ]
    needs = dict(zip(names, sizes, strict=True))
    memory = SharedMemory(
        int(total * GIB),
        len(models),
        lambda config: int(needs[config.model.model] * GIB) - FRONT_BYTES,
    )
    return Server(*models, memory=memory, clock=clock), frontends, clock


def states(server: Server) -> str:
    return " ".join(model.state for model in server.models)


async def test_the_least_recently_used_idle_model_makes_room() -> None:
    server, frontends, clock = sharing(10, 4, 4, 4)
    for name in "ab":
        clock.advance(1.0)
        assert (await server.chat(model=name)).status == 200
    clock.advance(1.0)
    assert (await server.chat(model="a")).status == 200
    assert states(server) == "ready ready stopped"
    assert (await server.chat(model="c")).status == 200
    assert states(server) == "ready stopped ready"
    assert (frontends[1].closing, frontends[0].closing) == (True, False)


async def test_only_as_many_models_are_ended_as_must_be() -> None:
    server, _, clock = sharing(12, 4, 4, 8, 3)
    for name in "abd":
        clock.advance(1.0)
        await server.chat(model=name)
    assert states(server) == "ready ready stopped ready"
    assert (await server.chat(model="c")).status == 200
    assert states(server) == "stopped stopped ready ready"


async def test_models_in_use_are_never_ended() -> None:
    server, frontends, _ = sharing(7, 4, 4)
    frontends[0].before = hang
    running = asyncio.create_task(server.chat(model="a"))
    await until(lambda: frontends[0].calls)
    answer = await server.chat(model="b")
    assert (answer.status, answer.error["code"]) == (503, "overloaded")
    assert int(answer.headers["retry-after"]) >= 1
    assert states(server) == "ready stopped"
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert (await server.chat(model="b")).status == 200
    assert states(server) == "stopped ready"


async def test_the_memory_of_a_model_that_is_being_ended_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, frontends, _ = sharing(7, 4, 4)
    assert (await server.chat(model="a")).status == 200
    gate = asyncio.Event()
    monkeypatch.setattr(frontends[0], "shutdown", gate.wait)
    [model, _] = server.models
    ending = asyncio.create_task(model.end())
    asked = asyncio.create_task(server.chat(model="b"))
    await until(lambda: states(server) == "stopped loading")
    gate.set()
    assert (await asked).status == 200
    await ending


async def test_a_model_larger_than_all_memory_fails_and_says_so() -> None:
    server, _, _ = sharing(6, 4, 8)
    assert (await server.chat(model="a")).status == 200
    assert (await server.chat(model="b")).status == 503
    assert states(server) == "ready failed"
    [_, card] = (await server.get("/v1/models")).json()["data"]
    assert "8.0 GiB" in card["reason"]
    assert "6.0 GiB" in card["reason"]


async def test_each_engine_is_told_its_part() -> None:
    clock = ManualClock()
    parts = []
    models = []
    for name, most in (("a", None), ("b", 3.0), ("c", None)):
        model, starts = lazy(name, FakeFrontend(model_name=name), clock=clock)
        if most is not None:
            model.engine_config = engine_config(model=name, max_memory_gb=most)
        models.append(model)
        parts.append(starts)
    server = Server(*models, memory=SharedMemory(12 * GIB, 3, lambda config: GIB), clock=clock)
    for name in "abc":
        await server.chat(model=name)
    front = FRONT_BYTES / GIB
    limits = [starts.configs[0].cache.max_memory_gb for starts in parts]
    assert limits == [pytest.approx(4.0 - front), 3.0, pytest.approx(4.0 - front)]
    assert sum(model.held_bytes for model in models) <= 12 * GIB
