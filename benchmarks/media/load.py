"""A load of large images: what the server's event loop, /health and text requests see beside it.

A process of its own sends chat requests over several connections, each with a JPEG that the
server has not seen, as a data: URL. Meanwhile short texts are asked for one after the other, and
/health every 20 ms. Read from /metrics: how late the timers of the server's event loop fired.
Quantiles of that histogram are upper bounds of buckets.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import io
import math
import multiprocessing
import shlex
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import numpy as np
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.harness import Found, Row, Size, flag, summary
from benchmarks.served import (
    ServedProcess,
    ServerSettings,
    chat_body,
    counted,
    image_part,
    is_sensorium_engine,
    processor_seconds,
)
from sensorium.bench.client import StreamClient
from sensorium.bench.workload import WORDS, random_image

LAG = "event_loop_lag_seconds"
HEALTH_SECONDS = 0.02
"""Between two requests for /health."""
LAG_SAMPLE_SECONDS = 0.005
"""Between two samples of the server's lag; finer than the server's own interval, so that a short
run has enough."""
NUM_PICTURES = 8
"""Pictures that are drawn; a number in the comment of each copy makes it another file."""
NOISE = (10, 16, 22, 28)
"""Standard deviations of the noise on the pictures, so that 2048x2048 pixels make 1 to 4 MB of
JPEG."""

_SERVE = """
import sys
from sensorium.server.http import loop_lag
loop_lag.SAMPLE_SECONDS = float(sys.argv.pop(1))
from sensorium.cli.main import main
sys.exit(main())
"""


@dataclass(frozen=True, kw_only=True)
class Settings(ServerSettings):
    """How many clients send what for how long, and the target."""

    clients: int = flag(32, quick=8)
    seconds: float = flag(20.0, "of the load", quick=3.0)
    image_size: Size = flag(Size(2048, 2048))
    distinct: int = flag(0, "images repeat after that many; 0: never")
    largest_lag: float = flag(0.01, "seconds, 99th percentile")


# --- the server -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Histogram:
    """``counts[i]`` values were at most ``bounds[i]`` and above the bound before.

    The last bound is infinite.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def total(self) -> int:
        """How many values there were."""
        return sum(self.counts)

    def since(self, earlier: Histogram) -> Histogram:
        """What was added after ``earlier``."""
        pairs = zip(self.counts, earlier.counts, strict=True)
        return Histogram(self.bounds, tuple(now - before for now, before in pairs))

    def quantile(self, part: float) -> float:
        """The upper bound of the bucket in which the quantile lies; 0 without values."""
        wanted, reached = math.ceil(part * self.total), 0
        for bound, count in zip(self.bounds, self.counts, strict=True):
            reached += count
            if reached >= wanted:
                return bound if self.total else 0.0
        return self.bounds[-1]

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which knows no infinity."""
        counts = {str(bound): count for bound, count in zip(self.bounds, self.counts, strict=True)}
        quantiles = {"p50": self.quantile(0.5), "p99": self.quantile(0.99), "max": self.quantile(1)}
        return {**{name: _finite(value) for name, value in quantiles.items()}, "counts": counts}


def lag_server(settings: ServerSettings, log: Path) -> ServedProcess:
    """``sensorium serve`` whose event loop is watched more often than it is by itself."""

    def command(port: int) -> list[str]:
        start = [sys.executable, "-c", _SERVE, str(LAG_SAMPLE_SECONDS), "serve", settings.model]
        return [*start, "--port", str(port), "--disable-access-log", *flags]

    flags = shlex.split(settings.server_flags)
    return ServedProcess(command, log, is_engine=is_sensorium_engine)


def read_histogram(metrics: str, name: str) -> Histogram:
    """The histogram of that name, without prefix, in the text of /metrics.

    Raises LookupError when it is not there.
    """
    for family in text_string_to_metric_families(metrics):
        if family.name.rpartition(":")[2] == name:
            upto = {float(s.labels["le"]): int(s.value) for s in family.samples if "le" in s.labels}
            bounds = tuple(sorted(upto))
            below = [0, *(upto[bound] for bound in bounds[:-1])]
            counts = tuple(
                upto[bound] - before for bound, before in zip(bounds, below, strict=True)
            )
            return Histogram(bounds, counts)
    raise LookupError(f"/metrics has no histogram {name!r}")


# --- the pictures ---------------------------------------------------------------------------------


def noisy_jpeg(number: int, width: int, height: int) -> bytes:
    """A JPEG file of smooth colours with noise."""
    colours = np.asarray(random_image(f"media load {number}", width, height), np.float32)
    noise = np.random.default_rng(number).standard_normal(colours.shape, np.float32)
    noisy = (colours + NOISE[number % len(NOISE)] * noise).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=85)
    return file.getvalue()


class Bodies:
    """Bodies of chat requests with one picture each, all of them different.

    Their large parts are made once.
    """

    def __init__(self, model: str, size: tuple[int, int], max_tokens: int) -> None:
        files = [noisy_jpeg(number, *size) for number in range(NUM_PICTURES)]
        self.num_bytes = tuple(map(len, files))
        # A file begins with a marker of two bytes; the comment behind it makes that 30, whose
        # base64 has no padding.
        self._rests = [base64.b64encode(file[2:]) for file in files]
        image = image_part("data:image/jpeg;base64,PICTURE")
        head, tail = chat_body(model, "What is shown?", image, max_tokens=max_tokens).split(
            b"PICTURE"
        )
        self._head, self._tail = head, tail

    def body(self, number: int) -> list[bytes]:
        """The pieces of the body with that number."""
        comment = b"\xff\xd8\xff\xfe\x00\x1a" + b"%024d" % number
        rest = self._rests[number % len(self._rests)]
        return [self._head, base64.b64encode(comment), rest, self._tail]


# --- the clients ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ImageLoad:
    """Clients that send one picture after the other.

    ``distinct``: after that many the pictures repeat; 0 is never.
    """

    base_url: str
    model: str
    num_clients: int
    seconds: float
    size: tuple[int, int]
    max_tokens: int = 4
    distinct: int = 0


@dataclass(frozen=True, slots=True)
class ImageResult:
    """Latencies in seconds of the requests that were answered with 200, and how many there were
    of each status.
    """

    seconds: list[float]
    statuses: Counter[int]
    num_body_bytes: int


@contextlib.asynccontextmanager
async def image_load(load: ImageLoad) -> AsyncIterator[asyncio.Task[ImageResult]]:
    """The clients in a process of their own, so that they hold up nobody else's clock.

    Entered when they begin to send; the task ends with them.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_run_images, args=(load, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        await asyncio.to_thread(ours.recv)  # the pictures are drawn
        ours.send(None)
        task = asyncio.create_task(asyncio.to_thread(ours.recv))
        yield task
        await task
    finally:
        process.terminate()
        await asyncio.to_thread(process.join)


def _run_images(load: ImageLoad, pipe: Any) -> None:
    bodies = Bodies(load.model, load.size, load.max_tokens)
    pipe.send(None)
    pipe.recv()
    pipe.send(asyncio.run(_send_images(load, bodies)))


async def _send_images(load: ImageLoad, bodies: Bodies) -> ImageResult:
    latencies: list[float] = []
    statuses: Counter[int] = Counter()
    numbers = _numbers(load.distinct)
    sent = [0]
    deadline = time.monotonic() + load.seconds

    async def client() -> None:
        async with _Connection(load.base_url) as connection:
            while time.monotonic() < deadline:
                pieces = bodies.body(next(numbers))
                started = time.perf_counter()
                status = await connection.post("/v1/chat/completions", pieces)
                statuses[status] += 1
                sent[0] += sum(map(len, pieces))
                if status == 200:
                    latencies.append(time.perf_counter() - started)

    await asyncio.gather(*(client() for _ in range(load.num_clients)))
    return ImageResult(latencies, statuses, sent[0])


def _numbers(distinct: int) -> Iterator[int]:
    number = int(time.time()) * 1_000_000  # other ones in each run
    first = number
    while True:
        yield number
        number += 1
        if distinct and number == first + distinct:
            number = first


class _Connection:
    """One connection for requests one after the other.

    It writes pieces as they are: joining megabytes on the client's side would cost the cores that
    are measured.
    """

    def __init__(self, base_url: str) -> None:
        self._host, self._port = urlsplit(base_url).hostname, urlsplit(base_url).port

    async def __aenter__(self) -> _Connection:
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port)
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._writer.close()

    async def post(self, path: str, pieces: list[bytes]) -> int:
        """The status of the answer, whose body is read and dropped."""
        length = sum(map(len, pieces))
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
        self._writer.write(head.encode())
        for piece in pieces:
            self._writer.write(piece)
            await self._writer.drain()
        answer = await self._reader.readuntil(b"\r\n\r\n")
        lines = answer.decode("latin-1").split("\r\n")
        fields = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        await self._reader.readexactly(int(fields["content-length"]))
        return int(lines[0].split()[1])


