"""Media handling of a server, measured whole: preprocessing, load, repeats, one URL for many, recovery, and a peer.

    python media.py
    python media.py --sections cached once --quick
    python media.py --vllm-python ENVIRONMENT/bin/python --peer-model FOLDER

- preprocess: images per second of each family with one and with two worker processes (preprocess.py)
- load: the event loop, /health and short texts while 32 clients send 2048x2048 pictures (load.py)
- cached: processor time of an image that the server knows, and of one named by its uuid only
- once: 100 requests at once for one URL: fetches, decodes and encodes
- recovery: a media worker, the process that these are forked from, and the engine are killed under load
- peers: load, one URL and known images beside vLLM's CPU build (peers.py), where ``--vllm-python`` and
  ``--peer-model`` are given

Each section starts servers of its own and ends them. The results are written as JSON after each section, all values
beside the medians. The exit status is 1 when a target is missed or a section failed; the last lines say which. With
``--quick`` everything is small and few: it shows that all works, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.media import load
from benchmarks.media import peers
from benchmarks.media import recovery
from benchmarks.media import report
from benchmarks.media import sharing
from sensorium.bench.report import header
from benchmarks.served import Asker, MediaHost, sensorium_server

RESULTS = Path(__file__).parent / "results"
KILLS: dict[str, Callable[..., Any]] = {
    "worker": recovery.worker_killed,
    "forker": recovery.forker_killed,
    "engine": recovery.engine_killed,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much is measured."""

    families: tuple[str, ...] | None = None
    preprocess_images: int = 48
    preprocess_rounds: int = 3
    load_clients: int = 32
    load_seconds: float = 20.0
    load_size: tuple[int, int] = (2048, 2048)
    known_requests: int = 300
    known_rounds: int = 5
    url_requests: int = 100
    url_repeats: int = 3
    kills: int = 3
    peer_rounds: int = 2
    peer_load_seconds: float = 12.0
    peer_pairs: int = 5
    peer_known_requests: int = 50
    peer_known_rounds: int = 2


FULL = Scale()
QUICK = Scale(
    families=("qwen2_vl",),
    preprocess_images=8,
    preprocess_rounds=1,
    load_clients=8,
    load_seconds=3.0,
    known_requests=40,
    known_rounds=2,
    url_repeats=1,
    kills=1,
    peer_rounds=1,
    peer_load_seconds=3.0,
    peer_pairs=2,
    peer_known_requests=10,
    peer_known_rounds=1,
)


@dataclass(frozen=True, slots=True)
class Section:
    """What a section found, and its rows of the table."""

    found: dict[str, Any]
    rows: list[report.Row]


# --- the sections ----------------------------------------------------------------------------------------------------


def run_preprocess(options: argparse.Namespace, scale: Scale) -> Section:
    """See ``media_preprocess``."""
    from benchmarks.media import preprocess  # not before: it imports torch, which the clients of the other sections need not

    found = preprocess.measure_families(
        scale.families or tuple(preprocess.FAMILIES),
        (1024, 1024),
        scale.preprocess_images,
        (1, 2),
        scale.preprocess_rounds,
    )
    return Section(found, report.preprocess_rows(found, preprocess.LEAST_RATIO))


def run_load(options: argparse.Namespace, scale: Scale) -> Section:
    """See ``media_load``."""
    found = asyncio.run(
        load.measure(
            argparse.Namespace(
                model=options.model,
                flags=[],
                log=options.logs / "media-load.log",
                clients=scale.load_clients,
                seconds=scale.load_seconds,
                image_size=scale.load_size,
                distinct=0,
            )
        )
    )
    return Section(found, report.load_rows(found))


def run_cached(options: argparse.Namespace, scale: Scale) -> Section:
    """See ``sharing.known_image``."""

    async def measure() -> dict[str, Any]:
        log = options.logs / "media-cached.log"
        async with (
            sensorium_server(options.model, [], log) as server,
            Asker(server.base_url) as asker,
        ):
            return await sharing.known_image(
                server,
                asker,
                size=(1024, 1024),
                num_requests=scale.known_requests,
                rounds=scale.known_rounds,
            )

    found = asyncio.run(measure())
    return Section(found, report.cached_rows(found))


def run_once(options: argparse.Namespace, scale: Scale) -> Section:
    """See ``sharing.one_url``."""

    async def measure() -> list[dict[str, Any]]:
        flags = ["--allowed-media-domains", "127.0.0.1"]
        log = options.logs / "media-once.log"
        async with (
            sensorium_server(options.model, flags, log) as server,
            Asker(server.base_url) as asker,
        ):
            with MediaHost() as host:
                return await sharing.one_url(
                    asker, host, num_requests=scale.url_requests, repeats=scale.url_repeats
                )

    runs = asyncio.run(measure())
    return Section({"num_requests": scale.url_requests, "runs": runs}, report.once_rows(runs))


