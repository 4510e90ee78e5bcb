"""Replicas of the demo behind Ray Serve: the same answers, and what a replica's death does."""

from __future__ import annotations

import asyncio
import collections
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import httpx2 as httpx
import openai
import pytest

from tests.e2e.serving import Server
from tests.ray.processes import processes_of
from tests.reliability.media import picture_url
from tests.server.harness import until

pytestmark = pytest.mark.slow

FLAGS = ("--data-parallel-size", "2", "--num-kv-blocks", "512", "--disable-log-stats")
CLIENTS = 64
UPDATE_CLIENTS = 16
"""During an update the clients share the processors with what starts, which takes its time by them
and not by the update."""
UPDATE_SECONDS = 400
SECONDS = 120.0
ROOT = Path(__file__).parents[2]
OK = "ok"


def metrics(url: str, name: str) -> dict[str, float]:
    """Values of a metric by its label ``engine``."""
    text = httpx.get(f"{url}/metrics", timeout=SECONDS).text
    found = re.findall(rf'^sensorium:{name}{{engine="(\w+)".*}} (\S+)$', text, re.MULTILINE)
    return {engine: float(value) for engine, value in found}


def wait_for(condition: Callable[[], Any], seconds: float = SECONDS) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.1)


async def streamed(session: aiohttp.ClientSession, url: str, prompt: str, num: int) -> str:
    """Stream a completion of so many tokens; return "ok" or what went wrong."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": num, "stream": True}
    body["ignore_eos"] = True
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        if answer.status != 200:
            return str(json.loads(await answer.text())["error"]["code"])
        last = ""
        async for line in answer.content:
            text = line.decode().strip().removeprefix("data: ")
            if '"error"' in text:
                return str(json.loads(text)["error"]["code"])
            last = text or last
        return OK if last == "[DONE]" else "cut off"


async def load(
    url: str, ended: asyncio.Event, outcomes: list[tuple[float, str]], clients: int
) -> None:
    """Stream to so many clients until ``ended``; add begin and outcome of each request."""

    async def client(number: int, session: aiohttp.ClientSession) -> None:
        turn = 0
        while not ended.is_set():
            began = time.monotonic()
            outcome = await streamed(session, url, f"Client {number}, turn {turn}", 24)
            outcomes.append((began, outcome))
            turn += 1

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        await asyncio.gather(*(client(number, session) for number in range(clients)))


def test_a_chat_streams_and_a_picture_is_seen_once(server: Server) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    parts = [
        {"type": "image_url", "image_url": {"url": picture_url()}, "uuid": "picture"},
        {"type": "text", "text": "What is this?"},
    ]
    asked = {"model": "demo", "messages": [{"role": "user", "content": parts}], "temperature": 0}
    whole = client.chat.completions.create(**asked, max_tokens=12, n=2)
    with client.chat.completions.create(**asked, max_tokens=12, stream=True) as stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert [choice.message.content for choice in whole.choices] == [text, text]
    again = [{"type": "image_url", "image_url": None, "uuid": "picture"}, parts[1]]
    asked["messages"] = [{"role": "user", "content": again}]
    assert client.chat.completions.create(**asked, max_tokens=12).choices[0].message.content == text
    wait_for(lambda: sum(metrics(server.url, "num_requests_running").values()) == 0)
    assert len(metrics(server.url, "engine_up")) == 2
    queries, hits = "mm_encoder_cache_queries_total", "mm_encoder_cache_hits_total"
    wait_for(lambda: sum(metrics(server.url, queries).values()) >= 4)
    assert sum(metrics(server.url, hits).values()) >= 2


def test_errors_are_those_of_one_server(server: Server) -> None:
    url = f"{server.url}/v1/chat/completions"
    message = {"role": "user", "content": "a " * 9000}
    answer = httpx.post(url, json={"model": "demo", "messages": [message]}, timeout=SECONDS)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    other = httpx.post(url, json={"model": "other", "messages": [message]}, timeout=SECONDS)
    assert other.status_code == 404
    assert httpx.get(f"{server.url}/health", timeout=SECONDS).status_code == 200
    assert "X-Request-Id" in answer.headers
    assert "," not in answer.headers["X-Request-Id"]


@pytest.mark.parametrize("program", ["responses.py", "anthropic_messages.py"])
def test_programs_of_others_run(server: Server, program: str, tmp_path: Path) -> None:
    draw = [sys.executable, "scripts/demo_media.py", "--seed", "7", "--folder", tmp_path]
    subprocess.run(draw, cwd=ROOT, check=True, capture_output=True)
    command = [
        sys.executable,
        str(ROOT / "examples" / "clients" / program),
        str(tmp_path / "shapes.png"),
        server.url,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "green triangle" in done.stdout.lower()


async def test_clients_that_leave_free_their_work(server: Server) -> None:
    body = {"model": "demo", "prompt": "a", "max_tokens": 1500, "stream": True, "ignore_eos": True}
    url = f"{server.url}/v1/completions"
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
        await answer.content.readline()
    running = "num_requests_running"
    await asyncio.to_thread(wait_for, lambda: not any(metrics(server.url, running).values()))


async def test_a_replica_that_dies_fails_what_ran_on_it_and_nothing_else(server: Server) -> None:
    ended, outcomes = asyncio.Event(), list[tuple[float, str]]()
    before = set(metrics(server.url, "engine_up"))
    loading = asyncio.create_task(load(server.url, ended, outcomes, CLIENTS))
    await until(lambda: len(outcomes) >= CLIENTS, SECONDS)
    next(processes_of("ServeReplica:sensorium:Engine")).kill()
    killed = time.monotonic()

    def later() -> list[str]:
        return [outcome for began, outcome in outcomes if began > killed]

    await until(lambda: len(later()) >= CLIENTS, SECONDS)
    ended.set()
    await loading
    assert set(later()) == {OK}
    failed = collections.Counter(outcome for _, outcome in outcomes if outcome != OK)
    assert set(failed) <= {"engine_unavailable"}, failed
    assert failed.total() <= CLIENTS

    def is_whole() -> bool:
        up = metrics(server.url, "engine_up")
        return len(up) == 2 and set(up) != before and all(up.values())

    await asyncio.to_thread(wait_for, is_whole)


def check_ids_of_media(url: str) -> None:
    """An item that one process for HTTP got is found by its id in each of several.

    Each request has a connection of its own, for which Ray chooses a process by chance.
    """

    def asked(source: str | None) -> httpx.Response:
        part = {"type": "image_url", "image_url": source and {"url": source}, "uuid": "any"}
        text = {"type": "text", "text": "What is this?"}
        message = {"role": "user", "content": [part, text]}
        body = {"model": "demo", "messages": [message], "max_tokens": 4, "temperature": 0}
        return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300)

    def text_of(answer: httpx.Response) -> str:
        return str(answer.json()["choices"][0]["message"]["content"])

    expected = text_of(asked(picture_url()))
    # Another process knows of it a moment later.
    wait_for(lambda: all(asked(None).status_code == 200 for _ in range(24)))
    assert text_of(asked(None)) == expected


async def test_an_update_in_place_fails_no_request(
    server: Server, ray_address: str, tmp_path: Path
) -> None:
    """It brings other options of the engines, and a second process for HTTP."""
    ended, outcomes = asyncio.Event(), list[tuple[float, str]]()
    flags = (*FLAGS, "--ray-address", ray_address, "--max-num-seqs", "32")
    flags = (*flags, "--api-server-count", "2")
    before = set(metrics(server.url, "engine_up"))
    log = tmp_path / "log.txt"
    log.touch()
    starting = asyncio.create_task(
        asyncio.to_thread(Server, "demo", log, flags, start_seconds=UPDATE_SECONDS)
    )
    # The start of that program itself, before the update begins, shows nothing under load.
    connects = "connecting to Ray"
    await asyncio.to_thread(wait_for, lambda: connects in log.read_text(), UPDATE_SECONDS)
    loading = asyncio.create_task(load(server.url, ended, outcomes, UPDATE_CLIENTS))
    second = await starting
    ended.set()
    await loading
    found = collections.Counter(outcome for _, outcome in outcomes)
    assert second.url == server.url
    assert set(found) == {OK}, found

    def is_new() -> bool:
        up = metrics(server.url, "engine_up")
        return len(up) == 2 and not set(up) & before

    await asyncio.to_thread(wait_for, is_new)
    await asyncio.to_thread(check_ids_of_media, second.url)
    assert server.stop(signal.SIGINT) == 0
    health = httpx.get(f"{second.url}/health", timeout=SECONDS)
    assert health.status_code == 200, "the first start let it be"
    assert second.stop(signal.SIGINT) == 0
