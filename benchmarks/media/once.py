"""One URL that many requests want at once: fetched, decoded and encoded once."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Found, Row, flag
from benchmarks.media.load import noisy_jpeg
from benchmarks.served import (
    QUESTION,
    Asker,
    MediaHost,
    ServerSettings,
    chat_body,
    counted,
    image_part,
    rises,
    sensorium_server,
)

ONCE = (
    "media_stage_items/fetch",
    "media_stage_items/decode",
    "media_stage_items/preprocess",
    "mm_encoder_items",
)
"""Counters of Sensorium that rise by one for an item, however many requests want it."""
DELAYS = (0.0, 0.3)
"""Seconds after which the media host answers: at once, and when all requests have come long
since."""


@dataclass(frozen=True, kw_only=True)
class Settings(ServerSettings):
    """How many requests, and how often."""

    requests: int = flag(100, "at once")
    repeats: int = flag(3, quick=1)


def measure(settings: Settings, folder: Path) -> Found:
    """Start a server, measure ``one_url``, end it."""

    async def serve() -> list[dict[str, Any]]:
        server = sensorium_server(
            settings, folder / "once.log", "--allowed-media-domains", "127.0.0.1"
        )
        async with server, Asker(server.base_url) as asker:
            with MediaHost() as host:
                return await one_url(
                    asker, host, num_requests=settings.requests, repeats=settings.repeats
                )

    runs = asyncio.run(serve())
    rows = []
    for delay in DELAYS:
        chosen = [run for run in runs if run["delay_seconds"] == delay]
        where = f"host answers after {delay * 1e3:g} ms"
        fetches = [run["fetches_seen_by_host"] for run in chosen]
        seconds = statistics.median(run["seconds"] for run in chosen)
        refused = sum(run["statuses"].total() - run["statuses"]["200"] for run in chosen)
        rows.append(Row(f"{where}: fetches by its log", _farthest(fetches), "", 1, 1))
        for name in ONCE:
            values = [run["counters"][name] for run in chosen]
            rows.append(Row(f"{where}: {name}", _farthest(values), "", 1, 1))
        answers = max(run["different_answers"] for run in chosen)
        rows.append(Row(f"{where}: different answers", answers, "", 1, 1))
        rows.append(Row(f"{where}: requests refused", refused, most=0))
        rows.append(Row(f"{where}: until all are answered", seconds, "s"))
    return Found({"runs": runs}, rows)


async def one_url(
    asker: Asker, host: MediaHost, *, num_requests: int, repeats: int, number: int = 0
) -> list[dict[str, Any]]:
    """Requests for one new URL, all at once, ``repeats`` times for each of ``DELAYS``.

    Returns how often it was fetched by the host's own log, what the counters say, and how many
    different answers there were. ``number`` keeps the images of several calls apart.
    """
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


def _farthest(values: Sequence[float | None]) -> float | None:
    """The value that is farthest from one; None when one is not known."""
    known = [value for value in values if value is not None]
    return max(known, key=lambda value: abs(value - 1)) if len(known) == len(values) else None