async def ask_texts(base_url: str, model: str, until: asyncio.Event) -> list[float]:
    """Seconds to the first token of short texts, one after the other, all new.

    Raises RuntimeError when one fails.
    """
    seconds, number = [], 0
    async with StreamClient(base_url) as client:
        while not until.is_set():
            text = f"{WORDS[number % len(WORDS)]} {number}: what comes next? {time.time()}"
            body = chat_body(model, text, max_tokens=2, stream=True)
            record = await client.send(body)
            if not record.completed:
                raise RuntimeError(f"a text failed: {record.error}: {record.error_message}")
            seconds.append(record.time_to_first_token or record.end_to_end)
            number += 1
            await asyncio.sleep(HEALTH_SECONDS)
    return seconds


async def probe_health(base_url: str, until: asyncio.Event) -> list[float]:
    """Seconds that /health took, asked again and again over one connection.

    Raises RuntimeError for any other status than 200.
    """
    seconds = []
    async with aiohttp.ClientSession() as session:
        while not until.is_set():
            started = time.perf_counter()
            async with session.get(f"{base_url}/health") as response:
                await response.read()
                if response.status != 200:
                    raise RuntimeError(f"/health answered {response.status}")
            seconds.append(time.perf_counter() - started)
            await asyncio.sleep(HEALTH_SECONDS)
    return seconds


