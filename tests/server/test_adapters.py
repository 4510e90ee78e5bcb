"""LoRA adapters over HTTP: chosen by the model of a request, loaded and unloaded by those who
may.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from sensorium.config import EngineConfig, ServedConfig, ServerConfig, engine_config
from sensorium.engine.stats import AdapterFacts
from sensorium.errors import ConfigError
from sensorium.models.embedder import Embedder
from sensorium.server.adapters.checks import check_adapters
from tests.server.fake_frontend import FakeFrontend
from tests.server.harness import USER, App, app_of_models, until
from tests.server.harness import served as served_by

KEY = {"Authorization": "Bearer right"}
GENERATING = [
    ("/v1/chat/completions", {"messages": USER}),
    ("/v1/completions", {"prompt": ["Hi", "Ho"]}),
    ("/v1/responses", {"input": "Hi"}),
    ("/v1/messages", {"messages": USER, "max_tokens": 4}),
]
EMBEDDING: list[tuple[str, dict[str, Any]]] = [
    ("/v1/embeddings", {"input": ["Hi", "Ho"]}),
    ("/v1/embeddings", {"messages": USER}),
    ("/v1/score", {"text_1": "Hi", "text_2": ["Ho", "Ha"]}),
    ("/v1/rerank", {"query": "Hi", "documents": ["Ho", {"text": "Ha"}]}),
]


def frontend_with(*names: str, **options: Any) -> FakeFrontend:
    frontend = FakeFrontend(**options)
    frontend.adapters.set([AdapterFacts(name, f"/at/{name}", name.encode(), 8) for name in names])
    return frontend


@pytest.mark.parametrize(("path", "body"), [*GENERATING, *EMBEDDING])
async def test_the_model_of_a_request_chooses(path: str, body: dict[str, Any]) -> None:
    embedder = Embedder(8) if (path, body) in EMBEDDING else None
    frontend = frontend_with("brief", "formal", embedder=embedder)
    app = App(frontend)
    for model, adapter in (("brief", "brief"), ("demo", ""), (None, ""), ("formal", "formal")):
        frontend.calls.clear()
        given = body if model is None else {**body, "model": model}
        answer = await app.post(path, given)
        assert answer.status == 200, answer.body
        assert answer.json()["model"] == (model or "demo")
        assert {call.prompt.media.adapter for call in frontend.calls} == {adapter}
    error = (await app.post(path, {**body, "model": "other"})).json()["error"]
    assert "this server serves 'demo', 'brief', 'formal'" in error["message"]


async def test_models_lists_them_with_their_parent() -> None:
    app = App(frontend_with("brief"), served_model_name=("base", "second"))
    cards = (await app.get("/v1/models")).json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [
        ("base", None),
        ("second", None),
        ("brief", "base"),
    ]
    assert (await app.get("/v1/models/brief")).json() == cards[2]
    answer = await app.post("/tokenize", {"prompt": "Hi", "model": "brief"})
    assert answer.status == 200


async def test_loading_must_be_allowed() -> None:
    app = App(api_key=("right",))
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        body = {"lora_name": "a", **({"lora_path": "/tmp"} if "un" not in path else {})}
        answer = await app.post(path, body, KEY)
        assert (answer.status, answer.error["code"]) == (404, "not_found")
        assert "--allow-runtime-lora-updating" in answer.error["message"]
        assert (await app.post(path, body)).status == 401


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"allowed_lora_path": ("/tmp",)}, "needs an API key: --api-key"),
        ({"api_key": ("a",)}, "needs folders: --allowed-lora-path"),
    ],
)
def test_options_that_loading_needs(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ServerConfig(allow_runtime_lora_updating=True, **options)


def served(engine: EngineConfig, server: ServerConfig) -> ServedConfig:
    return ServedConfig(engine=engine, server=server)


def test_options_that_go_together() -> None:
    allowed = ServerConfig(
        allow_runtime_lora_updating=True, api_key=("a",), allowed_lora_path=("/tmp",)
    )
    with pytest.raises(ConfigError, match="needs --enable-lora"):
        check_adapters([served(engine_config(), allowed)], allowed)
    check_adapters([served(engine_config(enable_lora=True), allowed)], allowed)
    named = engine_config(enable_lora=True, lora_modules=["demo=folder"])
    plain, other = ServerConfig(), ServerConfig(served_model_name=("other",))
    with pytest.raises(ConfigError, match="'demo', which another model or adapter has"):
        check_adapters([served(named, plain)], plain)
    check_adapters([served(named, other)], plain)
    with pytest.raises(ConfigError, match="'demo', which another"):
        check_adapters([served(named, other), served(named, other)], plain)


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        (["a=b"], "needs --enable-lora"),
        (["a"], "needs NAME=PATH"),
        (["a="], "needs NAME=PATH"),
        (["=b"], "needs a name of 1 to 256"),
        (["a\n=b"], "control characters"),
        (["a=b", "a=c"], "'a' twice"),
        (['{"name": "a"}'], 'needs {"name"'),
        (['{"name": "a", "path": 1}'], "needs a path"),
        ([f"{n}=x" for n in range(9)], "names 9 adapters, but max_loras is 8"),
        ("a=b", "must be a list"),
    ],
)
def test_modules_that_cannot_be_read(modules: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        engine_config(enable_lora="needs --enable" not in words, lora_modules=modules)
    assert words in caught.value.message


def test_forms_of_modules() -> None:
    texts = ["a=x=y", '{"name": "b", "path": "z", "base_model_name": "c"}']
    dicts = [{"name": "a", "path": "x=y"}, {"name": "b", "path": "z"}]
    for given in (texts, dicts, {"a": "x=y", "b": "z"}):
        found = engine_config(enable_lora=True, lora_modules=given).lora.modules()
        assert found == [("a", "x=y"), ("b", "z")]


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Adapters below one folder, and links that lead out of it."""
    for name in ("allowed/brief", "allowed/damaged", "allowed/linked", "secret/other"):
        (tmp_path / name).mkdir(parents=True)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            (tmp_path / name / file).touch()
    (tmp_path / "allowed" / "link").symlink_to(tmp_path / "secret" / "other")
    config = tmp_path / "allowed" / "linked" / "adapter_config.json"
    config.unlink()
    config.symlink_to(tmp_path / "secret" / "other" / "adapter_config.json")
    return tmp_path


