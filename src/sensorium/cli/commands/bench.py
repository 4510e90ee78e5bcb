"""``sensorium bench`` and its five measurements."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sensorium.cli.flags import add_engine_flags, add_progress_flag, engine_keywords
from sensorium.config import ModelConfig

FORMATS = ("float32", "bfloat16", "float16", "int8", "int4", "attention")
"""Formats of weights, those of ``kernels.weight``, which imports torch; and attention in bf16."""
MOST_WEIGHTS = 1 << 30
"""Most weights of a layer that products are measured with."""
MOST_SECONDS = 3600
Subparsers = Any
"""Type of ``ArgumentParser.add_subparsers``, which argparse does not name publicly."""

DESCRIPTIONS = {
    "serve": "Measure latencies, rates and errors of a running server under load.",
    "throughput": "Measure tokens per second of the offline engine with many prompts at once.",
    "latency": "Measure time to first token and time per step of the offline engine.",
    "startup": "Measure the time from process start to the first token.",
    "kernels": "Measure the products of linear layers by weight format and number of rows.",
}

_OFFLINE = {
    "--model": "--model Qwen/Qwen2-VL-2B-Instruct",
    "--dtype": "--dtype bfloat16",
    "--quantization": "--quantization int8",
    "--num-threads": "--num-threads 8",
}
_WORKLOAD = {
    "--input-len": "--input-len 512",
    "--output-len": "--output-len 64",
    "--images": "--images 1",
}
_RESULT = {"--output": "--output result.json"}
COMMON = {
    "serve": {
        "--base-url": "--base-url http://127.0.0.1:9000",
        "--model": "--model demo",
        "--num-prompts": "--num-prompts 500",
        "--concurrency": "--concurrency 32",
        "--request-rate": "--request-rate 10",
        **_WORKLOAD,
        "--image-size": "--image-size 1280x720",
        **_RESULT,
    },
    "throughput": {"--num-prompts": "--num-prompts 500", **_WORKLOAD, **_OFFLINE, **_RESULT},
    "latency": {"--batch-size": "--batch-size 8", **_WORKLOAD, **_OFFLINE, **_RESULT},
    "startup": {"--runs": "--runs 5", "--cold-runs": "--cold-runs 0", **_OFFLINE, **_RESULT},
    "kernels": {
        "--formats": "--formats bfloat16 int8",
        "--rows": "--rows 1 8",
        "--shape": "--shape 11008x4096",
        "--threads": "--threads 8",
        "--write": "--write",
        **_RESULT,
    },
}
"""Flags of the short help of each measurement, with examples."""


def add_parser(subparsers: Subparsers) -> argparse.ArgumentParser:
    """Add ``bench`` with its subcommands; each sets ``handler``."""
    bench: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="measure the speed of a server or of the engine",
        description="Measure the speed of a server or of the engine.",
    )
    kinds = bench.add_subparsers(metavar="KIND", required=True)
    for name, add_flags in _FLAGS.items():
        parser: Any = kinds.add_parser(
            name,
            help=DESCRIPTIONS[name],
            usage="%(prog)s [options]",
            description=DESCRIPTIONS[name],
        )
        add_flags(parser)
        parser.add_argument(
            "--output", type=Path, metavar="FILE", help="file for the result, as JSON"
        )
        parser.common = COMMON[name]
        parser.set_defaults(handler=_HANDLERS[name])
    return bench


def _serve_flags(parser: argparse.ArgumentParser) -> None:
    server = parser.add_argument_group("server")
    server.add_argument(
        "--base-url",
        metavar="URL",
        default="http://127.0.0.1:8000",
        help="address of the server; may end in /v1",
    )
    server.add_argument(
        "--model",
        metavar="NAME",
        help="name of the model; the first that the server lists if not given",
    )
    server.add_argument(
        "--api-key",
        metavar="KEY",
        help="key for the server; default: SENSORIUM_API_KEY, VLLM_API_KEY, APHRODITE_API_KEY",
    )
    server.add_argument(
        "--timeout", type=float, metavar="N", default=600.0, help="seconds per request"
    )
    add_progress_flag(parser)
    _load_flags(parser)
    _workload_flags(parser, num_prompts=100, input_len=128, output_len=128)
    _reuse_flags(parser)


def _load_flags(parser: argparse.ArgumentParser) -> None:
    load = parser.add_argument_group("load")
    load.add_argument(
        "--request-rate",
        type=float,
        metavar="N",
        default=float("inf"),
        help="mean requests per second, with Poisson arrivals; inf sends all at once",
    )
    load.add_argument(
        "--concurrency",
        type=int,
        metavar="N",
        help="maximum number of requests in flight; unlimited if not given",
    )
    load.add_argument(
        "--num-warmups",
        type=int,
        metavar="N",
        default=1,
        help="number of requests that are not measured",
    )
    load.add_argument(
        "--seed", type=int, metavar="N", default=0, help="seed of texts, images and arrivals"
    )
    load.add_argument(
        "--leave-fraction",
        type=float,
        metavar="N",
        default=0.0,
        help="fraction of the clients that disconnect midway (0 to 1)",
    )
    load.add_argument(
        "--ignore-eos",
        action="store_true",
        help="always generate the full output length, on servers that support this field",
    )
    load.add_argument("--extra-body", metavar="JSON", help="further fields of each request")
    load.add_argument(
        "--save-requests",
        action="store_true",
        help="include the times of each request in the result",
    )


def _throughput_flags(parser: argparse.ArgumentParser) -> None:
    _workload_flags(parser, num_prompts=64, input_len=128, output_len=128)
    _reuse_flags(parser)
    add_engine_flags(parser)


def _latency_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--batch-size", type=int, metavar="N", default=1, help="sequences per batch"
    )
    parser.add_argument(
        "--iterations", type=int, metavar="N", default=5, help="number of measured batches"
    )
    parser.add_argument(
        "--num-warmups",
        type=int,
        metavar="N",
        default=1,
        help="number of batches that are not measured",
    )
    _workload_flags(parser, num_prompts=None, input_len=32, output_len=128)
    add_engine_flags(parser)


def _startup_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs", type=int, metavar="N", default=3, help="number of starts with compiled kernels"
    )
    parser.add_argument(
        "--cold-runs",
        type=int,
        metavar="N",
        default=1,
        help="number of starts that compile kernels",
    )
    parser.add_argument(
        "--timeout", type=float, metavar="N", default=1800.0, help="seconds per process"
    )
    parser.add_argument(
        "--command",
        metavar="TEXT",
        help="measure this command until its first output, instead of Sensorium",
    )
    add_engine_flags(parser)


def _kernels_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=FORMATS,
        default=list(FORMATS),
        metavar="NAME",
        help=f"formats of weights: {', '.join(FORMATS)}; default: all",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        type=_number(1, 65536),
        default=[1, 4, 8, 32, 256],
        metavar="N",
        help="numbers of rows; default: 1 4 8 32 256",
    )
    parser.add_argument(
        "--shape",
        type=_shape,
        default=(4864, 896),
        metavar="NxK",
        help="outputs and inputs of the layer; default: 4864x896",
    )
    parser.add_argument(
        "--threads", type=_number(1, 1024), metavar="N", help="threads; all cores if not given"
    )
    parser.add_argument(
        "--seconds",
        type=_seconds,
        metavar="N",
        default=0.5,
        help="seconds per product and number of rows",
    )
    parser.add_argument(
        "--write",
        action="store_true",
        help="let the engine choose products by these times on this machine from now on",
    )


def _workload_flags(
    parser: argparse.ArgumentParser, *, num_prompts: int | None, input_len: int, output_len: int
) -> None:
    group = parser.add_argument_group("workload")
    if num_prompts is not None:
        group.add_argument(
            "--num-prompts", type=int, metavar="N", default=num_prompts, help="number of requests"
        )
    group.add_argument(
        "--input-len",
        type=int,
        metavar="N",
        default=input_len,
        help="length of a text: tokens offline, words for a server or with images",
    )
    group.add_argument(
        "--output-len",
        type=int,
        metavar="N",
        default=output_len,
        help="length of an answer in tokens",
    )
    group.add_argument("--images", type=int, default=0, metavar="N", help="images per prompt")
    group.add_argument(
        "--image-size",
        type=_size,
        default=(640, 480),
        metavar="WxH",
        help="size of each image in pixels; default: 640x480",
    )


def _reuse_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reuse")
    group.add_argument(
        "--prefix-len",
        type=int,
        metavar="N",
        default=0,
        help="number of words at the beginning that all prompts share",
    )
    group.add_argument(
        "--distinct-images",
        type=int,
        metavar="N",
        default=0,
        help="number of distinct images; 0: every image is new",
    )


def _size(text: str) -> tuple[int, int]:
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, such as 640x480")
    return int(width), int(height)


def _shape(text: str) -> tuple[int, int]:
    shape = _size(text)
    if 0 in shape or shape[0] * shape[1] > MOST_WEIGHTS:
        raise argparse.ArgumentTypeError(f"{text!r} is not within 1x1 and {MOST_WEIGHTS} weights")
    return shape


def _number(least: int, most: int) -> Callable[[str], int]:
    """Return the reader of a whole number within bounds."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and least <= int(text[:20]) <= most):
            raise argparse.ArgumentTypeError(f"{text!r} is no number from {least} to {most}")
        return int(text)

    return read


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= MOST_SECONDS:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds up to {MOST_SECONDS}")
    return seconds


def _keywords(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the engine's keywords, with the default model if none is given."""
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


def _kernels(arguments: argparse.Namespace) -> int:
    from sensorium.kernels.cpu import threads

    threads.configure(arguments.threads)
    from sensorium.bench import kernels

    return kernels.run(arguments)


_FLAGS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "serve": _serve_flags,
    "throughput": _throughput_flags,
    "latency": _latency_flags,
    "startup": _startup_flags,
    "kernels": _kernels_flags,
}
_HANDLERS: dict[str, Callable[[argparse.Namespace], int]] = {
    "serve": _serve,
    "throughput": _throughput,
    "latency": _latency,
    "startup": _startup,
    "kernels": _kernels,
}
