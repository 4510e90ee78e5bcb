"""A repeated image: the second request decodes, preprocesses and encodes nothing.

Each pair is two requests with one image that the server has not seen before and different texts.
Measured are both times to the first token, and between them the counters of ``/metrics``.
"""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import Found, Row, Size, flag
from benchmarks.media.load import noisy_jpeg
from benchmarks.served import (
    QUESTION,
    Asker,
    ServerSettings,
    chat_body,
    image_part,
    jpeg_url,
    rises,
    sensorium_server,
)
from sensorium.bench.client import StreamClient
from sensorium.bench.workload import WORDS

WORK = ("media_stage_items/decode", "media_stage_items/preprocess", "mm_encoder_items")
"""Counters of work that an item costs once."""
HITS = ("mm_cache_queries", "mm_cache_hits", "mm_encoder_cache_queries", "mm_encoder_cache_hits")
"""Counters that show how it was saved."""


@dataclass(frozen=True, kw_only=True)
class Settings(ServerSettings):
    """How often, with which images, and the target."""

    image_size: Size = flag(Size(640, 480))
    pairs: int = flag(5, quick=2)
    largest_ratio: float = flag(1.0, "of the second time to the first; 0.1 for a real model")


def measure(settings: Settings, folder: Path) -> Found:
    """Start a server, make all pairs after one that does not count, end it."""

    async def serve() -> dict[str, Any]:
        async with sensorium_server(settings, folder / "cache.log") as server:
            await first_tokens(server.base_url, pairs=1, size=settings.image_size, number=999)
            return await first_tokens(
                server.base_url, pairs=settings.pairs, size=settings.image_size
            )

    found = asyncio.run(serve())
    new, known = (statistics.median(found[f"{kind}_seconds"]) for kind in ("new", "known"))
    rows = [
        Row("first token of a new image", 1e3 * new, "ms"),
        Row("first token of a known image", 1e3 * known, "ms"),
        Row("ratio", known / new, most=settings.largest_ratio),
    ]
    for name in WORK:
        made, repeated = (
            [counters[name] for counters in found[f"{kind}_counters"]] for kind in ("new", "known")
        )
        rows.append(Row(f"{name} of new images, least", _all(min, made), least=1))
        rows.append(Row(f"{name} of known images", _all(sum, repeated), most=0))
    return Found({**found, "ratio": known / new}, rows)


async def first_tokens(
    base_url: str, *, pairs: int, size: Size = Size(640, 480), number: int = 0
) -> dict[str, Any]:
    """Seconds to the first token of a new image, and of the same one with another text, one
    after the other.

    ``number`` keeps the images of several calls apart. Counters that the server does not have are
    None.
    """
    found: dict[str, Any] = {
        f"{kind}_{what}": [] for kind in ("new", "known") for what in ("seconds", "counters")
    }
    tokens: list[int] = []
    async with StreamClient(base_url) as client, Asker(base_url) as asker:
        model = await client.first_model()
        for pair in range(pairs):
            image = image_part(jpeg_url(noisy_jpeg(2_000_000 + number + pair, *size)))
            for kind, word in (("new", WORDS[pair]), ("known", WORDS[-pair - 1])):
                before = await asker.counters()
                body = chat_body(
                    model,
                    f"{word}: {QUESTION}",
                    image,
                    max_tokens=4,
                    ignore_eos=True,
                    stream=True,
                    stream_options={"include_usage": True},
                )
                record = await client.send(body)
                if not record.completed:
                    raise RuntimeError(f"a request failed: {record.error} {record.error_message}")
                found[f"{kind}_seconds"].append(record.time_to_first_token or record.end_to_end)
                counters = rises((*WORK, *HITS), before, await asker.counters())
                found[f"{kind}_counters"].append(counters)
                tokens.append(record.prompt_tokens)
    return {**found, "prompt_tokens": tokens}


def _all(combine: Any, values: list[float | None]) -> float | None:
    return None if None in values else float(combine(values))
