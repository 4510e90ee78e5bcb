"""What Ray costs: streaming clients on one server, and on replicas behind Ray Serve.

    python -m benchmarks.replicas [--clients 16] [--seconds 12] [--replicas 2] [--output FILE]

Both serve the demo. Each client sends a new streamed request as soon as its last one has ended.
CPU time is that of the kernel: of the engines' processes, and of all others that the server has
started, Ray's among them. The clients compete with the server for the cores. Replicas of a machine
share its cores, so on few cores this measures the price of Ray and not the gain of replicas.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.harness import Report, flag, settings_from_flags
from benchmarks.served import ServerSettings, sensorium_server

PROMPT = "Describe the picture in a few words, number "


@dataclass(frozen=True, slots=True)
class Settings:
    """How many clients ask for how long, and for what."""

    clients: int = flag(16, "streaming clients", quick=2)
    seconds: float = flag(12.0, "time of each load", quick=1.0)
    replicas: int = flag(2, "replicas beside the single server")
    tokens: int = flag(48, "tokens of an answer", quick=4)


async def measure(settings: Settings, flags: list[str], folder: Path) -> dict[str, float]:
    """The figures of one server."""
    server = sensorium_server(ServerSettings(), folder / "log.txt", *flags)
    began = time.monotonic()
    async with server:
        start = time.monotonic() - began
        await load(server.base_url, settings, 1.0)
        before = server.processor_times()
        seconds = time.monotonic()
        latencies, num_tokens = await load(server.base_url, settings, settings.seconds)
        seconds = time.monotonic() - seconds
        front, engine = server.processor_times().since(before)
    latencies.sort()
    return {
        "start_seconds": start,
        "requests_per_second": len(latencies) / seconds,
        "tokens_per_second": num_tokens / seconds,
        "median_seconds": latencies[len(latencies) // 2],
        "front_cpu_ms_per_token": 1e3 * front / num_tokens,
        "engine_cpu_ms_per_token": 1e3 * engine / num_tokens,
    }


async def load(url: str, settings: Settings, seconds: float) -> tuple[list[float], int]:
    """Seconds of each request that ended, and the number of their tokens."""
    latencies: list[float] = []
    end = time.monotonic() + seconds

    async def client(number: int, session: aiohttp.ClientSession) -> None:
        turn = 0
        while time.monotonic() < end:
            began = time.monotonic()
            body = {"model": "demo", "prompt": f"{PROMPT}{number}.{turn}", "stream": True}
            body |= {"max_tokens": settings.tokens, "ignore_eos": True}
            async with session.post(f"{url}/v1/completions", json=body) as answer:
                last = [line async for line in answer.content if line.strip()][-1]
            assert last.strip() == b"data: [DONE]", last
            latencies.append(time.monotonic() - began)
            turn += 1

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(client(number, session) for number in range(settings.clients)))
    return latencies, len(latencies) * settings.tokens


def main() -> int:
    """Measure both and write the report."""
    settings, output = settings_from_flags(Settings, __doc__)
    report = Report("replicas", asdict(settings), output)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in (
            ("one server", []),
            ("replicas", ["--data-parallel-size", str(settings.replicas)]),
        ):
            found[name] = asyncio.run(measure(settings, flags, Path(folder)))
            print(name, json.dumps(found[name]), flush=True)
            report.write(servers=found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
