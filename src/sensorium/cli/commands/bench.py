"""The flags of ``sensorium bench`` and its four measurements."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sensorium.cli.flags import add_engine_flags, engine_keywords
from sensorium.config import ModelConfig

Subparsers = Any
"""What ``ArgumentParser.add_subparsers`` returns; argparse does not name its type publicly."""

DESCRIPTIONS = {
    "serve": "Load on a running OpenAI-compatible server: latencies in percentiles, rates, errors.",
    "throughput": "Many prompts at once through the offline engine: tokens per second.",
    "latency": "One batch at a time through the offline engine: first token and steps.",
    "startup": "From starting a process to its first token, with cold and with warm kernels.",
}


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add ``bench`` with its subcommands; each sets ``handler``, which takes the parsed arguments."""
    bench: argparse.ArgumentParser = subparsers.add_parser(
        "bench", help="measure a server or the engine", description="Measure speed."
    )
    kinds = bench.add_subparsers(metavar="KIND", required=True)
    for name, add_flags in _FLAGS.items():
        parser = kinds.add_parser(name, help=DESCRIPTIONS[name], description=DESCRIPTIONS[name])
        add_flags(parser)
        parser.add_argument("--output", type=Path, metavar="FILE", help="write the result as JSON")
        parser.set_defaults(handler=_HANDLERS[name])
    return bench


def _serve_flags(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument(
        "--base-url", metavar="URL", default="http://127.0.0.1:8000", help="with or without /v1"
    )
    server.add_argument(
        "--model",
        metavar="NAME",
        help="name of the model; the first that the server lists when not given",
    )
    server.add_argument(
        "--api-key",
        metavar="KEY",
        help="sent as bearer token; default: SENSORIUM_API_KEY, VLLM_API_KEY, APHRODITE_API_KEY",
    )
    server.add_argument(
        "--timeout", type=float, metavar="N", default=600.0, help="seconds for one request"
    )
    load = parser.add_argument_group("load")
    load.add_argument(
        "--request-rate",
        type=float,
        metavar="N",
        default=float("inf"),
        help="mean requests per second, Poisson arrivals; inf sends all at once",
    )
    load.add_argument(
        "--concurrency",
        type=int,
        metavar="N",
        help="most requests in flight; no bound when not given",
    )
    load.add_argument(
        "--num-warmups", type=int, metavar="N", default=1, help="requests that do not count"
    )
    load.add_argument(
        "--seed", type=int, metavar="N", default=0, help="seed of texts, images and arrivals"
    )
    load.add_argument(
        "--leave-fraction",
        type=float,
        metavar="N",
        default=0.0,
        help="part of the clients that hang up midway (0 to 1)",
    )
    load.add_argument(
        "--ignore-eos",
        action="store_true",
        help="ask for the full output length; for servers that know this field",
    )
    load.add_argument("--extra-body", metavar="JSON", help="further members of each request")
    load.add_argument(
        "--save-requests", action="store_true", help="write the times of each request too"
    )
    _workload_flags(parser, num_prompts=100, input_len=128, output_len=128)
    _reuse_flags(parser)


def _throughput_flags(parser: argparse.ArgumentParser) -> None:
    _workload_flags(parser, num_prompts=64, input_len=128, output_len=128)
    _reuse_flags(parser)
    add_engine_flags(parser)


def _latency_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--batch-size", type=int, metavar="N", default=1, help="sequences at once")
    parser.add_argument("--iterations", type=int, metavar="N", default=5, help="batches that count")
    parser.add_argument(
        "--num-warmups", type=int, metavar="N", default=1, help="batches that do not count"
    )
    _workload_flags(parser, num_prompts=None, input_len=32, output_len=128)
    add_engine_flags(parser)


def _startup_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs", type=int, metavar="N", default=3, help="processes with warm kernels"
    )
    parser.add_argument(
        "--cold-runs", type=int, metavar="N", default=1, help="processes that compile kernels"
    )
    parser.add_argument(
        "--timeout", type=float, metavar="N", default=1800.0, help="seconds for one process"
    )
    parser.add_argument(
        "--command",
        metavar="TEXT",
        help="time this command to its first output instead of Sensorium",
    )
    add_engine_flags(parser)


def _workload_flags(
    parser: argparse.ArgumentParser, *, num_prompts: int | None, input_len: int, output_len: int
) -> None:
    group = parser.add_argument_group("workload")
    if num_prompts is not None:
        group.add_argument(
            "--num-prompts", type=int, metavar="N", default=num_prompts, help="how many requests"
        )
    group.add_argument(
        "--input-len",
        type=int,
        metavar="N",
        default=input_len,
        help="tokens of a text offline, words against a server or beside images",
    )
    group.add_argument(
        "--output-len", type=int, metavar="N", default=output_len, help="tokens of an answer"
    )
    group.add_argument("--images", type=int, default=0, metavar="N", help="images per prompt")
    group.add_argument(
        "--image-size",
        type=_size,
        default=(640, 480),
        metavar="WxH",
        help="pixels of each image; 640x480 when not given",
    )


def _reuse_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reuse")
    group.add_argument(
        "--prefix-len", type=int, metavar="N", default=0, help="words that all prompts begin with"
    )
    group.add_argument(
        "--distinct-images",
        type=int,
        metavar="N",
        default=0,
        help="draw from N images; 0: all are new",
    )


def _size(text: str) -> tuple[int, int]:
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 640x480")
    return int(width), int(height)


def _keywords(arguments: argparse.Namespace) -> dict[str, Any]:
    """The engine's keywords, with the model that is meant when none is named."""
    return {"model": ModelConfig().model, **engine_keywords(arguments)}


def _serve(arguments: argparse.Namespace) -> int:
    from sensorium.bench import serve

    return serve.run(arguments)


def _throughput(arguments: argparse.Namespace) -> int:
    from sensorium.bench import throughput

    return throughput.run(arguments, _keywords(arguments))


def _latency(arguments: argparse.Namespace) -> int:
    from sensorium.bench import latency

    return latency.run(arguments, _keywords(arguments))


def _startup(arguments: argparse.Namespace) -> int:
    from sensorium.bench import startup

    return startup.run(arguments, _keywords(arguments))


_FLAGS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "serve": _serve_flags,
    "throughput": _throughput_flags,
    "latency": _latency_flags,
    "startup": _startup_flags,
}
_HANDLERS: dict[str, Callable[[argparse.Namespace], int]] = {
    "serve": _serve,
    "throughput": _throughput,
    "latency": _latency,
    "startup": _startup,
}
