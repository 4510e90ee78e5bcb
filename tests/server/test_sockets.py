"""What only a real server shows: clients that leave, odd HTTP, draining, OpenAI's client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import threading
from pathlib import Path

import aiohttp
import openai
import pytest

from sensorium.config import ServerConfig
from sensorium.errors import ConfigError
from sensorium.processes.start import STOPS
from sensorium.server import launch
from sensorium.server.launch import StopSignals, bound_listener, listening_socket
from tests.server.fake_frontend import TOKENIZER, FakeFrontend, hang
from tests.server.harness import USER, running, status_of, until

CHAT = "/v1/chat/completions"
REPLY = "Hello, world!"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": USER}),
        (CHAT, {"messages": USER, "stream": True}),
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/completions", {"prompt": ["a", "b", "c"]}),
        ("/v1/completions", {"prompt": ["a", "b"], "stream": True}),
    ],
)
async def test_leaving_before_the_first_token_frees_the_work(
    path: str, body: dict[str, object]
) -> None:
    async with running(FakeFrontend(before=hang)) as server:
        _, writer = await server.send(path, body)
        prompts = body.get("prompt")
        expected = len(prompts) if isinstance(prompts, list) else 1
        await until(lambda: server.frontend.num_open == expected)
        writer.close()
        await until(lambda: server.frontend.num_open == 0)
        context = server.app.state.context
        await until(lambda: context.num_in_flight == 0)
        assert context.models.default.admission.num_waiting == 0


@pytest.mark.parametrize("body", [{"stream": True}, {}, {"stream": True, "n": 3}])
async def test_leaving_amid_the_answer_frees_the_work(body: dict[str, object]) -> None:
    async with running(FakeFrontend(between=hang)) as server:
        reader, writer = await server.send(CHAT, {"messages": USER, **body})
        await until(lambda: server.frontend.calls and server.frontend.calls[0].num_tokens == 1)
        if body:
            assert await status_of(reader) == 200
        writer.close()
        await until(lambda: server.frontend.num_open == 0)
        await until(lambda: server.app.state.context.num_in_flight == 0)


async def test_a_reset_connection_counts_as_leaving() -> None:
    async with running(FakeFrontend(between=hang)) as server:
        _, writer = await server.send(CHAT, {"messages": USER, "stream": True})
        await until(lambda: server.frontend.num_open == 1)
        writer.transport.abort()
        await until(lambda: server.frontend.num_open == 0)


async def test_leaving_within_the_body_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as server:
        _, writer = await server.connect()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
        await writer.drain()
        context = server.app.state.context
        await until(lambda: context.num_in_flight == 1)
        writer.close()
        await until(lambda: context.num_in_flight == 0)
        assert not server.frontend.calls
    assert "Traceback" not in caplog.text


async def test_a_third_of_many_clients_leaving_harms_no_other() -> None:
    async def short_pause(call: object) -> None:
        await asyncio.sleep(0)

    async with running(FakeFrontend(between=lambda c: short_pause(c), before=None)) as server:

        async def client(number: int) -> str | None:
            reader, writer = await server.send(
                CHAT, {"messages": USER, "stream": True}, headers="Connection: close\r\n"
            )
            if number % 3 == 0:
                await reader.readline()
                writer.close()
                return None
            text = (await reader.read()).decode()
            writer.close()
            assert text.count("data: [DONE]") == 1
            chunks = [json.loads(part[6:]) for part in _events(text)]
            return "".join(c["choices"][0]["delta"].get("content", "") for c in chunks)

        texts = await asyncio.gather(*(client(i) for i in range(48)))
        assert [t for i, t in enumerate(texts) if i % 3] == [REPLY] * 32
        await until(lambda: server.frontend.num_open == 0)
        admission = server.app.state.context.models.default.admission
        await until(lambda: admission.num_waiting == 0)


def _events(text: str) -> list[str]:
    """The JSON events in the body of a chunked answer."""
    return [line for line in text.split("\r\n") for line in line.split("\n\n") if "data: {" in line]


async def test_headers_over_the_limit() -> None:
    async with running() as server:
        reader, writer = await server.connect()
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Big: " + b"a" * 70_000)
        assert await status_of(reader) == 431
        body = (await reader.read()).partition(b"\r\n\r\n")[2]
        assert json.loads(body)["error"]["code"] == "headers_too_large"
        writer.close()
        reader, _ = await server.send("/health", None, method="GET")
        assert await status_of(reader) == 200


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET\r\n\r\n", b"A B C D\r\n\r\n"]
)
async def test_what_is_no_http(data: bytes) -> None:
    async with running() as server:
        reader, writer = await server.connect()
        writer.write(data)
        assert await status_of(reader) == 400
        body = (await reader.read()).partition(b"\r\n\r\n")[2]
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        writer.close()


@pytest.mark.parametrize("host", ["", "a b", "evil.example/\\@x", "[::1", "x" * 5000, "\xff"])
async def test_odd_host_headers_change_nothing(host: str) -> None:
    async with running() as server:
        for path in ("/health", "/", "/nope"):
            reader, writer = await server.connect()
            writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode("latin-1"))
            assert await status_of(reader) in (200, 400, 404)
            writer.close()


async def test_a_body_over_the_limit_leaves_the_connection_usable() -> None:
    async with running(max_body_bytes=1000) as server:
        reader, writer = await server.send(CHAT, {"messages": USER, "user": "x" * 200_000})
        assert await status_of(reader) == 413
        await reader.readuntil(b"}}")
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await status_of(reader) == 200
        writer.close()


async def test_draining_lets_running_requests_finish() -> None:
    gate = asyncio.Event()
    async with running(FakeFrontend(between=lambda call: gate.wait())) as server:
        reader, writer = await server.send(CHAT, {"messages": USER, "stream": True})
        assert await status_of(reader) == 200
        server.signals.on_signal()
        context = server.app.state.context
        await until(lambda: context.arrivals.draining)
        for path, body, method in (("/health", None, "GET"), (CHAT, {"messages": USER}, "POST")):
            late, _ = await server.send(path, body, method=method)
            assert await status_of(late) == 503
        assert not server.frontend.closing
        gate.set()
        text = (await reader.read()).decode()
        assert '"finish_reason":"stop"' in text
        assert text.count("data: [DONE]") == 1
        writer.close()
        await asyncio.wait_for(server.task, 60)
        assert server.frontend.closing


async def test_an_idle_connection_does_not_delay_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that keeps its connection for later.

    Nothing is waited for, neither for requests nor for closing.
    """
    monkeypatch.setattr(launch, "CLOSING_SECONDS", 3600)
    async with running(shutdown_timeout=3600) as server:
        idle, writer = await server.send(CHAT, {"messages": USER})
        assert await status_of(idle) == 200
        await idle.readuntil(b'"usage"')
        unused, _ = await server.connect()
        server.signals.on_signal()
        await asyncio.wait_for(server.task, 60)
        await asyncio.wait_for(asyncio.gather(idle.read(), unused.read()), 60)
        writer.close()


