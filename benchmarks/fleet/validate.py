"""Check of the simulation against real replicas behind Ray Serve.

    python -m benchmarks.fleet.validate [--base-url URL] [--output FILE]

Without an address it serves the demo itself. It sends requests over few images at random times. Before and after, so that a change of the machine
meets both alike, it measures what one request costs when nothing else runs: prompts that are new
and of several lengths, answers, images. Then it simulates the same requests with these costs. What
HTTP, Ray and the client take beside the engines under this load comes from the first requests
(``--warm-up``): what they took beyond the simulated engine. Times are compared of the others alone.

Shown are the share of repeats that meet a replica which has the image, the balance, and hit rates
and times to the first token of both. It takes two minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import dataclasses
import io
import json
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.fleet.engine import EngineShape
from benchmarks.fleet.policies import POLICIES
from benchmarks.fleet.service import StepCosts
from benchmarks.fleet.simulation import Fleet as SimulatedFleet
from benchmarks.fleet.simulation import FleetShape, Outcome
from benchmarks.fleet.traces import Request, Zipf
from benchmarks.harness import Report, Row
from benchmarks.served import ServerSettings, sensorium_server

CHAT = "/v1/chat/completions"
REPORTS_COME = 3.0
"""Seconds until the last reports of replicas are in /metrics."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Times and counts of one streamed answer, in seconds."""

    first: float
    total: float
    prompt_tokens: int
    cached_tokens: int
    tokens: int


