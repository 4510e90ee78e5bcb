"""What a server is spared when media repeat: processor time of a known image, one fetch for many requests at once, time
to the first token. Each function measures a server that runs, Sensorium's or another engine's; ``media.py`` and
``peers.py`` call them.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.media.load import noisy_jpeg
from sensorium.bench.client import StreamClient
from sensorium.bench.workload import WORDS
from benchmarks.served import (
    Asker,
    MediaHost,
    ServedProcess,
    chat_body,
    image_part,
    jpeg_url,
    rises,
)

WORK = (
    "media_stage_items/decode",
    "media_stage_items/preprocess",
    "mm_encoder_items",
    "media_stage_bytes/decode",
    "media_stage_bytes/preprocess",
    "media_stage_bytes/encode",
)
"""Counters of Sensorium that rise when pixels are made, moved or encoded."""
ONCE = (
    "media_stage_items/fetch",
    "media_stage_items/decode",
    "media_stage_items/preprocess",
    "mm_encoder_items",
)
"""Counters of Sensorium that rise by one for an item, however many requests want it."""
DELAYS = (0.0, 0.3)
"""Seconds after which the media host answers: at once, and when all requests have come long since."""
QUESTION = "What is shown in the picture?"


# --- the processor time of a known image -----------------------------------------------------------------------------


async def known_image(
    server: ServedProcess,
    asker: Asker,
    *,
    size: tuple[int, int],
    num_requests: int,
    rounds: int,
) -> dict[str, Any]:
    """Processor time of a request with an image that the server knows, beside the same one without.

    Requests come one after the other. In each round every form is sent ``num_requests`` times, the order turning round
    with the rounds; ``again`` is the plain text once more, so that its difference to ``text`` shows what the method is
    worth. ``front``: processes that take requests and handle media; ``engine``: the engine's.
    """
    model = await asker.model()
    file = noisy_jpeg(0, *size)
    forms = known_forms(model, jpeg_url(file))
    refused = await _make_known(asker, forms)
    values: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    work: dict[str, dict[str, float | None]] = {}
    for round_ in range(rounds):
        for name in list(forms)[:: 1 if round_ % 2 == 0 else -1]:
            before, counters = server.processor_times(), await asker.counters()
            for _ in range(num_requests):
                await asker.good(forms[name])
            front, engine = server.processor_times().since(before)
            values[name].append((front / num_requests, engine / num_requests))
            work[name] = _added(work.get(name), rises(WORK, counters, await asker.counters()))
    return {
        "image_bytes": len(file),
        "requests_per_round": num_requests,
        **known_summary(values),
        "work": work,
        "refused": refused,
    }


def known_forms(model: str, url: str) -> dict[str, bytes]:
    """The bodies of one request: without an image, with one, with its id only, and without once more."""
    text = chat_body(model, QUESTION)
    return {
        "text": text,
        "image": chat_body(model, QUESTION, image_part(url)),
        "uuid": chat_body(model, QUESTION, image_part(None, uuid="known-image")),
        "again": text,
    }


async def _make_known(asker: Asker, forms: dict[str, bytes]) -> dict[str, str]:
    """Show the image once under its content and once under its id; drops the forms that the server refuses, and
    returns why."""
    with_id = json.loads(forms["image"])
    with_id["messages"][0]["content"][0]["uuid"] = "known-image"
    await asker.good(forms["image"])
    await asker.ask(json.dumps(with_id).encode())
    refused = {}
    for name in list(forms):
        reply = await asker.ask(forms[name])
        if reply.status != 200:
            refused[name] = f"{reply.status} {reply.code}: {reply.text}"
            del forms[name]
    return refused


def known_summary(values: Mapping[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Medians of the rounds in milliseconds per request, and what an item adds to the text: round by round, and the
    median of that."""
    found: dict[str, Any] = {"milliseconds": {}, "added_milliseconds": {}}
    for index, part in enumerate(("front", "engine")):
        rounds = {
            name: [1e3 * pair[index] for pair in pairs] for name, pairs in values.items() if pairs
        }
        medians = {name: statistics.median(each) for name, each in rounds.items()}
        found["milliseconds"][part] = {"median": medians, "rounds": rounds}
        added = {
            name: [with_item - text for with_item, text in zip(each, rounds["text"], strict=True)]
            for name, each in rounds.items()
            if name != "text"
        }
        found["added_milliseconds"][part] = {
            "median": {name: statistics.median(each) for name, each in added.items()},
            "rounds": added,
        }
    return found


def _added(
    total: Mapping[str, float | None] | None, more: Mapping[str, float | None]
) -> dict[str, float | None]:
    if total is None:
        return dict(more)
    return {
        name: None if (sum_ := total[name]) is None or value is None else sum_ + value
        for name, value in more.items()
    }


# --- one URL wanted by many ------------------------------------------------------------------------------------------


async def one_url(
    asker: Asker, host: MediaHost, *, num_requests: int, repeats: int, number: int = 0
) -> list[dict[str, Any]]:
    """Requests for one new URL, all at once, ``repeats`` times for each of ``DELAYS``: how often it was fetched by the
    host's own log, what the counters say, and whether the answers are equal. ``number`` keeps the pictures of several
    calls apart."""
    model = await asker.model()
    found = []
    for repeat in range(repeats):
        for delay in DELAYS:
            number += 1
            file = noisy_jpeg(1_000_000 + number, 640, 480)
            url = host.add(f"/{time.time_ns()}-{number}.jpg", file, delay)
            body = chat_body(model, QUESTION, image_part(url), max_tokens=8)
            num_before, counters = len(host.fetched), await asker.counters()
            started = time.monotonic()
            replies = await asyncio.gather(*(asker.ask(body) for _ in range(num_requests)))
            seconds = time.monotonic() - started
            found.append(
                {
                    "repeat": repeat,
                    "delay_seconds": delay,
                    "fetches_seen_by_host": len(host.fetched) - num_before,
                    "counters": rises(ONCE, counters, await asker.counters()),
                    "statuses": counted(reply.status for reply in replies),
                    "different_answers": len({reply.text for reply in replies}),
                    "seconds": seconds,
                }
            )
    return found


def counted(values: Iterable[object]) -> dict[str, int]:
    """How often each value came, by its text, for JSON."""
    counts: dict[str, int] = {}
    for value in values:
        counts[str(value)] = counts.get(str(value), 0) + 1
    return counts


# --- time to the first token -----------------------------------------------------------------------------------------


async def first_tokens(base_url: str, *, pairs: int, number: int = 0) -> dict[str, Any]:
    """Seconds to the first token of a new 640x480 image, and of the same one with another text, one after the other."""
    first: list[float] = []
    second: list[float] = []
    tokens: list[int] = []
    async with StreamClient(base_url) as client:
        model = await client.first_model()
        for pair in range(pairs):
            image = image_part(jpeg_url(noisy_jpeg(2_000_000 + number + pair, 640, 480)))
            for seconds, word in ((first, WORDS[pair]), (second, WORDS[-pair - 1])):
                body = chat_body(
                    model,
                    f"{word}: {QUESTION}",
                    image,
                    max_tokens=4,
                    stream=True,
                    stream_options={"include_usage": True},
                )
                record = await client.send(body)
                if not record.completed:
                    raise RuntimeError(f"a request failed: {record.error} {record.error_message}")
                seconds.append(record.time_to_first_token or record.end_to_end)
                tokens.append(record.prompt_tokens)
    return {"new_seconds": first, "known_seconds": second, "prompt_tokens": tokens}
