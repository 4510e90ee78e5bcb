"""Servers under measurement, Sensorium's or others'.

Started, asked over HTTP, watched from outside, ended.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shlex
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.harness import flag
from benchmarks.processes import ProcessTree

START_TIMEOUT = 900.0
STOP_TIMEOUT = 60.0
CHILD_TIMEOUT = 5.0
"""What a server has started may live on for so long after it."""
REQUEST_TIMEOUT = 300.0
KEEP_SECONDS = 2.0
"""An idle connection is used again for so long: servers close theirs after five seconds, perhaps
just when we send."""
QUESTION = "What is shown in the picture?"
CHAT = "/v1/chat/completions"
LOST = "connection_lost"
"""In place of an error's code: the server closed the connection, or there is none."""


# --- the server -----------------------------------------------------------------------------------


class ServedProcess:
    """A server of our own on a free port of this machine, as an async context manager.

    ``command`` gives the command line for a port; ``is_engine`` tells the engine's process from
    those that take requests and handle media. Leaving ends the server and every process that it has
    started.
    """

    tree: ProcessTree

    def __init__(
        self,
        command: Callable[[int], list[str]],
        log: Path,
        *,
        is_engine: Callable[[psutil.Process], bool],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.base_url = f"http://127.0.0.1:{port}"
        self.log = log
        self._command = command(port)
        self._environment = environment
        self._is_engine = is_engine

    async def __aenter__(self) -> ServedProcess:
        with self.log.open("wb") as log:
            self.tree = ProcessTree(self._command, env=self._environment, stdout=log, stderr=log)
        try:
            await self._wait()
        except BaseException:
            self._stop()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._stop()

    @property
    def process_id(self) -> int:
        """The id of its first process, which takes the requests."""
        return self.tree.root.pid

    async def metrics(self) -> str:
        """The text of /metrics."""
        async with Asker(self.base_url) as asker:
            return await asker.text("/metrics")

    def engines(self) -> list[psutil.Process]:
        """The engine's processes."""
        return [process for process in self.tree.processes() if self._tells_engine(process)]

    def processor_times(self) -> Times:
        """What each process has used of the processors so far."""
        engine: dict[int, float] = {}
        front: dict[int, float] = {}
        for process in self.tree.processes():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                times = engine if self._tells_engine(process) else front
                times[process.pid] = processor_seconds(process.pid)
        return Times(front, engine)

    def _tells_engine(self, process: psutil.Process) -> bool:
        try:
            return self._is_engine(process)
        except psutil.NoSuchProcess:
            return False

    async def _wait(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT
        async with aiohttp.ClientSession() as session:
            while time.monotonic() < deadline:
                if not self.tree.alive:
                    raise RuntimeError(f"the server ended; see {self.log}")
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get(f"{self.base_url}/health") as response:
                        if response.status == 200:
                            return
                await asyncio.sleep(0.02)
        raise RuntimeError(f"the server was not ready within {START_TIMEOUT:g} s; see {self.log}")

    def _stop(self) -> None:
        self.tree.end(self.tree.root.terminate, STOP_TIMEOUT, CHILD_TIMEOUT)


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """The model of a ``sensorium serve`` under measurement, and further flags."""

    model: str = flag("demo")
    server_flags: str = flag("", "further flags of the server, in one word")


def sensorium_server(settings: ServerSettings, log: Path, *flags: str) -> ServedProcess:
    """``sensorium serve MODEL`` with these flags, in the Python that runs this."""

    def command(port: int) -> list[str]:
        start = [sys.executable, "-m", "sensorium", "serve", settings.model, "--port", str(port)]
        return [*start, "--disable-access-log", *flags, *shlex.split(settings.server_flags)]

    return ServedProcess(command, log, is_engine=is_sensorium_engine)


def is_sensorium_engine(process: psutil.Process) -> bool:
    """Whether it is the engine of a ``sensorium serve``."""
    return "sensorium.engine.serving.worker" in process.cmdline()


def is_media_worker(process: psutil.Process) -> bool:
    """Whether it is a process of ``sensorium serve`` that decodes media, or the one that these
    are forked from.
    """
    return "sensorium.engine.prompts.media_worker" in process.cmdline()


# --- processor time -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of processor time by process id.

    Of the engine, and of all other processes of a server.
    """

    front: Mapping[int, float]
    engine: Mapping[int, float]

    def since(self, earlier: Times) -> tuple[float, float]:
        """Seconds used after ``earlier``: (front, engine).

        A process that began since counts from its beginning.
        """
        return _rise(earlier.front, self.front), _rise(earlier.engine, self.engine)


def processor_seconds(process_id: int) -> float:
    """Processor time of a process, all its threads, with the kernel's resolution.

    Raises OSError when it is gone.
    """
    return time.clock_gettime(~process_id << 3 | 2)  # what clock_getcpuclockid(3) makes of the id


def _rise(earlier: Mapping[int, float], now: Mapping[int, float]) -> float:
    return sum(seconds - earlier.get(process_id, 0.0) for process_id, seconds in now.items())


# --- its counters ---------------------------------------------------------------------------------


def read_counters(metrics: str) -> dict[str, float]:
    """The counters in the text of /metrics, by name without prefix.

    ``name/stage`` where there is one for each stage. Series that differ in other labels are summed.
    """
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            if sample.name.endswith("_total"):
                stage = sample.labels.get("stage")
                name = family.name.rpartition(":")[2] + (f"/{stage}" if stage else "")
                found[name] = found.get(name, 0.0) + sample.value
    return found


def rises(
    names: Sequence[str], before: Mapping[str, float], after: Mapping[str, float]
) -> dict[str, float | None]:
    """How much each counter rose; None for one that this server does not have."""
    return {name: after[name] - before.get(name, 0.0) if name in after else None for name in names}


# --- requests -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reply:
    """What became of a request.

    ``started`` and ``ended`` are seconds of ``time.monotonic()``; ``status`` is 0 and ``code`` is
    ``LOST`` when no answer came; ``code`` is "" for a good answer.
    """

    started: float
    ended: float
    status: int
    code: str
    text: str

    @property
    def seconds(self) -> float:
        """From sending to the end of the answer."""
        return self.ended - self.started


class Asker:
    """Asks one server, with a connection for each request in flight; an async context manager."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url

    async def __aenter__(self) -> Asker:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_SECONDS),
            timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT),
            headers={"Content-Type": "application/json"},
        )
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._session.close()

    async def ask(self, body: bytes) -> Reply:
        """Send a chat request and read the whole answer; what goes wrong is in the reply."""
        started = time.monotonic()
        try:
            async with self._session.post(self.base_url + CHAT, data=body) as response:
                status, data = response.status, await response.read()
        except (aiohttp.ClientError, OSError, TimeoutError):
            return Reply(started, time.monotonic(), 0, LOST, "")
        return Reply(started, time.monotonic(), status, *_code_and_text(status, data))

    async def good(self, body: bytes) -> Reply:
        """``ask``; raises RuntimeError unless the answer is good."""
        reply = await self.ask(body)
        if reply.status != 200:
            raise RuntimeError(f"{self.base_url} answered {reply.status} {reply.code} {reply.text}")
        return reply

    async def health(self) -> int:
        """The status of /health; 0 when there is no connection."""
        try:
            async with self._session.get(f"{self.base_url}/health") as response:
                return response.status
        except (aiohttp.ClientError, OSError, TimeoutError):
            return 0

    async def text(self, path: str) -> str:
        """What a GET returns."""
        async with self._session.get(self.base_url + path) as response:
            response.raise_for_status()
            return await response.text()

    async def counters(self) -> dict[str, float]:
        """``read_counters`` of /metrics."""
        return read_counters(await self.text("/metrics"))

    async def model(self) -> str:
        """The first model that the server lists."""
        return str(json.loads(await self.text("/v1/models"))["data"][0]["id"])


