"""A load of good requests with damaged ones among them: the good ones must not notice."""

from __future__ import annotations

import asyncio
import json
import random
import time
from typing import Any

from sensorium.multimodal.items import MODALITIES
from tests.fuzz import embeddings
from tests.fuzz.campaign import Plan, finish, good_answers
from tests.fuzz.corpus import corpus, kind_of
from tests.fuzz.mutation import mutate
from tests.fuzz.questions import data_url, good_parts, media_part
from tests.fuzz.report import Report
from tests.fuzz.requests import Sent
from tests.fuzz.served import Served, text_of
from tests.fuzz.verdict import what_is_wrong


async def mixed(served: Served, plan: Plan, corrupt: float) -> Report:
    """``plan.num_clients`` clients at the same time.

    A part ``corrupt`` of the requests holds a damaged file, or damaged embeddings.

    Every good request must get the answer that it gets alone.
    """
    report = Report(f"load of {served.name}", plan.num_requests, plan.folder)
    pool = good_parts(served.target.modalities)
    alone = [text_of(await served.chat(*parts)) for parts in pool]
    before = await good_answers(served)
    numbers = iter(range(plan.num_requests))

    async def client() -> None:
        for number in numbers:
            rng = random.Random(plan.seed + number)
            if rng.random() < corrupt:
                await _send(served, _damaged(served, rng), report)
            else:
                which = rng.randrange(len(pool))
                await _send(served, _chat(pool[which]), report, alone[which])
            if number % plan.sample_every == 0:
                served.sample()

    await asyncio.gather(*(client() for _ in range(plan.num_clients)))
    await finish(served, report, before)
    return report


async def _send(served: Served, sent: Sent, report: Report, expected: str | None = None) -> None:
    started = time.monotonic()
    answer = await served.send(sent)
    report.count(answer, time.monotonic() - started)
    if expected is None:
        wrong = what_is_wrong(sent, answer)
    elif answer.status != 200:
        wrong = f"a good request failed: {answer.status} {answer.body[:300]!r} {answer.lost}"
    else:
        said = text_of(answer)
        wrong = "" if said == expected else f"alone the answer was {expected!r}, now {said!r}"
    if wrong:
        report.violation(wrong, sent, answer)


def _damaged(served: Served, rng: random.Random) -> Sent:
    modality = rng.choice(served.target.modalities)
    if modality == "image" and rng.random() < 0.2:
        part = {"type": "image_embeds", "image_embeds": embeddings.payload(rng)}
        return _chat([part, {"type": "text", "text": "What is shown?"}])
    name = rng.choice(sorted(corpus(modality)))
    others = [data for m in MODALITIES for data in corpus(m).values()]
    data = mutate(corpus(modality)[name], rng, others)
    url = data_url(data, kind_of(name, modality))
    return _chat([media_part(modality, url), {"type": "text", "text": "What is shown?"}])


def _chat(parts: list[dict[str, Any]]) -> Sent:
    body = {
        "messages": [{"role": "user", "content": parts}],
        "temperature": 0,
        "max_tokens": 16,
    }
    return Sent("/v1/chat/completions", json.dumps(body).encode(), value=body, what="a chat")
