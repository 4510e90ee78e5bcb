"""Processor time of an image that the server knows, sent as data and by its uuid.

Processor time is the kernel's account of the HTTP process and all processes that handle media,
without the engine's.
"""

from __future__ import annotations

import asyncio
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Found, Row, Size, flag, in_turn
from benchmarks.media.load import noisy_jpeg
from benchmarks.served import (
    QUESTION,
    Asker,
    ServedProcess,
    ServerSettings,
    chat_body,
    image_part,
    jpeg_url,
    rises,
    sensorium_server,
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


@dataclass(frozen=True, kw_only=True)
class Settings(ServerSettings):
    """How often, with which image, and the target."""

    image_size: Size = flag(Size(1024, 1024))
    requests: int = flag(300, "in a round, of each form", quick=40)
    rounds: int = flag(5, quick=2)
    most_item_ms: float = flag(1.0, "of processor time for an item")


def measure(settings: Settings, folder: Path) -> Found:
    """Start a server, measure ``known_image``, end it."""

    async def serve() -> dict[str, Any]:
        async with (
            sensorium_server(settings, folder / "known.log") as server,
            Asker(server.base_url) as asker,
        ):
            return await known_image(
                server,
                asker,
                size=settings.image_size,
                num_requests=settings.requests,
                rounds=settings.rounds,
            )

    found = asyncio.run(serve())
    added = found["added_milliseconds"]["front"]["median"]
    work = [v for form in ("image", "uuid") for v in found["work"].get(form, {"": None}).values()]
    rows = [
        Row(
            "a request without an image",
            found["milliseconds"]["front"]["median"]["text"],
            "ms of CPU",
        ),
        Row("a known image adds", added.get("image"), "ms of CPU", most=settings.most_item_ms),
        Row("a uuid adds", added.get("uuid"), "ms of CPU", most=settings.most_item_ms),
        Row("the same text again adds", added["again"], "ms of CPU"),
        Row("items and bytes decoded … encoded", None if None in work else sum(work), most=0),
    ]
    return Found(found, rows)


async def known_image(
    server: ServedProcess, asker: Asker, *, size: Size, num_requests: int, rounds: int
) -> dict[str, Any]:
    """Processor time of a request with an image that the server knows, beside the same one without.

    Requests come one after the other. In each round every form is sent ``num_requests`` times, the
    order changing with the rounds; ``again`` is the plain text once more, so that its difference to
    ``text`` shows what the method is worth. ``front``: processes that take requests and handle
    media; ``engine``: the engine's.
    """
    model = await asker.model()
    file = noisy_jpeg(0, *size)
    forms = _forms(model, jpeg_url(file))
    refused = await _make_known(asker, forms)
    values: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    work: dict[str, dict[str, float | None]] = {}
    for round_ in range(rounds):
        for name in in_turn(list(forms), round_):
            before, counters = server.processor_times(), await asker.counters()
            for _ in range(num_requests):
                await asker.good(forms[name])
            front, engine = server.processor_times().since(before)
            values[name].append((front / num_requests, engine / num_requests))
            more = rises(WORK, counters, await asker.counters())
            work[name] = _added(work[name], more) if name in work else more
    return {
        "image_bytes": len(file),
        "requests_per_round": num_requests,
        **_summary(values),
        "work": work,
        "refused": refused,
    }


def _forms(model: str, url: str) -> dict[str, bytes]:
    """The bodies of one request.

    Without an image, with one, with its id only, and without once more.
    """
    text = chat_body(model, QUESTION)
    return {
        "text": text,
        "image": chat_body(model, QUESTION, image_part(url)),
        "uuid": chat_body(model, QUESTION, image_part(None, uuid="known-image")),
        "again": text,
    }


async def _make_known(asker: Asker, forms: dict[str, bytes]) -> dict[str, str]:
    """Show the image under its content and under its id.

    Drop the forms that the server refuses, and return why.
    """
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


def _summary(values: Mapping[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """Milliseconds per request by form, and what each form adds to the text.

    Medians, and round by round.
    """
    found: dict[str, Any] = {"milliseconds": {}, "added_milliseconds": {}}
    for index, part in enumerate(("front", "engine")):
        rounds = {
            name: [1e3 * pair[index] for pair in pairs] for name, pairs in values.items() if pairs
        }
        added = {
            name: [with_item - text for with_item, text in zip(each, rounds["text"], strict=True)]
            for name, each in rounds.items()
            if name != "text"
        }
        for kind, series in (("milliseconds", rounds), ("added_milliseconds", added)):
            medians = {name: statistics.median(each) for name, each in series.items()}
            found[kind][part] = {"median": medians, "rounds": series}
    return found


def _added(
    total: Mapping[str, float | None], more: Mapping[str, float | None]
) -> dict[str, float | None]:
    return {
        name: None if (before := total[name]) is None or value is None else before + value
        for name, value in more.items()
    }
