"""Calling the application: straight through ASGI, or over a socket from a server that runs in
the same loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI

from sensorium.config import EngineConfig, ServedConfig, ServerConfig
from sensorium.server.app import build_app
from sensorium.server.launch import StopSignals, listening, run_app
from sensorium.server.models.lookup import ServedModels
from sensorium.server.models.served import ServedModel
from tests.server.fake_frontend import FakeFrontend

JSON = "application/json"
USER = [{"role": "user", "content": "Hi"}]


@dataclass
class Answer:
    """A whole HTTP answer."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error, in exactly the shape that all errors have."""
        body = self.json()
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert isinstance(body["error"]["message"], str)
        assert body["error"]["message"]
        return body["error"]

    def events(self) -> list[Any]:
        """The chunks of a stream; it must be ended by [DONE]."""
        assert self.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in self.body.decode().split("\n\n") if line]
        assert all(line.startswith("data: ") for line in lines)
        assert lines[-1] == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def app_of(frontend: FakeFrontend, config: ServerConfig) -> FastAPI:
    """An application with one model, whose front end runs."""
    return app_of_models([served(frontend, config)], config, [frontend])


def served(
    frontend: FakeFrontend, config: ServerConfig, start: Any = None, **options: Any
) -> ServedModel:
    """A model for a front end, which ``start`` gives back by default."""

    async def running(engine: EngineConfig) -> Any:
        return frontend

    return ServedModel(
        ServedConfig(engine=frontend.config, server=config), start or running, **options
    )


def app_of_models(
    models: Sequence[ServedModel],
    config: ServerConfig,
    frontends: Sequence[FakeFrontend | None] = (),
    **options: Any,
) -> FastAPI:
    """An application with several models; those with a front end here run."""
    app = build_app(ServedModels(models, **options), config)
    for model, frontend in zip(models, frontends, strict=False):
        if frontend is not None:
            model.adopt(frontend)  # type: ignore[arg-type]
    return app


class App:
    """An application with its front end, called without a socket."""

    def __init__(self, frontend: FakeFrontend | None = None, **config: Any) -> None:
        self.frontend = frontend or FakeFrontend()
        config.setdefault("disable_access_log", True)
        self.app: FastAPI = app_of(self.frontend, ServerConfig(**config))
        self.models: ServedModels = self.app.state.context.models

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        """GET."""
        return await self.request("GET", path, headers=headers)

    async def post(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Answer:
        """POST; ``body`` is sent as JSON unless it is bytes already."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.request("POST", path, [data], {"content-type": JSON, **(headers or {})})

    async def chat(self, **body: Any) -> Answer:
        """A chat completion of a short conversation."""
        return await self.post("/v1/chat/completions", {"messages": USER, **body})

    async def complete(self, **body: Any) -> Answer:
        """A text completion of a short prompt."""
        return await self.post("/v1/completions", {"prompt": "Hi", **body})

    async def request(
        self,
        method: str,
        path: str,
        parts: Sequence[bytes] = (b"",),
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """One request with a body in parts; the connection stays open until the answer is complete."""
        pending = list(parts)
        done = asyncio.Event()
        messages: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if pending:
                part = pending.pop(0)
                return {"type": "http.request", "body": part, "more_body": bool(pending)}
            await done.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            messages.append(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                done.set()

        await self.app(self._scope(method, path, headers or {}), receive, send)
        assert done.is_set(), "the answer is not complete"
        start = messages[0]
        return Answer(
            start["status"],
            {name.decode().lower(): value.decode() for name, value in start["headers"]},
            b"".join(m.get("body", b"") for m in messages[1:]),
        )

    def _scope(self, method: str, path: str, headers: Mapping[str, str]) -> dict[str, Any]:
        raw = [(k.lower().encode(), v.encode("latin-1")) for k, v in headers.items()]
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path.partition("?")[0],
            "raw_path": path.encode(),
            "query_string": path.partition("?")[2].encode(),
            "root_path": "",
            "headers": [(b"host", b"localhost"), *raw],
            "server": ("127.0.0.1", 8000),
            "client": ("127.0.0.1", 50000),
        }


@dataclass
class Running:
    """A server on a port of this machine."""

    frontend: FakeFrontend
    port: int
    signals: StopSignals
    task: asyncio.Task[None]
    app: FastAPI

    @property
    def base_url(self) -> str:
        """Where the API is."""
        return f"http://127.0.0.1:{self.port}"

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A raw connection."""
        return await asyncio.open_connection("127.0.0.1", self.port)

    async def send(
        self, path: str, body: Any, *, method: str = "POST", headers: str = ""
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection on which a request was sent."""
        reader, writer = await self.connect()
        data = b"" if body is None else json.dumps(body).encode()
        writer.write(
            f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {JSON}\r\n"
            f"Content-Length: {len(data)}\r\n{headers}\r\n".encode()
            + data
        )
        await writer.drain()
        return reader, writer


async def status_of(reader: asyncio.StreamReader) -> int:
    """The status of the answer that comes on a raw connection."""
    line = await asyncio.wait_for(reader.readline(), 60)
    return int(line.split()[1])


async def until(condition: Any, seconds: float = 60.0) -> None:
    """Wait for a condition that other tasks bring about."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def running(
    frontend: FakeFrontend | None = None, *, app: FastAPI | None = None, **config: Any
) -> AsyncIterator[Running]:
    """A real server for the block; stopped without patience at its end."""
    frontend = frontend or FakeFrontend()
    config.setdefault("disable_access_log", True)
    server_config = ServerConfig(port=0, **config)
    app = app or app_of(frontend, server_config)
    with listening(server_config) as listener:
        signals = StopSignals()
        task = asyncio.create_task(run_app(app, server_config, listener, signals))
        listener.listen()
        port = 0 if server_config.uds else listener.getsockname()[1]
        try:
            yield Running(frontend, port, signals, task, app)
        finally:
            signals.on_signal()
            signals.on_signal()
            await task
