"""One server with three models: they stay apart under load, end and come back, and die alone."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import pytest
import yaml

from sensorium import LLM, SamplingParams
from tests import checkpoints
from tests.e2e.serving import Server

pytestmark = pytest.mark.slow

LIMITS = {"num-kv-blocks": 200, "block-size": 16, "max-model-len": 256}
PROMPTS = [f"Tell me about number {i}." for i in range(6)]
NUM_TOKENS = 12
IDLE_SECONDS = 0.5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three models."""
    made = tmp_path_factory.mktemp("models")
    checkpoints.make_text("qwen2", made / "writer")
    checkpoints.make_embedder("qwen3", made / "embedder")
    checkpoints.make_text("llama", made / "guest")
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    """A server of all three; one of them is started on demand, and ended soon."""
    models: list[dict[str, Any]] = [
        {"model": str(folder / "writer"), "served-model-name": ["writer", "alias"]},
        {"model": str(folder / "embedder"), "served-model-name": "embedder"},
        {
            "model": str(folder / "guest"),
            "served-model-name": "guest",
            "on-demand": True,
            "model-idle-timeout": IDLE_SECONDS,
        },
    ]
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump({**LIMITS, "models": models}))
    server = Server(None, folder / "server.log", ("--config", str(path)))
    yield server
    assert server.stop() == 0


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Client]:
    timeout = aiohttp.ClientTimeout(120)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        yield Client(session, server.url)


class Client:
    """Requests to one server."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def complete(self, model: str, prompt: str) -> tuple[int, Any]:
        """Status and body of a completion."""
        return await self._post(
            "/v1/completions",
            {"model": model, "prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0}
            | {"ignore_eos": True, "return_token_ids": True},
        )

    async def tokens(self, model: str, prompt: str) -> list[int]:
        """Return the tokens of a completion."""
        status, answer = await self.complete(model, prompt)
        assert status == 200, answer
        return list(answer["choices"][0]["token_ids"])

    async def embedding(self, prompt: str) -> list[float]:
        """Return the embedding of a text."""
        status, answer = await self._post("/v1/embeddings", {"model": "embedder", "input": prompt})
        assert status == 200, answer
        return list(answer["data"][0]["embedding"])

    async def states(self) -> dict[str, str]:
        """Return the state of each model."""
        async with self._session.get(f"{self._url}/v1/models") as answer:
            return {card["id"]: card["state"] for card in (await answer.json())["data"]}

    async def until_state(self, model: str, state: str) -> None:
        """Wait until a model is in a state."""
        async with asyncio.timeout(300):
            while (await self.states())[model] != state:
                await asyncio.sleep(0.05)

    async def _post(self, path: str, body: Any) -> tuple[int, Any]:
        async with self._session.post(self._url + path, json=body) as answer:
            return answer.status, await answer.json()


def offline(folder: Path, name: str, **options: Any) -> LLM:
    limits = {key.replace("-", "_"): value for key, value in LIMITS.items()}
    return LLM(str(folder / name), **limits, **options)


def expected_tokens(folder: Path, name: str) -> list[list[int]]:
    """Return the tokens that a model writes alone."""
    with offline(folder, name) as llm:
        params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
        return [list(out.outputs[0].token_ids) for out in llm.generate(PROMPTS, params)]


async def test_models_stay_apart_under_load(client: Client, folder: Path) -> None:
    names = ("writer", "guest", "alias")
    asked = [client.tokens(name, prompt) for prompt in PROMPTS for name in names]
    vectors = [client.embedding(prompt) for prompt in PROMPTS]
    found = await asyncio.gather(*asked, *vectors)
    by_name = {name: list(found[i : len(asked) : 3]) for i, name in enumerate(names)}
    expected = expected_tokens(folder, "writer")
    assert (by_name["writer"], by_name["alias"]) == (expected, expected)
    assert not any(map(np.array_equal, by_name["guest"], expected))
    with offline(folder, "embedder") as llm:
        wanted = [output.outputs.embedding for output in llm.embed(PROMPTS)]
    np.testing.assert_array_equal(np.float32(found[len(asked) :]), np.float32(wanted))


async def test_an_idle_model_is_ended_and_comes_back(client: Client, server: Server) -> None:
    first = await client.tokens("guest", PROMPTS[0])
    await client.until_state("guest", "stopped")
    assert len(server.engines()) == 2
    assert await client.tokens("guest", PROMPTS[0]) == first
    assert (await client.states())["embedder"] == "ready"


async def test_an_engine_that_is_killed_is_missed_by_its_own_model_alone(
    client: Client, server: Server
) -> None:
    first = await client.tokens("writer", PROMPTS[0])
    await client.until_state("embedder", "ready")
    await client.until_state("guest", "stopped")
    [engine, _] = sorted(server.engines(), key=psutil.Process.create_time)
    engine.send_signal(signal.SIGKILL)
    await client.until_state("writer", "loading")
    status, answer = await client.complete("writer", PROMPTS[0])
    assert (status, answer["error"]["code"]) == (503, "engine_unavailable")
    assert await client.embedding(PROMPTS[0])
    assert (await client.states())["embedder"] == "ready"
    await client.until_state("writer", "ready")
    assert await client.tokens("alias", PROMPTS[0]) == first
    assert "was ended by SIGKILL" in server.log.read_text()
