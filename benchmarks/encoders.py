"""Gaps in a stream while clips are encoded: by its engine, and by an encoder apart.

    python -m benchmarks.encoders [--clips 8] [--output FILE]

Both serve the demo on Ray, with one engine. One client streams text without an end; another sends a
new clip, with a pause after each. The longest gap between two tokens of the stream while a clip is
on its way is compared with the gaps when none is. On few cores the encoder competes with the engine
for them, and both with the clients.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.harness import Report, flag, settings_from_flags
from benchmarks.media.video import make_clip
from benchmarks.served import CHAT, ServerSettings, sensorium_server

PAUSE_SECONDS = 1.0
SIDES = {
    "engine": ("--autoscale", "1:1"),
    "apart": ("--autoscale", "1:1", "--encoder-replicas", "1"),
}
MARKS = ("encoder_replica_items", "encoder_fallback_items", 'stage="encode"')


@dataclass(frozen=True, slots=True)
class Settings:
    """How many clips of which size are encoded."""

    clips: int = flag(8, "clips, one after the other", quick=1)
    seconds: int = flag(12, "length of a clip", quick=2)
    side: int = flag(224, "width and height of a clip")


async def stream(url: str, session: aiohttp.ClientSession, times: list[float]) -> None:
    """Stream tokens for ever, and note when each comes; infinity between two answers."""
    body = {"model": "demo", "prompt": "Count", "stream": True, "max_tokens": 1500}
    # The demo soon ends its answer, again and again: each end has a text then.
    body["skip_special_tokens"] = False
    while True:
        async with session.post(f"{url}/v1/completions", json={**body, "ignore_eos": True}) as got:
            async for line in got.content:
                # Not extend with a comprehension: a cancelled one would add nothing.
                times += [time.monotonic()] if line.strip() else []
        times.append(float("inf"))


async def encoded(url: str, session: aiohttp.ClientSession, clip: str) -> tuple[float, float]:
    """Ask about a clip; times of the question and of the answer."""
    parts = [
        {"type": "video_url", "video_url": {"url": clip}},
        {"type": "text", "text": "What moves?"},
    ]
    body = {"model": "demo", "max_tokens": 1, "messages": [{"role": "user", "content": parts}]}
    began = time.monotonic()
    async with session.post(f"{url}{CHAT}", json=body) as answer:
        assert answer.status == 200, await answer.text()
    return began, time.monotonic()


async def measure(flags: tuple[str, ...], clips: list[str], folder: Path) -> dict[str, Any]:
    """The figures of one server."""
    server = sensorium_server(ServerSettings(), folder / "log.txt", *flags)
    times: list[float] = []
    async with server, aiohttp.ClientSession() as session:
        await encoded(server.base_url, session, clips[0])
        streaming = asyncio.create_task(stream(server.base_url, session, times))
        spans = []
        for clip in clips[1:]:
            await asyncio.sleep(PAUSE_SECONDS)
            spans.append(await encoded(server.base_url, session, clip))
        streaming.cancel()
        lines = (await server.metrics()).splitlines()
    gaps = [(a, b) for a, b in itertools.pairwise(times) if abs(b - a) < float("inf")]
    beside = [
        max([b - a for a, b in gaps if b > begin and a < end], default=0.0) for begin, end in spans
    ]
    alone = sorted(b - a for a, b in gaps if not any(b > s and a < e for s, e in spans))
    return {
        "clip_seconds": statistics.median(end - begin for begin, end in spans),
        "longest_gap_beside_a_clip": statistics.median(beside),
        "longest_gaps": beside,
        "gap_alone_median": statistics.median(alone),
        "gap_alone_p99": alone[int(0.99 * len(alone))],
        "counters": [li for li in lines if li[:1] != "#" and any(mark in li for mark in MARKS)],
    }


def main() -> int:
    """Measure both and write the report."""
    settings, output = settings_from_flags(Settings, __doc__)
    report = Report("encoders", asdict(settings), output)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        clips = []
        for number in range(settings.clips + 1):  # each a little longer: none is like another
            path = Path(folder) / "clip.mp4"
            make_clip(path, settings.seconds + number, 4, settings.side, settings.side)
            clips.append("data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode())
        for name, flags in SIDES.items():
            found[name] = asyncio.run(measure(flags, clips, Path(folder)))
            print(name, json.dumps(found[name]), flush=True)
            report.write(servers=found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