async def test_a_body_that_never_ends_does_not_delay_the_end() -> None:
    async with running(shutdown_timeout=3600) as server:
        reader, writer = await server.connect()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
        writer.write(head.encode() + b'{"messages"')
        await until(lambda: server.app.state.context.num_in_flight == 1)
        server.signals.on_signal()
        assert await status_of(reader) == 503
        assert '"code":"engine_unavailable"' in (await reader.read()).decode()
        await asyncio.wait_for(server.task, 60)
        writer.close()


async def test_draining_ends_after_its_time() -> None:
    def ended_by_shutdown(call: object) -> object:
        return until(lambda: frontend.closing)

    frontend = FakeFrontend(between=ended_by_shutdown)
    async with running(frontend, shutdown_timeout=0.1) as server:
        reader, _ = await server.send(CHAT, {"messages": USER, "stream": True})
        assert await status_of(reader) == 200
        server.signals.on_signal()
        text = (await reader.read()).decode()
        assert '"code":"engine_unavailable"' in text
        assert text.count("data: [DONE]") == 1
        await asyncio.wait_for(server.task, 60)


async def test_a_second_signal_does_not_wait() -> None:
    async with running(FakeFrontend(before=hang), shutdown_timeout=3600) as server:
        _, writer = await server.send(CHAT, {"messages": USER})
        await until(lambda: server.frontend.num_open == 1)
        server.signals.on_signal()
        server.signals.on_signal()
        await asyncio.wait_for(server.task, 60)
        writer.close()
        assert server.frontend.num_open == 0


