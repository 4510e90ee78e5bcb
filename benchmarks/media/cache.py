"""A repeated image against a served model: the second request decodes, preprocesses and encodes nothing.

    python media_cache.py --model demo
    python media_cache.py --model FOLDER --image-size 640x480 --pairs 5 -- --num-threads 2

Starts ``sensorium serve`` on a free port. Each pair is two requests with one image that the server has not seen before
and different texts; between them the counters of ``/metrics`` are read. Written as JSON: the medians of both times to
the first token, their ratio, and how often each counter rose. The exit status is 1 when a counter did not rise in a
first request or did in a second one, or when the ratio of the medians is above 0.1. What follows ``--`` goes to the
server.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import datetime
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from sensorium.bench.client import RequestRecord, StreamClient
from sensorium.bench.machine import describe_machine
from sensorium.bench.workload import WORDS, data_url, picture
from benchmarks.served import Asker, chat_body, image_part, sensorium_server

RESULTS = Path(__file__).parent / "results"
LARGEST_RATIO = 0.1
WORK = ("media_stage_items/decode", "media_stage_items/preprocess", "mm_encoder_items")
"""Counters of work that an item costs once."""
TAKEN = ("mm_cache_queries", "mm_cache_hits", "mm_encoder_cache_queries", "mm_encoder_cache_hits")
"""Counters that show how it was saved."""


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """Two requests with one image: seconds to the first token, and how much each counter rose."""

    first_seconds: float
    second_seconds: float
    first_counters: dict[str, float]
    second_counters: dict[str, float]
    prompt_tokens: int
    cached_tokens: int


async def measure(options: argparse.Namespace) -> list[Pair]:
    """Start the server and make all pairs, after one that does not count."""
    async with (
        sensorium_server(options.model, options.flags, options.log) as server,
        Asker(server.base_url) as asker,
        StreamClient(server.base_url) as client,
    ):
        model = await client.first_model()
        pairs = [
            await _pair(asker, client, model, number, options)
            for number in range(options.pairs + 1)
        ]
    return pairs[1:]


async def _pair(
    asker: Asker, client: StreamClient, model: str, number: int, options: argparse.Namespace
) -> Pair:
    url = data_url(picture(f"media cache {number}", *options.image_size))
    before = await _counters(asker)
    first = await _ask(client, model, url, f"What is shown in picture {number}? {WORDS[number]}")
    between = await _counters(asker)
    second = await _ask(client, model, url, f"{WORDS[-number - 1]}: which colours has it?")
    after = await _counters(asker)
    return Pair(
        first_seconds=first.time_to_first_token or first.end_to_end,
        second_seconds=second.time_to_first_token or second.end_to_end,
        first_counters=_difference(before, between),
        second_counters=_difference(between, after),
        prompt_tokens=second.prompt_tokens,
        cached_tokens=second.cached_tokens,
    )


async def _counters(asker: Asker) -> dict[str, float]:
    """``WORK`` and ``TAKEN``. Raises RuntimeError when the server does not count the work."""
    counters = await asker.counters()
    missing = set(WORK) - set(counters)
    if missing:
        raise RuntimeError(f"/metrics has no {', '.join(sorted(missing))}")
    return {name: counters[name] for name in (*WORK, *TAKEN) if name in counters}


async def _ask(client: StreamClient, model: str, url: str, text: str) -> RequestRecord:
    body = chat_body(
        model,
        text,
        image_part(url),
        max_tokens=4,
        ignore_eos=True,
        stream=True,
        stream_options={"include_usage": True},
    )
    record = await client.send(body)
    if not record.completed:
        raise RuntimeError(f"a request failed: {record.error}: {record.error_message}")
    return record


def _difference(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    return {name: after[name] - before.get(name, 0.0) for name in after}


def summary(pairs: list[Pair]) -> dict[str, Any]:
    """Medians, their ratio, and what the second requests cost."""
    first = statistics.median(pair.first_seconds for pair in pairs)
    second = statistics.median(pair.second_seconds for pair in pairs)
    made = {name: min(pair.first_counters[name] for pair in pairs) for name in WORK}
    repeated = {name: sum(pair.second_counters[name] for pair in pairs) for name in WORK}
    return {
        "first_ttft_seconds": first,
        "second_ttft_seconds": second,
        "ratio": second / first,
        "least_work_of_a_first_request": made,
        "work_of_second_requests": repeated,
        "passed": all(made.values())
        and not any(repeated.values())
        and second <= LARGEST_RATIO * first,
        "pairs": [dataclasses.asdict(pair) for pair in pairs],
    }


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    return int(width), int(height)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--image-size", type=_size, default=(640, 480), metavar="WxH")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--log", type=Path, default=Path("media-cache-server.log"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("flags", nargs="*", help="flags of the server, after --")
    options = parser.parse_args()
    found = summary(asyncio.run(measure(options)))
    today = datetime.datetime.now(datetime.UTC)
    results = {
        "benchmark": "media_cache",
        "date": today.isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "model": Path(options.model).name,
        "image_size": options.image_size,
        **found,
    }
    output = options.output or RESULTS / f"media-cache-{today:%Y-%m-%d}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"first token: {found['first_ttft_seconds'] * 1e3:.1f} ms, with the image known")
    print(f"             {found['second_ttft_seconds'] * 1e3:.1f} ms; ratio {found['ratio']:.3f}")
    print(f"work of a first request, at least: {found['least_work_of_a_first_request']}")
    print(f"work of all second requests: {found['work_of_second_requests']}")
    print("passed" if found["passed"] else "not passed")
    return 0 if found["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