def loading(folders: Path) -> App:
    return App(
        frontend_with(),
        api_key=("right",),
        allow_runtime_lora_updating=True,
        allowed_lora_path=(str(folders / "allowed"),),
    )


async def test_adapters_come_and_go(folders: Path) -> None:
    app = loading(folders)
    body = {"lora_name": "brief", "lora_path": str(folders / "allowed" / "brief")}
    answer = await app.post("/v1/load_lora_adapter", body, KEY)
    assert (answer.status, answer.body) == (
        200,
        b"Success: LoRA adapter 'brief' added successfully.",
    )
    answer = await app.post("/v1/chat/completions", {"model": "brief", "messages": USER}, KEY)
    assert answer.json()["model"] == "brief"
    answer = await app.post("/v1/load_lora_adapter", body, KEY)
    assert (answer.status, answer.error["param"]) == (400, "lora_name")
    answer = await app.post("/v1/unload_lora_adapter", {"lora_name": "brief"}, KEY)
    assert answer.body == b"Success: LoRA adapter 'brief' removed successfully."
    answer = await app.post("/v1/unload_lora_adapter", {"lora_name": "brief"}, KEY)
    assert (answer.status, answer.error["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("name", "path", "param", "words"),
    [
        ("a", "secret/other", "lora_path", "not below"),
        ("a", "allowed/../secret/other", "lora_path", "not below"),
        ("a", "allowed/link", "lora_path", "not below"),
        ("a", "allowed/linked", "lora_path", "not below"),
        ("a", "/no/such", "lora_path", "not below"),
        ("a", "a\0b", "lora_path", "not below"),
        ("a", "allowed/none", "lora_path", "no folder"),
        ("a", "allowed/damaged", "lora_path", "not finite"),
        ("demo", "allowed/brief", "lora_name", "is taken"),
        ("a\tb", "allowed/brief", "lora_name", "control characters"),
        ("", "allowed/brief", "lora_name", "at least 1"),
    ],
)
async def test_loading_that_is_refused(
    folders: Path, name: str, path: str, param: str, words: str
) -> None:
    body = {"lora_name": name, "lora_path": str(folders / path)}
    answer = await loading(folders).post("/v1/load_lora_adapter", body, KEY)
    assert (answer.status, answer.error["param"]) == (400, param)
    assert words in answer.error["message"]
    assert "secret/other" not in answer.error["message"]


class TwoModels(App):
    """Models ``a`` and ``b``, whose adapters come and go."""

    def __init__(self, folders: Path, *static: str) -> None:
        config = ServerConfig(
            disable_access_log=True,
            api_key=("right",),
            allow_runtime_lora_updating=True,
            allowed_lora_path=(str(folders / "allowed"),),
        )
        self.frontends = [frontend_with(*static, model_name="a"), frontend_with(model_name="b")]
        models = [served_by(frontend, config) for frontend in self.frontends]
        models[0].engine_config = engine_config(
            model="a", enable_lora=True, lora_modules=[f"{name}=/at/{name}" for name in static]
        )
        self.app = app_of_models(models, config, self.frontends)
        self.models = self.app.state.context.models


async def test_one_name_is_loaded_into_one_model_only(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = TwoModels(folders)
    first, gate = app.frontends[0], asyncio.Event()
    load, num_calls = first.load_adapter, 0

    async def slowly(name: str, path: str) -> None:
        nonlocal num_calls
        num_calls += 1
        await gate.wait()
        await load(name, path)

    monkeypatch.setattr(first, "load_adapter", slowly)
    body = {"lora_name": "x", "lora_path": str(folders / "allowed" / "brief")}
    path = "/v1/load_lora_adapter"
    loading = asyncio.create_task(app.post(path, {**body, "model": "a"}, KEY))
    await until(lambda: num_calls)
    answer = await app.post(path, {**body, "model": "b"}, KEY)
    assert (answer.status, answer.error["param"]) == (400, "lora_name")
    gate.set()
    assert (await loading).status == 200
    assert (await app.post(path, {**body, "model": "b"}, KEY)).status == 400


async def test_an_adapter_of_the_start_that_was_unloaded_stays_away(folders: Path) -> None:
    app = TwoModels(folders, "x", "y")
    [model, _] = app.models
    answer = await app.post("/v1/unload_lora_adapter", {"lora_name": "x"}, KEY)
    assert answer.status == 200, answer.body
    await model.end()
    assert model.adapters == ("y",)
    assert model.engine_config.lora.modules() == [("y", "/at/y")]
    body = {"lora_name": "x", "lora_path": str(folders / "allowed" / "brief"), "model": "b"}
    assert (await app.post("/v1/load_lora_adapter", body, KEY)).status == 200
