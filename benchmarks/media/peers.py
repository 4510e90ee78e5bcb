"""Media on Sensorium's server and on that of vLLM's CPU build.

One checkpoint, equal settings, in turn in one run.

Both servers run the whole time; while one is measured, all processes of the other are stopped, and
the first in turn changes with the rounds. What is measured is seen from outside, by HTTP and by the
kernel's account of processor time, and so means the same for both; what one of them does not tell
or cannot do is in ``not_told``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks import harness
from benchmarks.harness import Found, Size, figures_table, flag, in_turn, summary
from benchmarks.media.cache import first_tokens
from benchmarks.media.known import known_image
from benchmarks.media.load import ImageLoad, ask_texts, image_load, probe_health
from benchmarks.media.once import one_url
from benchmarks.media.recovery import engine_killed
from benchmarks.peers.engines import EngineKind
from benchmarks.served import Asker, MediaHost, ServedProcess, counted, is_sensorium_engine

OURS, VLLM = "sensorium", "vllm"
NUM_KNOWN = 8
"""Pictures that come again and again in the load of known ones; the first time each of them is
new."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is the same for both servers, and how much is measured."""

    checkpoint: Path | None = flag(None, "folder that both serve", type=Path)
    vllm_python: Path | None = flag(None, "Python of vLLM's environment", type=Path)
    max_pixels: int = flag(50_176, "of an image for that model")
    num_threads: int = flag(2, "of each engine")
    rounds: int = flag(2, quick=1)
    clients: int = flag(32, quick=8)
    seconds: float = flag(12.0, quick=3.0)
    image_size: Size = flag(Size(2048, 2048))
    url_requests: int = flag(100, "for one URL at once")
    pairs: int = flag(5, quick=2)
    known_requests: int = flag(50, quick=10)
    known_rounds: int = flag(2, quick=1)
    max_model_len: int = 4096
    max_num_seqs: int = 64
    kv_cache_gib: int = 1

    def command(self, kind: EngineKind, port: int) -> list[str]:
        """The command line of a server on that port."""
        assert self.checkpoint is not None
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

    series: harness.Figures = field(default_factory=harness.Figures)
    raw: list[dict[str, Any]] = field(default_factory=list)
    not_told: dict[str, dict[str, str]] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    prompt_tokens: dict[str, list[int]] = field(default_factory=dict)

    def note(self, engine: str, name: str, value: float, unit: str, better: str = "lower") -> None:
        """Add one value of a figure."""
        self.series.note(name, engine, value, unit, better)


def measure(settings: Settings, folder: Path) -> Found:
    """Start both servers, measure in turn, end both, and print the table of medians."""
    if settings.vllm_python is None or settings.checkpoint is None:
        print("  left out: --vllm-python and --checkpoint are not given")
        return Found({"left_out": "--vllm-python and --checkpoint were not given"})
    found = asyncio.run(_compare(settings, folder))
    print(figures_table(found["figures"], [OURS, VLLM], OURS))
    for engine, killed in found["engine_killed"].items():
        print(f"engine killed, {engine}: {killed}")
    for name, ratio in behind(found).items():
        print(f"behind in {name}: {ratio:.3f}")
    return Found(found)


async def _compare(settings: Settings, folder: Path) -> dict[str, Any]:
    assert settings.vllm_python is not None
    kinds = [
        EngineKind(OURS, Path(sys.executable)),
        EngineKind(VLLM, settings.vllm_python.absolute()),
    ]
    figures, versions, killed = Figures(), {}, {}
    with MediaHost() as host:
        async with contextlib.AsyncExitStack() as running:
            servers: dict[str, ServedProcess] = {}
            for kind in kinds:
                server = await running.enter_async_context(_server(kind, settings, folder))
                async with Asker(server.base_url) as asker:
                    versions[kind.name] = json.loads(await asker.text("/version"))["version"]
                server.tree.freeze()
                servers[kind.name] = server
            for round_ in range(-1, settings.rounds):
                for name in in_turn(list(servers), round_):
                    with servers[name].tree.only():
                        await _one_round(name, servers[name], settings, host, round_, figures)
            for name, server in servers.items():
                async with Asker(server.base_url) as asker:
                    with server.tree.only():
                        outcome = await engine_killed(server, asker)
                        killed[name] = {**outcome, "server_runs": server.tree.alive}
    if figures.prompt_tokens[OURS] != figures.prompt_tokens[VLLM]:
        figures.failures.append(f"prompts differ in their tokens: {figures.prompt_tokens}")
    return {
        "model": settings.checkpoint and settings.checkpoint.name,
        "max_pixels": settings.max_pixels,
        "num_threads": settings.num_threads,
        "engines": versions,
        "figures": figures.series.summary(OURS),
        "engine_killed": killed,
        "not_told": figures.not_told,
        "failures": figures.failures,
        "rounds": figures.raw,
    }


def _server(kind: EngineKind, settings: Settings, folder: Path) -> ServedProcess:
    return ServedProcess(
        lambda port: settings.command(kind, port),
        folder / f"peers-{kind.name}.log",
        is_engine=is_sensorium_engine if kind.name == OURS else is_vllm_engine,
        environment=kind.environment(
            settings.num_threads, settings.kv_cache_gib, folder / f"caches-{kind.name}"
        ),
    )


def is_vllm_engine(process: psutil.Process) -> bool:
    """True for the engine of a vLLM server and its workers, which give themselves names."""
    return process.cmdline()[:1] != [] and process.cmdline()[0].startswith("VLLM::")


async def _one_round(
    name: str,
    server: ServedProcess,
    settings: Settings,
    host: MediaHost,
    round_: int,
    figures: Figures,
) -> None:
    """All measurements on one server.

    Round -1 warms it up, shortly, and leaves nothing in ``figures``.
    """
    if round_ < 0:
        await _load(server.base_url, settings, seconds=1.0)
        await first_tokens(server.base_url, pairs=1, number=999)
        return
    base_url, number = server.base_url, 1000 * (round_ + 1)
    new = await _load(base_url, settings, seconds=settings.seconds)
    known = await _load(base_url, settings, seconds=settings.seconds / 2, num_distinct=NUM_KNOWN)
    tokens = await first_tokens(base_url, pairs=settings.pairs, number=number)
    async with Asker(base_url) as asker:
        urls = await one_url(
            asker, host, num_requests=settings.url_requests, repeats=1, number=number
        )
        image = await known_image(
            server,
            asker,
            size=Size(1024, 1024),
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
    assert settings.checkpoint is not None
    load = ImageLoad(
        base_url,
        settings.checkpoint.name,
        settings.clients,
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
        "statuses": counted(result.statuses.elements()),
        "image_seconds": summary(result.seconds),
        "health_seconds": summary(health.result()),
        "text_first_token_seconds": summary(texts.result()),
    }


def _note_load(figures: Figures, engine: str, kind: str, load: Mapping[str, Any]) -> None:
    figures.note(
        engine, f"{kind}_images_per_second", load["images_per_second"], "images/s", "higher"
    )
    for part in ("p50", "p99", "maximum"):
        if load["health_seconds"]["count"]:
            figures.note(engine, f"{kind}_health_{part}", load["health_seconds"][part], "s")
    for name in ("image", "text_first_token"):
        if load[f"{name}_seconds"]["count"]:
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