class Client:
    """Sends streamed chat requests."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, model: str) -> None:
        self._session, self._base_url, self._model = session, base_url, model

    async def ask(self, text: str, image: str | None = None, max_tokens: int = 8) -> Answer:
        """Ask and read the answer; raises RuntimeError for an error."""
        parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if image is not None:
            parts.insert(0, {"type": "image_url", "image_url": {"url": image}})
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        began, first = time.perf_counter(), None
        usage: dict[str, Any] = {}
        async with self._session.post(self._base_url + CHAT, json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"{response.status} {await response.text()}")
            async for line in response.content:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(str(event["error"]))
                choices = event.get("choices")
                if first is None and choices and choices[0]["delta"].get("content"):
                    first = time.perf_counter() - began
                usage = event.get("usage") or usage
        total = time.perf_counter() - began
        details = usage.get("prompt_tokens_details") or {}
        return Answer(
            total if first is None else first,
            total,
            usage["prompt_tokens"],
            details.get("cached_tokens", 0),
            usage["completion_tokens"],
        )

    async def counters(self) -> dict[str, dict[str, float]]:
        """Counters of /metrics by their name and replica."""
        async with self._session.get(self._base_url + "/metrics") as response:
            text = await response.text()
        found: dict[str, dict[str, float]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.endswith("_total") and "engine" in sample.labels:
                    name = sample.name.partition(":")[2].removesuffix("_total")
                    by_engine = found.setdefault(name, {})
                    engine = sample.labels["engine"]
                    by_engine[engine] = by_engine.get(engine, 0) + sample.value
        return found


def picture(number: int, side: int = 112) -> str:
    """A picture as a data: URL, other ones for other numbers."""
    from PIL import Image

    pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def words(draw: random.Random, count: int) -> str:
    """Words that no prompt had before."""
    return " ".join(draw.choice(("red", "blue", "big", "two", "cat", "sun")) for _ in range(count))


@dataclass(frozen=True, slots=True)
class Measured:
    """Costs of a replica as a client sees them."""

    costs: StepCosts
    image_tokens: int
    head_tokens: int
    tail_tokens: float


@dataclass(slots=True)
class Probes:
    """Answers while nothing else runs, one after the other but for ``both``, which run together.

    ``plain``: to new prompts of several lengths. ``new`` and ``known``: to questions about images,
    asked for the first and the second time.
    """

    plain: list[Answer] = dataclasses.field(default_factory=list)
    new: list[Answer] = dataclasses.field(default_factory=list)
    known: list[Answer] = dataclasses.field(default_factory=list)
    text_only: list[Answer] = dataclasses.field(default_factory=list)
    both: list[Answer] = dataclasses.field(default_factory=list)

    async def ask(self, client: Client, draw: random.Random, rounds: int) -> None:
        """Ask some more."""
        for _ in range(6):  # connections, and what a replica does for the first time
            await client.ask(words(draw, 12), picture(draw.randrange(1 << 30)))
        for count in (8, 60, 200) * rounds:
            self.plain.append(await client.ask(words(draw, count), max_tokens=24))
        for _ in range(3 * rounds):
            image, question = picture((1 << 31) + draw.randrange(1 << 30)), words(draw, 8)
            self.new.append(await client.ask(question, image))
            self.known.append(await client.ask("and " + question, image))
        self.text_only.append(await client.ask(words(draw, 8)))
        together = (client.ask(words(draw, 8), max_tokens=64) for _ in range(8))
        self.both += await asyncio.gather(*together)

    def fit(self) -> Measured:
        """Fit the costs."""
        tokens = np.array([a.prompt_tokens - a.cached_tokens for a in self.plain])
        first = np.array([a.first for a in self.plain])
        per_token = _slope(tokens, first)
        fixed = float(np.median(first - per_token * tokens))
        decode = _decode_seconds(self.plain)
        whole = float(np.median([a.prompt_tokens for a in self.known]))
        new_cost = np.median([a.first - fixed - per_token * a.prompt_tokens for a in self.new])
        head = int(np.median([a.cached_tokens for a in self.known]))
        # A sequence beside another one costs less than a step of its own.
        sequence = max(0.0, (_decode_seconds(self.both) - decode) / 3)
        costs = StepCosts(
            min(decode, fixed), per_token, sequence, 0.0, max(0.0, float(new_cost)), 0.0
        )
        image_tokens = round(whole) - self.text_only[0].prompt_tokens
        return Measured(costs, image_tokens, head, whole - head)


def _decode_seconds(answers: Sequence[Answer]) -> float:
    """Median seconds of a token after the first one."""
    return float(np.median([(a.total - a.first) / (a.tokens - 1) for a in answers]))


def _slope(x: np.ndarray, y: np.ndarray) -> float:
    """Median of the slopes through pairs of points (Theil and Sen)."""
    slopes = [
        (y[j] - y[i]) / (x[j] - x[i])
        for i in range(len(x))
        for j in range(i + 1, len(x))
        if abs(x[j] - x[i]) > 20
    ]
    return max(0.0, float(np.median(slopes)))


def make_requests(options: argparse.Namespace) -> list[tuple[float, int, str]]:
    """Arrival, image and question of each request."""
    draw = random.Random(options.seed)
    image_of = Zipf(options.images, options.zipf, draw)
    now, found = 0.0, []
    for number in range(options.requests):
        now += draw.expovariate(options.rate)
        found.append((now, image_of(), f"{number} {words(draw, 4)}"))
    return found


async def send(
    client: Client, requests: Sequence[tuple[float, int, str]], images: Sequence[str]
) -> list[Answer]:
    """Send the requests at their times; return the answers."""
    began = time.perf_counter()

    async def later(arrival: float, image: int, question: str) -> Answer:
        await asyncio.sleep(max(0.0, began + arrival - time.perf_counter()))
        return await client.ask(question, images[image])

    return list(await asyncio.gather(*(later(*request) for request in requests)))


def simulate(
    requests: Sequence[tuple[float, int, str]],
    answers: Sequence[Answer],
    measured: Measured,
    options: argparse.Namespace,
    policy: str = "ours",
    overhead: float | None = None,
) -> tuple[Outcome, dict[str, float]]:
    """Simulate the same requests; return the outcome, and hit rates and times to the first token.

    ``overhead`` is what is not the engine: the median of what the requests of the warm-up took
    beyond it, with our policy, which the real replicas have.
    """
    trace = []
    for number, ((arrival, image, _), answer) in enumerate(zip(requests, answers, strict=True)):
        head = min(measured.head_tokens, answer.prompt_tokens - 1)
        prompt = ((image, head), (1_000 + 2 * number, answer.prompt_tokens - head))
        media = ((image, measured.image_tokens),)
        trace.append(Request(prompt, media, 1_001 + 2 * number, answer.tokens, arrival))
    shape = FleetShape(options.replicas, options.routers, lag_seconds=0.5, warm_up=0.0)
    outcome = SimulatedFleet(trace, EngineShape(measured.costs), shape, policy).run()
    in_engine = np.array([job.first_token_at - job.sent_at for job in outcome.jobs])
    taken = np.array([answer.first for answer in answers])
    if overhead is None:
        warm_up = slice(0, options.warm_up)
        overhead = max(0.0, float(np.median(taken[warm_up] - in_engine[warm_up])))
    tokens = sum(request.num_tokens for request in trace)
    return outcome, {
        "overhead": overhead,
        "prefix_hit_rate": sum(job.cached for job in outcome.jobs) / tokens,
        "media_hit_rate": sum(job.items_met for job in outcome.jobs) / len(trace),
        **_times((in_engine + overhead)[options.warm_up :]),
        "requests_max_over_mean": outcome.summary()["requests_max_over_mean"],
    }


def _times(first: np.ndarray) -> dict[str, float]:
    """Quantiles of times to the first token, in seconds."""
    return {f"first_token_p{q}": float(np.quantile(first, q / 100)) for q in (50, 90)}


def real_figures(
    answers: Sequence[Answer],
    warm_up: int,
    before: Mapping[str, Mapping[str, float]],
    after: Mapping[str, Mapping[str, float]],
) -> dict[str, float]:
    """The same figures of the real replicas; media and balance from their counters.

    ``warm_up``: answers whose times do not count.
    """

    def grown(name: str) -> list[float]:
        old = before.get(name, {})
        return [value - old.get(engine, 0.0) for engine, value in after.get(name, {}).items()]

    encoded = sum(grown("mm_encoder_cache_queries")) - sum(grown("mm_encoder_cache_hits"))
    looked_up = grown("prefix_cache_queries")
    return {
        "prefix_hit_rate": sum(a.cached_tokens for a in answers)
        / sum(a.prompt_tokens for a in answers),
        "media_hit_rate": 1 - encoded / len(answers),
        **_times(np.array([a.first for a in answers[warm_up:]])),
        "requests_max_over_mean": max(looked_up) * len(looked_up) / max(1.0, sum(looked_up)),
    }


async def validate(options: argparse.Namespace) -> list[Row]:
    """Measure, send, simulate, compare; return the rows of the table."""
    timeout = aiohttp.ClientTimeout(total=120)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        async with session.get(options.base_url + "/v1/models") as response:
            model = (await response.json())["data"][0]["id"]
        client = Client(session, options.base_url, model)
        probes, draw = Probes(), random.Random(17)
        await probes.ask(client, draw, options.rounds)
        requests = make_requests(options)
        images = [picture(options.seed * 1000 + i) for i in range(options.images)]
        await asyncio.sleep(REPORTS_COME)
        before = await client.counters()
        answers = await send(client, requests, images)
        await asyncio.sleep(REPORTS_COME)
        real = real_figures(answers, options.warm_up, before, await client.counters())
        await probes.ask(client, draw, options.rounds)
    measured = probes.fit()
    _, simulated = simulate(requests, answers, measured, options)
    overhead = simulated["overhead"]
    others = {
        policy: simulate(requests, answers, measured, options, policy, overhead)[1]
        for policy in POLICIES
    }
    repeats = len(requests) - len({image for _, image, _ in requests})
    missed = (1 - real["media_hit_rate"]) * len(requests) - (len(requests) - repeats)
    repeats_met = 1 - missed / repeats
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    report = Report("fleet-validation", settings, options.output)
    report.write(
        measured=dataclasses.asdict(measured),
        real=real,
        simulated=simulated,
        policies=others,
        repeats_met=repeats_met,
    )
    bounds = {} if options.busy else {"least": 0.85, "most": 1.15}
    ratio = {name: simulated[name] / real[name] if real[name] else None for name in real}
    return [
        Row("repeats that meet a replica with the image", repeats_met, least=0.95),
        Row("requests of a replica, most over mean", real["requests_max_over_mean"], most=1.3),
        *(Row(f"{name}, real", value) for name, value in real.items()),
        *(Row(f"{name}, simulated", value) for name, value in simulated.items()),
        Row(
            "prefix hit rate, simulated over real", ratio["prefix_hit_rate"], least=0.85, most=1.15
        ),
        Row("media hit rate, simulated over real", ratio["media_hit_rate"], least=0.85, most=1.15),
        Row("first token p50, simulated over real", ratio["first_token_p50"], **bounds),
        Row("first token p90, simulated over real", ratio["first_token_p90"]),
    ]


async def served_and_validated(options: argparse.Namespace) -> list[Row]:
    """Validate against the replicas at an address, or against some that run meanwhile."""
    if options.base_url is not None:
        return await validate(options)
    flags = ["--data-parallel-size", str(options.replicas)]
    flags += ["--api-server-count", str(options.routers)]
    with tempfile.TemporaryDirectory() as folder:
        server = sensorium_server(ServerSettings(), Path(folder) / "log.txt", *flags)
        async with server:
            options.base_url = server.base_url
            return await validate(options)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base-url", help="of replicas that run; unset: it starts some")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--zipf", type=float, default=1.0)
    parser.add_argument("--rate", type=float, default=25.0, help="requests a second")
    parser.add_argument(
        "--warm-up", type=int, default=250, help="requests whose times are for that"
    )
    parser.add_argument("--rounds", type=int, default=2, help="of probes, before and after")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--busy", action="store_true", help="other work runs: compare no times")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if not 0 < options.warm_up < options.requests:
        parser.error("--warm-up must be at least 1 and less than --requests")
    rows = asyncio.run(served_and_validated(options))
    print(*rows, sep="\n")
    raise SystemExit(any(row.missed for row in rows))


if __name__ == "__main__":
    main()
