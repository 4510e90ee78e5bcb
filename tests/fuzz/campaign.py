"""Many requests that nobody should send, to a served model."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.memory import NUM_SAMPLES, WARM_UP, growth
from tests.fuzz.questions import good_parts
from tests.fuzz.report import Report
from tests.fuzz.requests import RequestMaker, Sent
from tests.fuzz.served import Served, text_of
from tests.fuzz.verdict import what_is_wrong

_ABANDONED = 0.02
"""Part of the requests whose client leaves before the answer."""
_FEWEST_BETWEEN_SAMPLES = 12


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of it: requests, clients that send them at the same time, the seed that decides
    all of them.
    """

    num_requests: int
    num_clients: int
    seed: int
    folder: Path

    @property
    def sample_every(self) -> int:
        """Requests from one sample of memory to the next."""
        return max(self.num_requests // NUM_SAMPLES, _FEWEST_BETWEEN_SAMPLES)


async def fuzz(served: Served, plan: Plan) -> Report:
    """Send ``plan.num_requests`` requests and judge the answers.

    The same good requests come first and last.

    After the warm-up come requests that came before: then memory has no reason to grow any more.
    """
    report = Report(f"requests to {served.name}", plan.num_requests, plan.folder)
    before = await good_answers(served)
    numbers = iter(range(plan.num_requests))
    num_different = math.ceil(plan.num_requests * WARM_UP)
    served.sample()

    async def client() -> None:
        for number in numbers:
            await _one(served, plan.seed + number % num_different, report)
            if number % plan.sample_every == 0:
                served.sample()

    await asyncio.gather(*(client() for _ in range(plan.num_clients)))
    await finish(served, report, before)
    return report


async def _one(served: Served, seed: int, report: Report) -> None:
    rng = random.Random(seed)
    sent = RequestMaker(served.target, rng).make()
    if rng.random() < _ABANDONED:
        await served.abandon(sent, rng.random() * 0.2)
        return
    started = time.monotonic()
    answer = await served.send(sent)
    report.count(answer, time.monotonic() - started)
    wrong = what_is_wrong(sent, answer)
    if wrong:
        report.violation(f"seed {seed}: {wrong}", sent, answer)


async def good_answers(served: Served) -> list[str]:
    """What the model says to the good requests, one after the other."""
    return [
        text_of(await served.chat(*parts)) for parts in good_parts(served.target.modalities)[::3]
    ]


async def finish(served: Served, report: Report, before: list[str]) -> None:
    """Compare what the server says and holds now with what it said and held."""
    after = await good_answers(served)
    if after != before:
        report.violation(f"the first answers were {before}, the last ones are {after}")
    grown = growth(served.samples)
    report.notes += [str(each) for each in grown]
    report.memory = [dataclasses.asdict(sample) for sample in served.samples]
    for each in grown:
        if each.too_much:
            report.violation(f"it grows: {each}")
    for line in served.surprises()[:5]:
        report.violation(f"the server's log has: {line}")
    health = await served.send(Sent("/health", b"", "GET", {}))
    if health.status != 200:
        report.violation(f"/health says {health.status} at the end")
