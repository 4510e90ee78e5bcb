"""Media on Sensorium's server and on that of vLLM's CPU build: one checkpoint, equal settings, in turns within one run.

Both servers run the whole time; while one is measured, all processes of the other are stopped, and the first in turn
changes with the rounds. What is measured is seen from outside, by HTTP and by the kernel's account of processor time,
and so means the same for both; what one of them does not tell or cannot do is in ``not_told``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.media.load import ImageLoad, ask_texts, image_load, probe_health
from benchmarks.media.recovery import engine_killed
from benchmarks.media.sharing import first_tokens, known_image, one_url
from sensorium.bench.summary import summarize
from benchmarks.served import Asker, MediaHost, ServedProcess, is_sensorium_engine

sys.path.insert(0, str(Path(__file__).parent / "peers"))

from compare import OURS, Series, table
from processes import EngineKind

__all__ = ["OURS", "VLLM", "Settings", "behind", "measure", "table"]

VLLM = "vllm"
NUM_KNOWN = 8
"""Pictures that come again and again in the load of known ones; the first time each of them is new."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is the same for both servers, and how much is measured."""

    checkpoint: Path
    vllm_python: Path
    folder: Path
    """For logs and for what is compiled."""
    max_pixels: int
    num_threads: int
    rounds: int
    num_clients: int
    load_seconds: float
    image_size: tuple[int, int]
    url_requests: int
    pairs: int
    known_requests: int
    known_rounds: int
    max_model_len: int = 4096
    max_num_seqs: int = 64
    kv_cache_gib: int = 1

    def command(self, kind: EngineKind, port: int) -> list[str]:
        """The command line of a server on that port."""
        shared = {
            "--host": "127.0.0.1",
            "--port": port,
            "--served-model-name": self.checkpoint.name,
            "--dtype": "bfloat16",
            "--max-model-len": self.max_model_len,
            "--max-num-seqs": self.max_num_seqs,
            "--limit-mm-per-prompt": json.dumps({"image": 1, "video": 0}),
            "--mm-processor-kwargs": json.dumps({"max_pixels": self.max_pixels}),
            "--allowed-media-domains": "127.0.0.1",
        }
        if kind.name == OURS:
            start = ["sensorium", "serve", str(self.checkpoint), "--disable-access-log"]
            shared |= {
                "--num-threads": self.num_threads,
                "--kv-cache-memory-bytes": self.kv_cache_gib << 30,
            }
        else:
            start = ["vllm.entrypoints.openai.api_server", "--model", str(self.checkpoint)]
            start += ["--disable-uvicorn-access-log"]
        flags = [str(word) for pair in shared.items() for word in pair]
        return [str(kind.python), "-m", *start, *flags]


