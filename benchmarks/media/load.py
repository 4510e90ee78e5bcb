"""A served model under a load of large pictures: what its event loop, /health and text requests see.

    python load.py
    python load.py --clients 8 --seconds 5 --image-size 1024x1024 -- --num-media-workers 2

Starts ``sensorium serve`` on a free port. A process of its own sends chat requests over ``--clients`` connections, each
with a JPEG that the server has not seen, as a data: URL. Meanwhile short texts are asked for one after the other, and
/health every 20 ms. Read from /metrics: how late the timers of the server's event loop fired. Written as JSON, for the
server at rest and under load: that histogram with its quantiles (upper bounds of buckets), the latencies of /health,
the times to the first token of the texts, and processor seconds of the HTTP process per request. The exit status is 1
when a request failed or the 99th percentile of the loop's lag is above ``--largest-lag``. What follows ``--`` goes to
the server.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import datetime
import io
import json
import math
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import numpy as np
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from sensorium.bench.client import StreamClient
from sensorium.bench.machine import describe_machine
from sensorium.bench.summary import summarize
from sensorium.bench.workload import WORDS, picture
from benchmarks.served import ServedProcess, is_sensorium_engine, processor_seconds

RESULTS = Path(__file__).parent / "results"
LAG = "event_loop_lag_seconds"
HEALTH_SECONDS = 0.02
"""Between two requests for /health."""
LAG_SAMPLE_SECONDS = 0.005
"""Between two samples of the server's lag; finer than the server's own interval, so that a short run has enough."""
NUM_PICTURES = 8
"""Pictures that are drawn; a number in the comment of each copy makes it another file."""
NOISE = (10, 16, 22, 28)
"""Standard deviations of the noise on the pictures, so that 2048x2048 pixels make 1 to 4 MB of JPEG."""

_SERVE = """
import sys
from sensorium.server.http import loop_lag
loop_lag.SAMPLE_SECONDS = float(sys.argv.pop(1))
from sensorium.cli.main import main
sys.exit(main())
"""


# --- the server ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Histogram:
    """``counts[i]`` values were at most ``bounds[i]`` and above the bound before; the last bound is infinite."""

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


def lag_server(
    model: str, flags: list[str], log: Path, *, lag_sample_seconds: float = LAG_SAMPLE_SECONDS
) -> ServedProcess:
    """``sensorium serve MODEL`` with these flags, whose event loop is watched more often than it is by itself."""

    def command(port: int) -> list[str]:
        start = [sys.executable, "-c", _SERVE, str(lag_sample_seconds), "serve", model]
        return [*start, "--port", str(port), "--disable-access-log", *flags]

    return ServedProcess(command, log, is_engine=is_sensorium_engine)


def read_histogram(metrics: str, name: str) -> Histogram:
    """The histogram of that name, without prefix, in the text of /metrics. Raises LookupError when it is not there."""
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


# --- the pictures ----------------------------------------------------------------------------------------------------


def noisy_jpeg(number: int, width: int, height: int) -> bytes:
    """A JPEG file of smooth colours with noise."""
    colours = np.asarray(picture(f"media load {number}", width, height), np.float32)
    noise = np.random.default_rng(number).standard_normal(colours.shape, np.float32)
    noisy = (colours + NOISE[number % len(NOISE)] * noise).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=85)
    return file.getvalue()


class Bodies:
    """Bodies of chat requests with one picture each, all of them different. Their large parts are made once."""

    def __init__(self, model: str, size: tuple[int, int], max_tokens: int) -> None:
        files = [noisy_jpeg(number, *size) for number in range(NUM_PICTURES)]
        self.num_bytes = tuple(map(len, files))
        # A file begins with a marker of two bytes; the comment behind it makes that 30, whose base64 has no padding.
        self._rests = [base64.b64encode(file[2:]) for file in files]
        head, tail = json.dumps(
            {
                "model": model,
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {
                                "type": "image_url",
                                "image_url": {"url": "data:image/jpeg;base64,PICTURE"},
                            },
                            {"type": "text", "text": "What is shown?"},
                        ],
                    }
                ],
                "max_tokens": max_tokens,
            }
        ).split("PICTURE")
        self._head, self._tail = head.encode(), tail.encode()

    def body(self, number: int) -> list[bytes]:
        """The pieces of the body with that number."""
        comment = b"\xff\xd8\xff\xfe\x00\x1a" + b"%024d" % number
        rest = self._rests[number % len(self._rests)]
        return [self._head, base64.b64encode(comment), rest, self._tail]


# --- the clients -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class ImageLoad:
    """Clients that send one picture after the other. ``distinct``: after that many the pictures repeat; 0 is never."""

    base_url: str
    model: str
    num_clients: int
    seconds: float
    size: tuple[int, int]
    max_tokens: int = 4
    distinct: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class ImageResult:
    """Latencies in seconds of the requests that were answered with 200, and how many there were of each status."""

    seconds: list[float]
    statuses: dict[int, int]
    num_body_bytes: int


@contextlib.asynccontextmanager
async def image_load(load: ImageLoad) -> AsyncIterator[asyncio.Task[ImageResult]]:
    """The clients in a process of their own, so that they hold up nobody else's clock. Entered when they begin to send;
    the task ends with them."""
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
    return ImageResult(latencies, dict(statuses), sent[0])


def _numbers(distinct: int) -> Iterator[int]:
    number = int(time.time()) * 1_000_000  # other ones in each run
    first = number
    while True:
        yield number
        number += 1
        if distinct and number == first + distinct:
            number = first


class _Connection:
    """One connection for requests one after the other. It writes pieces as they are: joining megabytes on the client's
    side would cost the cores that are measured."""

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
    """Seconds to the first token of short texts, one after the other, all new. Raises RuntimeError when one fails."""
    seconds, number = [], 0
    async with StreamClient(base_url) as client:
        while not until.is_set():
            text = f"{WORDS[number % len(WORDS)]} {number}: what comes next? {time.time()}"
            body = {
                "model": model,
                "messages": [{"role": "user", "content": text}],
                "max_tokens": 2,
                "stream": True,
            }
            record = await client.send(json.dumps(body).encode())
            if not record.completed:
                raise RuntimeError(f"a text failed: {record.error}: {record.error_message}")
            seconds.append(record.time_to_first_token or record.end_to_end)
            number += 1
            await asyncio.sleep(HEALTH_SECONDS)
    return seconds


async def probe_health(base_url: str, until: asyncio.Event) -> list[float]:
    """Seconds that /health took, asked again and again over one connection. Raises RuntimeError for any other status
    than 200."""
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


# --- the measurement -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
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
            "health_seconds": _summary(self.health_seconds),
            "text_first_token_seconds": _summary(self.text_seconds),
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


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Start the server, watch it at rest, then under load."""
    async with lag_server(options.model, options.flags, options.log) as server:
        async with StreamClient(server.base_url) as client:
            model = await client.first_model()
        load = ImageLoad(
            server.base_url,
            model,
            options.clients,
            options.seconds,
            options.image_size,
            distinct=options.distinct,
        )
        # Imports and first uses are not what is measured.
        async with image_load(dataclasses.replace(load, num_clients=1, seconds=0.5)) as warm_up:
            await warm_up
        rest = await watch(server, model, asyncio.ensure_future(asyncio.sleep(options.seconds / 2)))
        async with image_load(load) as task:
            loaded = await watch(server, model, task)
            result = await task
    num_answered = len(result.seconds)
    return {
        "at_rest": rest.as_dict(),
        "under_load": {
            **loaded.as_dict(),
            "image_seconds": _summary(result.seconds),
            "images_per_second": num_answered / loaded.wall_seconds,
            "body_megabytes_per_second": result.num_body_bytes / 1e6 / loaded.wall_seconds,
            "processor_seconds_per_image": loaded.processor_seconds / max(1, num_answered),
            "statuses": {str(status): count for status, count in result.statuses.items()},
        },
    }


