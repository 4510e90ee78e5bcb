"""Many streaming clients on one server for a long time: errors, memory, latency, CPU by place.

    python -m benchmarks.clients [--clients 256] [--seconds 600] [--py-spy PATH] [--output FILE]

A server of the demo is started. Each client sends a new streamed request as soon as its last one
has ended. Memory is the proportional set size of all processes of the server, every few seconds. The
KV cache is small, so that it is full within the first minute: its pages are taken as they are first
written, and cached prefixes fill it.
CPU time is that of the kernel for each process; with ``--py-spy`` (a program of its own) the
HTTP process is sampled in the middle of the run, and its time is divided by what its Python code
was doing. The clients take CPU time, too: on few cores they compete with the server.

The exit status is 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.harness import Found, Report, Row, add_flags, flag, settings_of, summary
from benchmarks.served import ServedProcess, ServerSettings, sensorium_server
from sensorium.bench.client import RequestRecord, StreamClient
from sensorium.bench.load import chat_body
from sensorium.bench.workload import RandomWorkload

SETTLED_SECONDS = 60.0
"""Time after which memory must stay flat: caches have filled, each code path was taken."""
PLACES = {
    "json": ("/json/", "/pydantic", "/msgspec", "server/payload.py", "pydantic_core"),
    "http": (
        *("/uvicorn/", "/h11/", "/starlette/", "/fastapi/", "server/http/", "asyncio/selector_"),
        *("asyncio/sslproto", "server/routes/", "server/openai/", "server/access_log.py"),
    ),
    "engine messages": ("/zmq/", "engine/serving/", "engine/wire.py"),
    "text": ("engine/outputs/", "/text/", "/tokenizers/", "/jinja2/"),
    "prompts": ("engine/prompts/", "/multimodal/"),
}
"""Parts of file names by what code in them does; the innermost frame that is known counts."""


@dataclass(frozen=True, kw_only=True)
class Settings(ServerSettings):
    """The load, and what is watched."""

    clients: int = flag(256, "requests in flight", quick=8)
    seconds: float = flag(600.0, "time of the measurement", quick=5.0)
    max_tokens: int = flag(64, "tokens of an answer", quick=8)
    input_len: int = flag(32, "words of a prompt", quick=8)
    sample_seconds: float = flag(2.0, "time between two samples of memory", quick=0.5)
    kv_cache_mib: int = flag(64, "size of the KV cache in MiB")
    py_spy: str = flag("", "path of py-spy, which samples the HTTP process; not sampled if empty")
    spy_seconds: float = flag(60.0, "time of that sampling", quick=2.0)


@dataclass(slots=True)
class Watch:
    """Samples of a run: seconds since its start, and MiB of each kind of process."""

    times: list[float] = field(default_factory=list)
    memory: list[dict[str, float]] = field(default_factory=list)

    def settled(self) -> list[float]:
        """Return the whole memory of each sample after ``SETTLED_SECONDS``, else of the last half."""
        after = min(SETTLED_SECONDS, self.times[-1] / 2)
        pairs = zip(self.times, self.memory, strict=True)
        return [sum(sizes.values()) for when, sizes in pairs if when >= after]

    def growth(self) -> float:
        """Return by how many percent memory grew: the last fifth beside the first, medians."""
        values = self.settled()
        size = max(1, len(values) // 5)
        first, last = statistics.median(values[:size]), statistics.median(values[-size:])
        return 100 * (last / first - 1)


async def measure(settings: Settings, folder: Path) -> Found:
    """Run the load and return all figures."""
    size = str(settings.kv_cache_mib << 20)
    server = sensorium_server(settings, folder / "server.log", "--kv-cache-memory-bytes", size)
    async with server, StreamClient(server.base_url) as client:
        model = await client.first_model()
        await _load(client, model, settings, min(5.0, settings.seconds), seed=1)
        before, start = server.processor_times(), time.monotonic()
        watching = asyncio.create_task(_watch(server, settings))
        spying = asyncio.create_task(_spy(server.process_id, settings, folder))
        records = await _load(client, model, settings, settings.seconds)
        seconds = time.monotonic() - start
        used = server.processor_times().since(before)
        watch, stacks = await watching, await spying
        lives = server.tree.alive
    return _found(records, seconds, used, watch, stacks, lives)


async def _load(
    client: StreamClient, model: str, settings: Settings, seconds: float, seed: int = 0
) -> list[RequestRecord]:
    """Let all clients ask until the time is over; return the records of all requests."""
    workload = RandomWorkload(input_len=settings.input_len, seed=seed)
    records: list[RequestRecord] = []
    end = time.monotonic() + seconds
    extra = {"ignore_eos": True}

    async def one(number: int) -> None:
        index = number
        while time.monotonic() < end:
            body = chat_body(workload, index, model, settings.max_tokens, extra)
            records.append(await client.send(body))
            index += settings.clients

    async with asyncio.TaskGroup() as group:
        for number in range(settings.clients):
            group.create_task(one(number))
    return records


async def _watch(server: ServedProcess, settings: Settings) -> Watch:
    """Sample the memory of the server's processes for as long as the measurement takes."""
    watch, start = Watch(), time.monotonic()
    while (now := time.monotonic() - start) < settings.seconds:
        sizes = await asyncio.to_thread(_sizes, server)
        watch.times.append(now)
        watch.memory.append(sizes)
        await asyncio.sleep(settings.sample_seconds)
    return watch


