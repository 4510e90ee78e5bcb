"""Load on a server: arrivals and concurrency of requests."""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sensorium.bench.client import RequestRecord, StreamClient
from sensorium.bench.workload import RandomWorkload
from sensorium.bounds import Bounds
from sensorium.config.fields import check_number
from sensorium.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """Arrival of requests.

    Attributes:
        num_prompts: number of requests.
        output_len: length of an answer in tokens.
        request_rate: mean arrivals per second of a Poisson process; infinite sends all at once.
        concurrency: maximum number of requests in flight; None is unlimited.
        leave_fraction: fraction of the clients that disconnect before the middle of their answer.
        seed: of arrivals and of the clients that disconnect.
    """

    num_prompts: int
    output_len: int
    request_rate: float = math.inf
    concurrency: int | None = None
    leave_fraction: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the values. Raises ConfigError."""
        check_number("num_prompts", self.num_prompts, Bounds(ge=1))
        check_number("output_len", self.output_len, Bounds(ge=1))
        if self.concurrency is not None:
            check_number("concurrency", self.concurrency, Bounds(ge=1))
        check_number("leave_fraction", self.leave_fraction, Bounds(ge=0, le=1), float)
        if not self.request_rate > 0:
            raise ConfigError(
                f"request_rate must be above 0, got {self.request_rate:g}.", param="request_rate"
            )

    def arrivals(self) -> list[float]:
        """Return the time at which each request is sent, in seconds after the start."""
        if math.isinf(self.request_rate):
            return [0.0] * self.num_prompts
        generator = random.Random(f"{self.seed}/arrivals")
        now, times = 0.0, []
        for _ in range(self.num_prompts):
            times.append(now)
            now += generator.expovariate(self.request_rate)
        return times

    def leaves(self) -> list[int | None]:
        """Return for each request the chunks until its client disconnects, or None."""
        generator = random.Random(f"{self.seed}/leaves")
        leaving = set(
            generator.sample(range(self.num_prompts), round(self.leave_fraction * self.num_prompts))
        )
        most = max(1, self.output_len // 2)
        return [
            generator.randint(1, most) if index in leaving else None
            for index in range(self.num_prompts)
        ]


@dataclass(slots=True)
class LoadResult:
    """Records of all requests, and the seconds from the first request to the last end."""

    records: list[RequestRecord]
    seconds: float
    error_messages: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.error_messages = {r.error: r.error_message for r in reversed(self.records) if r.error}

    @property
    def errors(self) -> dict[str, int]:
        """Number of failed requests by code."""
        codes = [record.error for record in self.records if record.error is not None]
        return {code: codes.count(code) for code in sorted(set(codes))}


def chat_body(
    workload: RandomWorkload, index: int, model: str, output_len: int, extra: dict[str, Any]
) -> bytes:
    """Return the JSON of one streamed chat request; ``extra`` fields override its own."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": workload.content(index)}],
        "max_tokens": output_len,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        **extra,
    }
    return json.dumps(body).encode()


async def run_load(
    client: StreamClient,
    bodies: Sequence[bytes],
    plan: LoadPlan,
    on_end: Callable[[RequestRecord], None] | None = None,
) -> LoadResult:
    """Send the bodies as planned and wait for all answers; ``on_end`` is called with each record.

    Waiting for ``concurrency`` does not count as a request's latency.
    """
    places = asyncio.Semaphore(plan.concurrency or len(bodies))
    start = time.perf_counter()

    async def one(body: bytes, arrival: float, leave_after: int | None) -> RequestRecord:
        await asyncio.sleep(max(0.0, start + arrival - time.perf_counter()))
        async with places:
            record = await client.send(body, leave_after=leave_after)
        if on_end is not None:
            on_end(record)
        return record

    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(one(*request))
            for request in zip(bodies, plan.arrivals(), plan.leaves(), strict=True)
        ]
    records = [task.result() for task in tasks]
    first = min(record.start_time for record in records)
    return LoadResult(records, max(record.end_time for record in records) - first)