def passed(found: Mapping[str, Any], largest_lag: float) -> bool:
    """Whether all pictures were answered, and the loop was in time."""
    loaded = found["under_load"]
    p99 = loaded["loop_lag_seconds"]["p99"]
    return set(loaded["statuses"]) == {"200"} and p99 is not None and p99 <= largest_lag


def _summary(values: list[float]) -> dict[str, float] | None:
    summary = summarize(values)
    return None if summary is None else {"count": len(values), **dataclasses.asdict(summary)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=20.0, help="of the load")
    parser.add_argument("--image-size", type=_size, default=(2048, 2048), metavar="WxH")
    parser.add_argument("--distinct", type=int, default=0, help="pictures repeat after that many")
    parser.add_argument("--largest-lag", type=float, default=0.01, help="seconds")
    parser.add_argument("--log", type=Path, default=Path("media-load-server.log"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("flags", nargs="*", help="flags of the server, after --")
    options = parser.parse_args()
    found = asyncio.run(measure(options))
    today = datetime.datetime.now(datetime.UTC)
    results = {
        "benchmark": "media_load",
        "date": today.isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "model": Path(options.model).name,
        "image_size": options.image_size,
        "num_clients": options.clients,
        "lag_sample_seconds": LAG_SAMPLE_SECONDS,
        **found,
    }
    output = options.output or RESULTS / f"media-load-{today:%Y-%m-%d}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")
    for name in ("at_rest", "under_load"):
        _print(name.replace("_", " "), found[name])
    ok = passed(found, options.largest_lag)
    print("passed" if ok else "not passed")
    return 0 if ok else 1


def _print(name: str, phase: Mapping[str, Any]) -> None:
    lag, health = phase["loop_lag_seconds"], phase["health_seconds"]
    texts = phase["text_first_token_seconds"]
    print(
        f"{name}: loop late by at most {lag['p50']} s (p50), {lag['p99']} s (p99), {lag['max']} s (all)"
    )
    print(f"  /health {health['p50'] * 1e3:.1f} ms (p50), {health['p99'] * 1e3:.1f} ms (p99)")
    print(f"  first token of a text {texts['p50'] * 1e3:.1f} ms (p50), {texts['p99'] * 1e3:.1f} ms")
    if "images_per_second" in phase:
        print(
            f"  {phase['images_per_second']:.1f} pictures/s, {phase['body_megabytes_per_second']:.1f} MB/s, "
            f"{phase['processor_seconds_per_image'] * 1e3:.1f} ms of the HTTP process each"
        )


if __name__ == "__main__":
    sys.exit(main())