# --- the measurement ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Phase:
    """What was seen from outside and inside during a stretch of time."""

    lag: Histogram
    health_seconds: list[float]
    text_seconds: list[float]
    processor_seconds: float
    wall_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "loop_lag_seconds": self.lag.as_dict(),
            "health_seconds": summary(self.health_seconds),
            "text_first_token_seconds": summary(self.text_seconds),
            "processor_seconds": self.processor_seconds,
            "wall_seconds": self.wall_seconds,
        }


async def watch(server: ServedProcess, model: str, busy: asyncio.Future[Any]) -> Phase:
    """Ask texts and /health until ``busy`` is done."""
    until = asyncio.Event()
    before, used = read_histogram(await server.metrics(), LAG), processor_seconds(server.process_id)
    started = time.monotonic()
    async with asyncio.TaskGroup() as group:
        texts = group.create_task(ask_texts(server.base_url, model, until))
        health = group.create_task(probe_health(server.base_url, until))
        await asyncio.wait((busy,))
        wall, used = time.monotonic() - started, processor_seconds(server.process_id) - used
        until.set()
    lag = read_histogram(await server.metrics(), LAG).since(before)
    return Phase(lag, health.result(), texts.result(), used, wall)


def measure(settings: Settings, folder: Path) -> Found:
    """Start a server, watch it at rest, then under load, end it."""
    found = asyncio.run(_serve(settings, folder / "load.log"))
    rows = []
    for name, most in (("at_rest", None), ("under_load", settings.largest_lag)):
        phase, words = found[name], name.replace("_", " ")
        health, text = phase["health_seconds"], phase["text_first_token_seconds"]
        lag = phase["loop_lag_seconds"]["p99"]
        rows += [
            Row(f"loop's lag {words}, p99 (at most)", lag, "s", most=most),
            Row(f"/health {words}, p50", health["p50"], "s"),
            Row(f"/health {words}, p99", health["p99"], "s"),
            Row(f"text's first token {words}, p50", text["p50"], "s"),
            Row(f"text's first token {words}, p99", text["p99"], "s"),
        ]
    loaded = found["under_load"]
    statuses = loaded["statuses"]
    refused = statuses.total() - statuses["200"] if statuses else None
    rows += [
        Row("images", loaded["images_per_second"], "images/s"),
        Row("data", loaded["body_megabytes_per_second"], "MB/s"),
        Row("HTTP process for an image", 1e3 * loaded["processor_seconds_per_image"], "ms of CPU"),
        Row("images refused", refused, most=0),
    ]
    return Found(found, rows)


async def _serve(settings: Settings, log: Path) -> dict[str, Any]:
    async with lag_server(settings, log) as server:
        async with StreamClient(server.base_url) as client:
            model = await client.first_model()
        load = ImageLoad(
            server.base_url,
            model,
            settings.clients,
            settings.seconds,
            settings.image_size,
            distinct=settings.distinct,
        )
        # Imports and first uses are not what is measured.
        async with image_load(dataclasses.replace(load, num_clients=1, seconds=0.5)) as warm_up:
            await warm_up
        sleep = asyncio.ensure_future(asyncio.sleep(settings.seconds / 2))
        rest = await watch(server, model, sleep)
        async with image_load(load) as task:
            loaded = await watch(server, model, task)
            result = await task
    num_answered = len(result.seconds)
    return {
        "lag_sample_seconds": LAG_SAMPLE_SECONDS,
        "at_rest": rest.as_dict(),
        "under_load": {
            **loaded.as_dict(),
            "image_seconds": summary(result.seconds),
            "images_per_second": num_answered / loaded.wall_seconds,
            "body_megabytes_per_second": result.num_body_bytes / 1e6 / loaded.wall_seconds,
            "processor_seconds_per_image": loaded.processor_seconds / max(1, num_answered),
            "statuses": counted(result.statuses.elements()),
        },
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