async def test_the_address_is_announced(capsys: pytest.CaptureFixture[str]) -> None:
    async with running() as server:
        reader, _ = await server.send("/health", None, method="GET")
        assert await status_of(reader) == 200
        port = server.port
    assert f"serving demo at http://127.0.0.1:{port}\n" in capsys.readouterr().out


def test_a_port_in_use_is_known_at_once() -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    with contextlib.closing(taken), pytest.raises(ConfigError, match=str(port)):
        listening_socket("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"no\.such\.host"):
        listening_socket("no.such.host.invalid", 8000)


async def test_openais_client() -> None:
    async with running(FakeFrontend(num_cached_tokens=1), api_key=("k",)) as server:
        client = openai.AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="k")
        async with client:
            assert [m.id async for m in client.models.list()] == ["demo"]
            answer = await client.chat.completions.create(
                model="demo", messages=USER, logprobs=True, top_logprobs=2, n=2
            )
            assert [c.message.content for c in answer.choices] == [REPLY, REPLY]
            assert len(answer.choices[0].logprobs.content) == len(TOKENIZER.encode(REPLY))
            assert answer.usage.prompt_tokens_details.cached_tokens == 1
            stream = await client.chat.completions.create(
                model="demo",
                messages=USER,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"top_k": 5, "mm_processor_kwargs": {}},
            )
            chunks = [chunk async for chunk in stream]
            text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            assert text == REPLY
            assert chunks[-1].usage.completion_tokens == len(TOKENIZER.encode(REPLY))
            completion = await client.completions.create(
                model="demo", prompt=["a", "b"], logprobs=1
            )
            assert [c.text for c in completion.choices] == [REPLY, REPLY]


async def test_openais_client_gets_its_own_exceptions() -> None:
    async with running(api_key=("k",)) as server:
        base_url = f"{server.base_url}/v1"
        async with openai.AsyncOpenAI(base_url=base_url, api_key="wrong") as client:
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
        async with openai.AsyncOpenAI(base_url=base_url, api_key="k", max_retries=0) as client:
            with pytest.raises(openai.BadRequestError) as caught:
                await client.chat.completions.create(model="demo", messages=USER, temperature=-1)
            assert caught.value.param == "temperature"
            assert caught.value.code == "invalid_request"
            with pytest.raises(openai.NotFoundError):
                await client.chat.completions.create(model="other", messages=USER)


async def test_a_unix_socket_is_served_replaced_and_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s"
    with launch.unix_socket(str(path)):
        pass  # as a server that was killed leaves it
    async with running(uds=str(path)):
        connector = aiohttp.UnixConnector(path=str(path))
        async with aiohttp.ClientSession(connector=connector) as client:
            answer = await (await client.post(f"http://x{CHAT}", json={"messages": USER})).json()
        assert answer["choices"][0]["message"]["content"] == REPLY
        assert f"at unix:{path}" in capsys.readouterr().out
        with pytest.raises(ConfigError, match="in use") as caught, launch.unix_socket(str(path)):
            pass
        assert caught.value.param == "uds"
    assert not path.exists()
    path.write_text("a file of somebody")
    with pytest.raises(ConfigError, match="in use"):
        launch.unix_socket(str(path))
    assert path.read_text() == "a file of somebody"
    with pytest.raises(ConfigError, match="uds must be a path"):
        ServerConfig(uds="x" * 200)


async def test_a_signal_ends_the_look_up_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer = threading.Event(), threading.Event()

    def slow(*_: object, **__: object) -> list[tuple[object, ...]]:
        asked.set()
        answer.wait(60)
        raise OSError("too late")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    signals = StopSignals()
    task = asyncio.create_task(bound_listener(ServerConfig(host="slow.invalid"), signals))
    await asyncio.to_thread(asked.wait, 60)
    assert not task.done()
    signals.on_signal()
    assert await asyncio.wait_for(task, 60) is None
    answer.set()


async def test_signals_are_held_again_when_the_server_has_ended() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        with StopSignals().installed() as signals:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait_for(signals.stop.wait(), 60)
            assert not signals.hurry.is_set()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) >= STOPS
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
