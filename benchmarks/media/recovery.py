"""Recovery of a server after a kill of one of its processes, and what happened to the requests.

Clients ask about small new images all the while, one request after the other. Killed with SIGKILL
are: a worker in the middle of decoding a large image, the process that workers are forked from, and
the engine amid its requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from PIL import Image

from benchmarks.harness import Found, Row, flag
from benchmarks.media.load import noisy_jpeg
from benchmarks.served import (
    QUESTION,
    Asker,
    Reply,
    ServedProcess,
    ServerSettings,
    chat_body,
    counted,
    image_part,
    is_media_worker,
    jpeg_url,
    sensorium_server,
)

MOST_SECONDS = {"worker": 2.0, "forker": 10.0, "engine": 20.0}
"""Targets: until good answers come again."""
NUM_CLIENTS = 8
PAUSE_SECONDS = 0.02
"""Of a client that was not served, before it asks again."""
RECOVERY_TIMEOUT = 120.0
ENDED_SECONDS = 5.0
"""A server whose first process has ended does not come back; so long is waited for that."""
QUIET_SECONDS = 1.0
"""Of the load before and after a kill."""
LARGE_SIDE = 9000
"""Pixels; a picture of this size takes long enough to decode for a worker to be caught at it."""
DECODING_BYTES = 48 << 20
"""By so much has a worker grown that is at the large picture and at none of the small ones."""

_numbers = itertools.count(int(time.time()) * 1_000_000)


@dataclass(frozen=True, kw_only=True)
class Settings(ServerSettings):
    """How often each process is killed."""

    kills: int = flag(3, "of each process", quick=1)


def measure(settings: Settings, folder: Path) -> Found:
    """Start a server, kill its processes one after the other, end it."""

    async def serve() -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in KILLS}
        server = sensorium_server(settings, folder / "recovery.log", "--num-media-workers", "2")
        async with server:
            for name, kill in KILLS.items():
                for _ in range(settings.kills):
                    async with Asker(server.base_url) as asker:
                        found[name].append(await kill(server, asker))
        return found

    found = asyncio.run(serve())
    rows = []
    for victim, kills in found.items():
        for key, words in (
            ("good_request_seconds", "until a good answer"),
            ("healthy_seconds", "until /health is 200"),
        ):
            times = [kill[key] for kill in kills]
            longest = None if None in times else max(times)
            rows.append(Row(f"{victim}: {words}", longest, "s", most=MOST_SECONDS[victim]))
        later = sum(kill["failed_later"] for kill in kills)
        rows.append(Row(f"{victim}: failed later", later, most=0))
    hit = [kill["hit"] + kill["meanwhile"] for kill in found["worker"]]
    others = sum(codes.total() - codes["200"] for codes in hit)
    rows.append(Row("worker: other requests that failed", others, most=0))
    return Found(found, rows)


# --- the kills ------------------------------------------------------------------------------------


class Load:
    """Clients that ask about small new images, and one that asks for /health.

    ``replies`` are in the order of their ends, ``health`` has the time and the status of each
    answer.
    """

    def __init__(self, asker: Asker, model: str) -> None:
        self.replies: list[Reply] = []
        self.health: list[tuple[float, int]] = []
        self._asker = asker
        self._model = model
        self._file = noisy_jpeg(3_000_000, 96, 96)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The clients ask within, and have got their answers after."""
        self._stopping = False
        tasks = [asyncio.create_task(self._client()) for _ in range(NUM_CLIENTS)]
        tasks.append(asyncio.create_task(self._watch_health()))
        try:
            yield
        finally:
            self._stopping = True
            await asyncio.gather(*tasks)

    async def _client(self) -> None:
        while not self._stopping:
            reply = await self._asker.ask(self._body(next(_numbers)))
            self.replies.append(reply)
            if reply.status != 200:
                await asyncio.sleep(PAUSE_SECONDS)

    async def _watch_health(self) -> None:
        while not self._stopping:
            status = await self._asker.health()
            self.health.append((time.monotonic(), status))
            await asyncio.sleep(PAUSE_SECONDS)

    def _body(self, number: int) -> bytes:
        # What follows the end of a JPEG changes the file and not the picture.
        url = jpeg_url(self._file + b"%024d" % number)
        return chat_body(self._model, QUESTION, image_part(url), max_tokens=8)


async def worker_killed(server: ServedProcess, asker: Asker) -> dict[str, Any]:
    """Kill the worker that decodes a large picture, under load.

    The request of that picture is in ``victim``.
    """
    load = Load(asker, await asker.model())
    body = chat_body(await asker.model(), QUESTION, image_part(_large_picture()))
    async with load.running():
        await _busy(load)
        before = {process.pid: process.memory_info().rss for process in _workers(server)}
        victim = asyncio.create_task(asker.ask(body))
        worker = await _decoding(server, before, victim)
        worker.kill()
        killed = time.monotonic()
        reply = await victim
        await _recovered(load, server, killed)
    found = after_kill(load.replies, load.health, killed)
    outcome = {"status": reply.status, "code": reply.code, "seconds": reply.ended - killed}
    return {**found, "victim": outcome}


async def forker_killed(server: ServedProcess, asker: Asker) -> dict[str, Any]:
    """Kill the process that media workers are forked from, and so all of them, under load."""
    return await _killed(server, asker, _forker)