def _sizes(server: ServedProcess) -> dict[str, float]:
    """Return the proportional set size in MiB of the HTTP process, the engine and all others."""
    engines = {process.pid for process in server.engines()}
    sizes = {"http": 0.0, "engine": 0.0, "media": 0.0}
    for process in server.tree.processes():
        with contextlib.suppress(psutil.Error):
            kind = "engine" if process.pid in engines else "media"
            kind = "http" if process.pid == server.process_id else kind
            sizes[kind] += process.memory_full_info().pss / (1 << 20)
    return sizes


async def _spy(process_id: int, settings: Settings, folder: Path) -> Counter[str]:
    """Sample the HTTP process in the middle of the measurement; return samples by place."""
    if not settings.py_spy:
        return Counter()
    seconds = min(settings.spy_seconds, settings.seconds / 2)
    await asyncio.sleep((settings.seconds - seconds) / 2)
    output = folder / "stacks.txt"
    command = [settings.py_spy, "record", "--pid", str(process_id), "--format", "raw"]
    command += ["--duration", str(max(1, round(seconds))), "--rate", "200", "--nonblocking"]
    command += ["--full-filenames", "--output", str(output)]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"py-spy failed: {done.stderr.strip()}")
    return places_of(output.read_text(encoding="utf-8").splitlines())


def places_of(lines: Iterable[str]) -> Counter[str]:
    """Return the number of samples by place, from stacks in py-spy's raw format."""
    found: Counter[str] = Counter()
    for line in lines:
        stack, _, number = line.rpartition(" ")
        found[place_of(stack.split(";"))] += int(number)
    return found


def place_of(frames: Sequence[str]) -> str:
    """Return what a stack was doing: the place of its innermost frame that is known."""
    for frame in reversed(frames):
        for place, parts in PLACES.items():
            if any(part in frame for part in parts):
                return place
    return "other"


def _found(
    records: Sequence[RequestRecord],
    seconds: float,
    used: tuple[float, float],
    watch: Watch,
    stacks: Counter[str],
    lives: bool,
) -> Found:
    good = [record for record in records if record.completed]
    errors = Counter(record.error for record in records if record.error is not None)
    first = [time for r in good if (time := r.time_to_first_token) is not None]
    gaps = [gap for record in good for gap in record.inter_chunk_times]
    tokens = sum(record.completion_tokens for record in good)
    front, engine = used
    total = front + engine
    shares = {place: count / stacks.total() for place, count in stacks.most_common()}
    http = sum(shares.get(place, 0.0) for place in ("http", "json"))
    values = {
        "seconds": seconds,
        "requests": len(records),
        "errors": dict(errors),
        "error_messages": {r.error: r.error_message for r in records if r.error},
        "server_lives": lives,
        "tokens_per_second": tokens / seconds,
        "time_to_first_token": summary(first),
        "between_chunks": summary(gaps),
        "cpu_seconds": {"http_and_media": front, "engine": engine},
        "http_process_by_place": shares,
        "http_and_json_share": http * front / total if stacks else None,
        "memory": [
            {"seconds": when, **sizes}
            for when, sizes in zip(watch.times, watch.memory, strict=True)
        ],
        "memory_growth_percent": watch.growth(),
    }
    return Found(values, list(_rows(values)))


def _rows(values: dict[str, Any]) -> Iterator[Row]:
    first, gaps = values["time_to_first_token"], values["between_chunks"]
    memory = values["memory"][-1]
    cpu = values["cpu_seconds"]
    yield Row("requests", values["requests"])
    yield Row("errors", sum(values["errors"].values()), most=0)
    yield Row("tokens per second", values["tokens_per_second"], "tokens/s")
    for percent in ("p50", "p99"):
        yield Row(f"time to first token, {percent}", first[percent], "s")
    for percent in ("p50", "p99"):
        yield Row(f"between two chunks, {percent}", gaps[percent], "s")
    yield Row("memory at the end", sum(memory.values()) - memory["seconds"], "MiB")
    yield Row("memory: last fifth beside the first", values["memory_growth_percent"], "%", most=2.0)
    yield Row("CPU time of the engine", cpu["engine"], "s")
    yield Row("CPU time of all other processes", cpu["http_and_media"], "s")
    if values["http_and_json_share"] is not None:
        yield Row("HTTP and JSON, part of all CPU time", values["http_and_json_share"], most=0.15)


def main() -> int:
    """Measure, print the table and write the result; return 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_flags(parser, [Settings])
    parser.add_argument("--quick", action="store_true", help="a trial of seconds")
    parser.add_argument("--output", type=Path, help="file of the results")
    options = parser.parse_args()
    settings = settings_of(Settings, options, quick=options.quick)
    shown = {**dataclasses.asdict(settings), "py_spy": bool(settings.py_spy)}
    report = Report("clients", shown, options.output)
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(settings, Path(folder)))
    missed = [row.name for row in found.rows if row.missed]
    report.write(**found.values, missed=missed)
    print(*found.rows, sep="\n")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
