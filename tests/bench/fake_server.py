"""An OpenAI-compatible server that answers by rule: what the load generator is tested against."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer

CACHED_TOKENS = 3


@dataclass(slots=True)
class FakeServer:
    """What the server saw, and how it should behave.

    A request's ``fake`` member picks the behaviour: ``refuse`` (503), ``plain_refuse`` (500 without
    JSON), ``break`` (ends midway), ``error`` (an error event), ``silent`` (no text), ``slow``
    (never answers), ``no_usage``, ``pairs`` (two tokens in a chunk). Otherwise ``max_tokens``
    chunks.
    """

    base_url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    authorizations: list[str | None] = field(default_factory=list)
    most_at_once: int = 0
    num_hung_up: int = 0
    hold: asyncio.Event | None = None
    _num_open: int = 0

    async def models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "fake-model"}]})

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.authorizations.append(request.headers.get("Authorization"))
        self._num_open += 1
        self.most_at_once = max(self.most_at_once, self._num_open)
        try:
            return await self._answer(request, body, body.get("fake", ""))
        except (ConnectionResetError, asyncio.CancelledError):
            self.num_hung_up += 1
            raise
        finally:
            self._num_open -= 1

    async def _answer(
        self, request: web.Request, body: dict[str, Any], kind: str
    ) -> web.StreamResponse:
        if kind == "refuse":
            error = {"message": "The queue is full.", "code": "overloaded", "param": None}
            return web.json_response({"error": error}, status=503)
        if kind == "plain_refuse":
            return web.Response(status=500, text="it broke")
        if kind == "slow":
            await asyncio.sleep(3600)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await _send(response, _delta({"role": "assistant", "content": ""}))
        num_tokens = body["max_tokens"]
        step = 2 if kind == "pairs" else 1
        for number in range(0, num_tokens, step):
            if kind == "break" and number >= num_tokens // 2:
                return response
            if kind == "error" and number >= num_tokens // 2:
                await _send(response, {"error": {"message": "The engine has stopped."}})
                return response
            if self.hold is not None:
                await self.hold.wait()
            if kind != "silent":
                await _send(response, _delta({"content": f"w{number} "}))
            await asyncio.sleep(0)
        await _send(response, _delta({}, finish_reason="length"))
        if kind != "no_usage":
            usage = {
                "prompt_tokens": 10,
                "completion_tokens": num_tokens,
                "prompt_tokens_details": {"cached_tokens": CACHED_TOKENS},
            }
            await _send(response, {"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response


@asynccontextmanager
async def serving(hold: asyncio.Event | None = None) -> AsyncIterator[FakeServer]:
    """A fake server on a free port; ``hold`` keeps every answer back until it is set."""
    fake = FakeServer(hold=hold)
    app = web.Application(client_max_size=1 << 26)
    app.router.add_get("/v1/models", fake.models)
    app.router.add_post("/v1/chat/completions", fake.chat)
    server = TestServer(app, handler_cancellation=True)
    await server.start_server()
    try:
        fake.base_url = str(server.make_url("")).rstrip("/")
        yield fake
    finally:
        await server.close()


def _delta(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


async def _send(response: web.StreamResponse, value: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(value).encode() + b"\n\n")