def _code_and_text(status: int, data: bytes) -> tuple[str, str]:
    try:
        body = json.loads(data)
        if status == 200:
            return "", str(body["choices"][0]["message"]["content"])
        error = body.get("error") or body
        return str(error.get("code") or ""), str(error.get("message") or "")
    except (ValueError, LookupError, TypeError, AttributeError):
        return "not_json", data[:200].decode(errors="replace")


def image_part(url: str | None, **fields: object) -> dict[str, Any]:
    """The content part of an image; None with a ``uuid`` means one that the server has."""
    return {"type": "image_url", "image_url": None if url is None else {"url": url}, **fields}


def jpeg_url(file: bytes) -> str:
    """A JPEG file as a data: URL."""
    return "data:image/jpeg;base64," + base64.b64encode(file).decode()


def chat_body(
    model: str, text: str, *parts: Mapping[str, Any], max_tokens: int = 1, **fields: object
) -> bytes:
    """The body of a greedy chat request: media parts, then a text."""
    content = [*parts, {"type": "text", "text": text}]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": max_tokens,
        "temperature": 0.0,
        **fields,
    }
    return json.dumps(body).encode()


def counted(values: Iterable[object]) -> Counter[str]:
    """How often each value came, by its text, for JSON."""
    return Counter(map(str, values))


# --- a host of media ------------------------------------------------------------------------------


class MediaHost:
    """An HTTP server on 127.0.0.1 with files to fetch, as a context manager.

    ``fetched`` lists the paths of all requests in the order in which they came.
    """

    def __init__(self) -> None:
        self.fetched: list[str] = []
        self._files: dict[str, tuple[bytes, float]] = {}
        host = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                host.fetched.append(self.path)
                file, delay = host._files[self.path]
                time.sleep(delay)
                self.send_response(200)
                self.send_header("Content-Type", "image/jpeg")
                self.send_header("Content-Length", str(len(file)))
                self.end_headers()
                self.wfile.write(file)

            def log_message(self, format: str, *args: object) -> None:
                """``fetched`` is the log."""

        class Listener(ThreadingHTTPServer):
            request_queue_size = 1024
            daemon_threads = True

        self._server = Listener(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.01,), daemon=True
        )

    def __enter__(self) -> MediaHost:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, path: str, file: bytes, delay: float = 0.0) -> str:
        """Serve ``file`` at ``path``, ``delay`` seconds after it is asked for; returns its URL."""
        self._files[path] = file, delay
        return f"http://127.0.0.1:{self._server.server_port}{path}"