async def engine_killed(server: ServedProcess, asker: Asker) -> dict[str, Any]:
    """Kill the engine's process under load."""
    return await _killed(server, asker, lambda server: server.engines()[0])


async def _killed(
    server: ServedProcess, asker: Asker, choose: Callable[[ServedProcess], psutil.Process]
) -> dict[str, Any]:
    load = Load(asker, await asker.model())
    async with load.running():
        await _busy(load)
        choose(server).kill()
        killed = time.monotonic()
        await _recovered(load, server, killed)
    return after_kill(load.replies, load.health, killed)


def after_kill(
    replies: Sequence[Reply], health: Sequence[tuple[float, int]], killed: float
) -> dict[str, Any]:
    """What a kill at ``killed`` did.

    ``good_request_seconds``: from the kill to the end of the first good request that was sent after
    it; ``healthy_seconds``: to the last moment at which /health was not yet 200 again, 0 when it
    always was; both None when that never came. ``hit``: requests in flight at the kill,
    ``meanwhile``: those that failed between it and the first good one, both by status and code.
    ``failed_later``: how many failed after that.
    """
    good = [reply for reply in replies if reply.status == 200 and reply.started >= killed]
    first = min((reply.ended for reply in good), default=None)
    hit = [reply for reply in replies if reply.started < killed < reply.ended]
    meanwhile = [
        reply
        for reply in replies
        if reply.started >= killed
        and reply.status != 200
        and (first is None or reply.ended < first)
    ]
    later = [
        reply
        for reply in replies
        if first is not None and reply.started > first and reply.status != 200
    ]
    unhealthy = [at for at, status in health if at > killed and status != 200]
    ends_healthy = bool(health) and health[-1][1] == 200
    return {
        "good_request_seconds": None if first is None else first - killed,
        "healthy_seconds": max((at - killed for at in unhealthy), default=0.0)
        if ends_healthy
        else None,
        "hit": counted(f"{reply.status} {reply.code}".strip() for reply in hit),
        "meanwhile": counted(f"{reply.status} {reply.code}".strip() for reply in meanwhile),
        "failed_later": len(later),
    }


KILLS: dict[str, Callable[[ServedProcess, Asker], Awaitable[dict[str, Any]]]] = {
    "worker": worker_killed,
    "forker": forker_killed,
    "engine": engine_killed,
}


# --- watching -------------------------------------------------------------------------------------


async def _busy(load: Load) -> None:
    """Wait until the load has got answers for a while.

    Raises RuntimeError when it gets none that is good.
    """
    await asyncio.sleep(QUIET_SECONDS)
    async with asyncio.timeout(RECOVERY_TIMEOUT):
        while len(load.replies) < NUM_CLIENTS:
            await asyncio.sleep(PAUSE_SECONDS)
    bad = [reply for reply in load.replies if reply.status != 200]
    if bad:
        raise RuntimeError(f"the load is not served: {bad[0].status} {bad[0].code} {bad[0].text}")


async def _recovered(load: Load, server: ServedProcess, killed: float) -> None:
    """Wait until good requests succeed again and /health is 200, or the server is gone or the
    time is over.
    """
    deadline = killed + RECOVERY_TIMEOUT
    while time.monotonic() < deadline:
        if not server.tree.alive:
            await asyncio.sleep(ENDED_SECONDS)
            return
        good = any(reply.status == 200 and reply.started >= killed for reply in load.replies)
        if good and load.health and load.health[-1][1] == 200:
            await asyncio.sleep(QUIET_SECONDS)
            return
        await asyncio.sleep(PAUSE_SECONDS)


async def _decoding(
    server: ServedProcess, before: dict[int, int], victim: asyncio.Task[Reply]
) -> psutil.Process:
    """The worker that has grown as only the large picture makes it.

    Raises RuntimeError when it is done before.
    """
    while not victim.done():
        for process in _workers(server):
            with contextlib.suppress(psutil.NoSuchProcess):
                grown = process.memory_info().rss - before.get(process.pid, 0)
                if grown > DECODING_BYTES + (0 if process.pid in before else _fresh_bytes(before)):
                    return process
        await asyncio.sleep(0.001)
    raise RuntimeError("the large picture was decoded before a worker could be killed")


def _fresh_bytes(before: dict[int, int]) -> int:
    """What a worker that was forked just now may take by itself."""
    return max(before.values(), default=0)


def _workers(server: ServedProcess) -> list[psutil.Process]:
    """The processes that decode."""
    forker = _forker(server)
    return [process for process in forker.children() if process.is_running()]


def _forker(server: ServedProcess) -> psutil.Process:
    """The process that workers are forked from.

    Of those that decode the one that the server itself has started.
    """
    root, *others = server.tree.processes()
    for process in others:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.ppid() == root.pid and is_media_worker(process):
                return process
    raise RuntimeError("this server has no process that media workers are forked from")


def _large_picture() -> str:
    """A PNG of one colour as a data: URL: small as a file, large when decoded."""
    file = io.BytesIO()
    Image.new("RGB", (LARGE_SIDE, LARGE_SIDE), (200, 30, 60)).save(file, "PNG")
    return jpeg_url(file.getvalue()).replace("image/jpeg", "image/png", 1)
