"""A server whose engine is killed, again and again, while clients use it.

And an engine whose server is killed.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import pytest
from PIL import Image

from tests import checkpoints
from tests.e2e.serving import Server

pytestmark = pytest.mark.slow

FLAGS = ("--num-kv-blocks", "2000", "--block-size", "16", "--max-model-len", "2048")
NUM_CLIENTS = 8
MANY_TOKENS = 1800
"""More than an engine makes before it is killed."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen2_vl")
    checkpoints.make_qwen2_vl(folder)
    return folder


@pytest.fixture
def server(model: Path, tmp_path: Path) -> Iterator[Server]:
    server = Server(str(model), tmp_path / "server.log", FLAGS)
    yield server
    server.process.kill()
    server.stop()


def folders_of(process: psutil.Process) -> set[Path]:
    """The folders that a process was told of when it was started, or that hold its socket."""
    paths = {
        Path(word.removeprefix("ipc://")) for word in process.cmdline() if "sensorium-" in word
    }
    return {path if path.name.startswith("sensorium-") else path.parent for path in paths}


def body(seed: int, **fields: Any) -> dict[str, Any]:
    """A question about a picture of its own."""
    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(0, 256, (45, 60, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": f"What is shown in picture {seed}?"},
    ]
    options = {"temperature": 0, "ignore_eos": True, "return_token_ids": True, **fields}
    return {"messages": [{"role": "user", "content": parts}], **options}


class Client:
    """One session with a server."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def get(self, path: str) -> tuple[int, str]:
        """Status and text."""
        async with self._session.get(self._url + path) as answer:
            return answer.status, await answer.text()

    async def chat(self, seed: int, **fields: Any) -> tuple[int, dict[str, Any], str | None]:
        """Status, body, and what the header says about trying again."""
        path = self._url + "/v1/chat/completions"
        async with self._session.post(path, json=body(seed, **fields)) as answer:
            return answer.status, await answer.json(), answer.headers.get("Retry-After")

    async def tokens(self, seed: int) -> list[int]:
        """The tokens of a short answer."""
        status, answer, _ = await self.chat(seed, max_tokens=12)
        assert status == 200, answer
        return list(answer["choices"][0]["token_ids"])

    async def stream(self, seed: int, begun: asyncio.Event) -> tuple[int, list[str]]:
        """Status and events of a long answer; ``begun`` is set at the first event."""
        path = self._url + "/v1/chat/completions"
        content = body(seed, max_tokens=MANY_TOKENS, stream=True)
        async with self._session.post(path, json=content) as answer:
            events = []
            async for line in answer.content:
                if line.startswith(b"data: "):
                    events.append(line.decode().removeprefix("data: ").strip())
                    begun.set()
            return answer.status, events

    async def gauge(self, name: str) -> float:
        """One number of /metrics."""
        status, text = await self.get("/metrics")
        assert status == 200
        [value] = [
            line.split()[-1] for line in text.splitlines() if line.startswith(f"sensorium:{name}{{")
        ]
        return float(value)

    async def until_healthy(self) -> None:
        """Wait for the next engine; as long, new requests get 503."""
        async with asyncio.timeout(300):
            while (await self.get("/health"))[0] != 200:
                await asyncio.sleep(0.05)


def connected(server: Server) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(120))


async def killed_under_load(server: Server, client: Client) -> None:
    """Kill the engine while it computes for many clients; look at what each of them gets."""
    begun = [asyncio.Event() for _ in range(NUM_CLIENTS)]
    streams = [asyncio.create_task(client.stream(i, event)) for i, event in enumerate(begun)]
    plain = [
        asyncio.create_task(client.chat(NUM_CLIENTS + i, max_tokens=MANY_TOKENS))
        for i in range(NUM_CLIENTS)
    ]
    async with asyncio.timeout(300):
        await asyncio.gather(*(event.wait() for event in begun))
    [engine] = server.engines()
    engine.send_signal(signal.SIGKILL)
    # On a busy machine the first ones may be done when the last ones begin.
    plain = [task for task in plain if not task.done()]
    streams = [task for task in streams if not task.done()]
    assert len(plain) + len(streams) > NUM_CLIENTS
    for status, answer, retry_after in await asyncio.gather(*plain):
        assert (status, answer["error"]["code"]) == (503, "engine_unavailable")
        assert "being restarted; try again" in answer["error"]["message"]
        assert int(retry_after or 0) >= 1
    for status, events in await asyncio.gather(*streams):
        assert status == 200
        assert json.loads(events[-2])["error"]["code"] == "engine_unavailable"
        assert events[-1] == "[DONE]"


async def refused_meanwhile(client: Client) -> None:
    """What the server says without an engine."""
    status, text = await client.get("/health")
    assert (status, json.loads(text)["error"]["code"]) == (503, "engine_unavailable")
    status, answer, retry_after = await client.chat(0, max_tokens=1)
    assert (status, answer["error"]["code"]) == (503, "engine_unavailable")
    assert int(retry_after or 0) >= 1
    assert await client.gauge("num_requests_running") == 0
    assert (await client.get("/v1/models"))[0] == 200


async def test_an_engine_killed_under_load_is_replaced_again_and_again(server: Server) -> None:
    [engine] = server.engines()
    folders = [folders_of(engine)]
    assert folders[0]
    async with connected(server) as session:
        client = Client(session, server.url)
        expected = [await client.tokens(seed) for seed in range(3)]
        descriptors = []
        for number in range(3):
            if number == 0:
                await killed_under_load(server, client)
            else:
                server.engines()[0].send_signal(signal.SIGKILL)
                async with asyncio.timeout(300):
                    while (await client.get("/health"))[0] == 200:
                        await asyncio.sleep(0.01)
            await refused_meanwhile(client)
            await client.until_healthy()
            assert [await client.tokens(seed) for seed in range(3)] == expected
            assert await client.gauge("mm_held_requests") == 0
            [engine] = server.engines()
            folders.append(folders_of(engine))
            assert all(path.exists() for path in folders[-1])
            descriptors.append(server.num_descriptors())
    # Sockets of the last requests may still be closing.
    assert descriptors[2] <= descriptors[0] + 4
    assert not any(process.status() == psutil.STATUS_ZOMBIE for process in server.children())
    old = set().union(*folders[:-1]) - folders[-1]
    assert len(old) == 3, "each engine has a folder of its own"
    assert not any(path.exists() for path in old)
    assert server.stop() == 0
    assert not any(path.exists() for path in folders[-1])
    log = server.log.read_text()
    assert "was ended by SIGKILL" in log
    assert "restarts so far: 3" in log
    assert "Traceback" not in log


async def test_a_server_stopped_while_its_engine_is_restarted_ends_at_once(server: Server) -> None:
    folders = set().union(*map(folders_of, server.children()))
    server.engines()[0].send_signal(signal.SIGKILL)
    async with connected(server) as session, asyncio.timeout(300):
        client = Client(session, server.url)
        while not server.engines() or (await client.get("/health"))[0] == 200:
            await asyncio.sleep(0.01)
    children = server.children()
    folders |= set().union(*map(folders_of, server.engines()))
    assert server.stop() == 0
    _, alive = psutil.wait_procs(children, timeout=300)
    assert not alive
    assert not any(path.exists() for path in folders)


async def test_an_engine_whose_server_is_killed_ends_and_leaves_nothing(server: Server) -> None:
    async with connected(server) as session:
        assert await Client(session, server.url).tokens(0)
    children = server.children()
    folders = set().union(*map(folders_of, children))
    assert folders
    assert all(path.exists() for path in folders)
    server.process.send_signal(signal.SIGKILL)
    _, alive = await asyncio.to_thread(psutil.wait_procs, children, timeout=300)
    assert not alive
    assert not any(path.exists() for path in folders)