@dataclass(slots=True)
class Figures:
    """All figures by name, and what else there is to say."""

    series: dict[str, Series] = field(default_factory=dict)
    raw: list[dict[str, Any]] = field(default_factory=list)
    not_told: dict[str, dict[str, str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    prompt_tokens: dict[str, list[int]] = field(default_factory=dict)

    def note(self, engine: str, name: str, value: float, unit: str, better: str = "lower") -> None:
        """One more value of a figure."""
        series = self.series.setdefault(name, Series(unit, better))
        series.values.setdefault(engine, []).append(value)


async def measure(settings: Settings) -> dict[str, Any]:
    """Start both, measure in turns, end both."""
    kinds = [
        EngineKind(OURS, Path(sys.executable)),
        EngineKind(VLLM, settings.vllm_python.absolute()),
    ]
    figures, versions, killed = Figures(), {}, {}
    with MediaHost() as host:
        async with contextlib.AsyncExitStack() as running:
            servers = {}
            for kind in kinds:
                server = await running.enter_async_context(_server(kind, settings))
                async with Asker(server.base_url) as asker:
                    versions[kind.name] = json.loads(await asker.text("/version"))["version"]
                server.freeze()
                servers[kind.name] = server
            for round_ in range(-1, settings.rounds):
                names = list(servers)[:: 1 if round_ % 2 == 0 else -1]
                for name in names:
                    async with _only(servers[name]):
                        await _one_round(name, servers[name], settings, host, round_, figures)
            for name, server in servers.items():
                async with _only(server), Asker(server.base_url) as asker:
                    killed[name] = {
                        **await engine_killed(server, asker),
                        "server_runs": server.alive,
                    }
    if figures.prompt_tokens[OURS] != figures.prompt_tokens[VLLM]:
        figures.failures.append(f"prompts differ in their tokens: {figures.prompt_tokens}")
    return {
        "model": settings.checkpoint.name,
        "engines": versions,
        "max_pixels": settings.max_pixels,
        "num_threads": settings.num_threads,
        "figures": {name: series.summary() for name, series in figures.series.items()},
        "engine_killed": killed,
        "not_told": figures.not_told,
        "failures": figures.failures,
        "rounds": figures.raw,
    }


def _server(kind: EngineKind, settings: Settings) -> ServedProcess:
    return ServedProcess(
        lambda port: settings.command(kind, port),
        settings.folder / f"media-peers-{kind.name}.log",
        is_engine=is_sensorium_engine if kind.name == OURS else is_vllm_engine,
        environment=kind.environment(
            settings.num_threads, settings.kv_cache_gib, settings.folder / f"caches-{kind.name}"
        ),
    )


def is_vllm_engine(process: psutil.Process) -> bool:
    """Whether it is the engine of a vLLM server, or one of its workers: these give themselves names."""
    return process.cmdline()[:1] != [] and process.cmdline()[0].startswith("VLLM::")


@contextlib.asynccontextmanager
async def _only(server: ServedProcess) -> AsyncIterator[None]:
    """The server runs within, and is stopped after."""
    server.thaw()
    try:
        yield
    finally:
        server.freeze()


async def _one_round(
    name: str,
    server: ServedProcess,
    settings: Settings,
    host: MediaHost,
    round_: int,
    figures: Figures,
) -> None:
    """All measurements on one server; round -1 warms it up, shortly, and leaves nothing in ``figures``."""
    if round_ < 0:
        await _load(server.base_url, settings, seconds=1.0)
        await first_tokens(server.base_url, pairs=1, number=999)
        return
    base_url, number = server.base_url, 1000 * (round_ + 1)
    new = await _load(base_url, settings, seconds=settings.load_seconds)
    known = await _load(
        base_url, settings, seconds=settings.load_seconds / 2, num_distinct=NUM_KNOWN
    )
    tokens = await first_tokens(base_url, pairs=settings.pairs, number=number)
    async with Asker(base_url) as asker:
        urls = await one_url(
            asker, host, num_requests=settings.url_requests, repeats=1, number=number
        )
        image = await known_image(
            server,
            asker,
            size=(1024, 1024),
            num_requests=settings.known_requests,
            rounds=settings.known_rounds,
        )
    _note_load(figures, name, "new", new)
    _note_load(figures, name, "known", known)
    _note_tokens(figures, name, tokens)
    _note_urls(figures, name, urls)
    _note_image(figures, name, image)
    found = {"load_new": new, "load_known": known, "first_token": tokens}
    figures.raw.append({"engine": name, **found, "one_url": urls, "known_image": image})


async def _load(
    base_url: str, settings: Settings, *, seconds: float, num_distinct: int = 0
) -> dict[str, Any]:
    """Clients that send pictures, and beside them /health and short texts; see ``media_load``."""
    load = ImageLoad(
        base_url,
        settings.checkpoint.name,
        settings.num_clients,
        seconds,
        settings.image_size,
        max_tokens=1,
        distinct=num_distinct,
    )
    until = asyncio.Event()
    async with image_load(load) as clients:
        started = asyncio.get_running_loop().time()
        async with asyncio.TaskGroup() as group:
            texts = group.create_task(ask_texts(base_url, settings.checkpoint.name, until))
            health = group.create_task(probe_health(base_url, until))
            await asyncio.wait((clients,))
            wall = asyncio.get_running_loop().time() - started
            until.set()
        result = await clients
    return {
        "images_per_second": len(result.seconds) / wall,
        "wall_seconds": wall,
        "statuses": {str(status): count for status, count in result.statuses.items()},
        "image_seconds": _summary(result.seconds),
        "health_seconds": _summary(health.result()),
        "text_first_token_seconds": _summary(texts.result()),
    }


def _summary(values: Sequence[float]) -> dict[str, float]:
    summary = summarize(values)
    if summary is None:
        return {"count": 0}
    return {
        "count": len(values),
        "p50": summary.p50,
        "p99": summary.p99,
        "maximum": summary.maximum,
    }


def _note_load(figures: Figures, engine: str, kind: str, load: Mapping[str, Any]) -> None:
    figures.note(
        engine, f"{kind}_images_per_second", load["images_per_second"], "images/s", "higher"
    )
    for part in ("p50", "p99", "maximum"):
        if part in load["health_seconds"]:
            figures.note(engine, f"{kind}_health_{part}", load["health_seconds"][part], "s")
    for name in ("image", "text_first_token"):
        if "p50" in load[f"{name}_seconds"]:
            figures.note(engine, f"{kind}_{name}_p50", load[f"{name}_seconds"]["p50"], "s")
    if set(load["statuses"]) != {"200"}:
        figures.failures.append(f"{engine}, load of {kind} images: {load['statuses']}")


def _note_tokens(figures: Figures, engine: str, tokens: Mapping[str, Sequence[Any]]) -> None:
    for new, known in zip(tokens["new_seconds"], tokens["known_seconds"], strict=True):
        figures.note(engine, "first_token_new", new, "s")
        figures.note(engine, "first_token_known", known, "s")
    figures.prompt_tokens.setdefault(engine, []).extend(tokens["prompt_tokens"])


def _note_urls(figures: Figures, engine: str, urls: Sequence[Mapping[str, Any]]) -> None:
    for run in urls:
        speed = "slow" if run["delay_seconds"] else "fast"
        figures.note(engine, f"one_url_fetches_{speed}", run["fetches_seen_by_host"], "fetches")
        figures.note(engine, f"one_url_seconds_{speed}", run["seconds"], "s")
        for counter, value in run["counters"].items():
            if value is None:
                figures.not_told.setdefault(engine, {})[counter] = "its /metrics has no such thing"
        if set(run["statuses"]) != {"200"}:
            figures.failures.append(f"{engine}, one URL ({speed} host): {run['statuses']}")


def _note_image(figures: Figures, engine: str, image: Mapping[str, Any]) -> None:
    for form, rounds in image["added_milliseconds"]["front"]["rounds"].items():
        if form != "again":
            for value in rounds:
                figures.note(engine, f"known_{form}_front", value, "ms of CPU")
    for value in image["milliseconds"]["front"]["rounds"]["text"]:
        figures.note(engine, "text_front", value, "ms of CPU")
    figures.not_told.setdefault(engine, {}).update(image["refused"])


def behind(found: Mapping[str, Any]) -> dict[str, float]:
    """The figures in which ours is worse, with our median divided by theirs."""
    return {
        name: ratio
        for name, figure in found["figures"].items()
        if (ratio := figure["ours_over"].get(VLLM)) is not None
        and (ratio > 1 if figure["better"] == "lower" else ratio < 1)
    }