def run_recovery(options: argparse.Namespace, scale: Scale) -> Section:
    """See ``media_recovery``."""

    async def measure() -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in KILLS}
        log = options.logs / "media-recovery.log"
        async with sensorium_server(options.model, ["--num-media-workers", "2"], log) as server:
            for name, kill in KILLS.items():
                for _ in range(scale.kills):
                    async with Asker(server.base_url) as asker:
                        found[name].append(await kill(server, asker))
        return found

    found = asyncio.run(measure())
    return Section(found, report.recovery_rows(found))


def run_peers(options: argparse.Namespace, scale: Scale) -> Section:
    """See ``media_peers``."""
    if options.vllm_python is None or options.peer_model is None:
        print("  left out: --vllm-python and --peer-model are not given")
        return Section({"left_out": "--vllm-python and --peer-model were not given"}, [])
    settings = peers.Settings(
        checkpoint=options.peer_model.absolute(),
        vllm_python=options.vllm_python,
        folder=options.logs,
        max_pixels=options.peer_max_pixels,
        num_threads=options.peer_threads,
        rounds=scale.peer_rounds,
        num_clients=scale.load_clients,
        load_seconds=scale.peer_load_seconds,
        image_size=scale.load_size,
        url_requests=scale.url_requests,
        pairs=scale.peer_pairs,
        known_requests=scale.peer_known_requests,
        known_rounds=scale.peer_known_rounds,
    )
    found = asyncio.run(peers.measure(settings))
    print(peers.table(found["figures"], [peers.OURS, peers.VLLM]))
    for engine, killed in found["engine_killed"].items():
        print(f"engine killed, {engine}: {killed}")
    for name, ratio in peers.behind(found).items():
        print(f"behind in {name}: {ratio:.3f}")
    return Section(found, [])


SECTIONS: dict[str, Callable[[argparse.Namespace, Scale], Section]] = {
    "preprocess": run_preprocess,
    "load": run_load,
    "cached": run_cached,
    "once": run_once,
    "recovery": run_recovery,
    "peers": run_peers,
}


# --- the command -----------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, output: Path) -> list[str]:
    """Run the sections, print, write; what went wrong, a line each."""
    scale = QUICK if options.quick else FULL
    settings = {"model": Path(options.model).name, "quick": options.quick, **asdict(scale)}
    report: dict[str, Any] = {**header("media", settings), "sections": {}, "targets": []}
    wrong = []
    for name in options.sections:
        print(f"{name}", flush=True)
        try:
            section = SECTIONS[name](options, scale)
        except Exception as error:
            traceback.print_exc()
            wrong.append(f"{name} failed: {type(error).__name__}")
            report["sections"][name] = {"failed": type(error).__name__}
        else:
            print(report.table_of(section.rows), flush=True)
            report["sections"][name] = section.found
            report["targets"] += [
                {**asdict(row), "missed": row.missed} for row in section.rows if row.wanted
            ]
            wrong += [
                f"{name}, {row.name}: {row.value} {row.unit} (wanted {row.wanted})"
                for row in section.rows
                if row.missed
            ]
        report["missed"] = wrong
        output.write_text(json.dumps(report, indent=1) + "\n")
    return wrong


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="small and few, as a trial")
    parser.add_argument("--model", default="demo", help="of all sections but preprocess and peers")
    parser.add_argument("--vllm-python", type=Path, help="Python of vLLM's environment, for peers")
    parser.add_argument("--peer-model", type=Path, help="checkpoint folder that both serve")
    parser.add_argument(
        "--peer-max-pixels", type=int, default=50_176, help="of an image for that model"
    )
    parser.add_argument("--peer-threads", type=int, default=2, help="of each engine")
    parser.add_argument("--logs", type=Path, help="folder for the servers' logs and caches")
    parser.add_argument("--output", type=Path)
    return parser.parse_args(arguments)


def main() -> int:
    """The command line."""
    options = parse_arguments()
    # Servers are ended in the way of an exception, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    options.logs = (options.logs or Path(tempfile.mkdtemp(prefix="media-"))).absolute()
    options.logs.mkdir(parents=True, exist_ok=True)
    day = header("media", {})["date"][:10]
    name = f"media-{day}.json"
    output = options.output or (options.logs if options.quick else RESULTS) / name
    output.parent.mkdir(parents=True, exist_ok=True)
    print(f"logs: {options.logs}\nresults: {output}", flush=True)
    wrong = run(options, output)
    print("missed:" if wrong else "all targets met", *wrong, sep="\n  " if wrong else "")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
