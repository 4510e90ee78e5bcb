"""``sensorium batch``: a file of requests in OpenAI's batch format, answered into another."""

from __future__ import annotations

import argparse
import itertools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sensorium import environment
from sensorium.cli.batch import places
from sensorium.cli.flags import add_engine_flags, build_engine_config
from sensorium.config import MIB, MediaConfig, ServedConfig, ServerConfig, check_models
from sensorium.errors import ConfigError
from sensorium.processes.start import forgo_pools
from sensorium.progress import LoggedBar, bar_class

if TYPE_CHECKING:
    from sensorium.cli.batch.run import Job

DESCRIPTION = (
    "Answer the requests in a file, one JSON object a line with custom_id, method, url and body, "
    "as OpenAI's batch API takes them, for /v1/chat/completions, /v1/completions, /v1/embeddings "
    "and /v1/responses. A run that was interrupted goes on where it stopped when the same command "
    "is given again; each line is answered once. Lines that fail go to a file of errors."
)
PATIENCE = 600.0
"""Seconds for which a line is tried again while a server is not available."""
REMOTE_AT_ONCE = 32
COMMON = {
    "--output": "--output answers.jsonl",
    "--model": "--model Qwen/Qwen2-VL-2B-Instruct",
    "--errors": "--errors failed.jsonl",
    "--in-order": "--in-order",
    "--overwrite": "--overwrite",
    "--base-url": "--base-url http://127.0.0.1:8000",
    "--max-model-len": "--max-model-len 8192",
    "--quantization": "--quantization int8",
    "--allowed-local-media-path": "--allowed-local-media-path media",
    "--replicas": "--replicas 4",
}


@dataclass(frozen=True, slots=True)
class Files:
    """The local files of a run."""

    source: places.Lines
    answers: Path
    errors: Path


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "batch",
        help="answer a file of requests",
        usage="%(prog)s IN.jsonl -o OUT.jsonl [options]",
        description=DESCRIPTION,
    )
    _add_place_flags(parser)
    parser.add_argument(
        "--errors",
        metavar="FILE",
        help="file for the lines that failed (default: OUT.errors.jsonl)",
    )
    parser.add_argument(
        "--in-order",
        action="store_true",
        help="write the outputs in the order of the input, when all are there",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="forget the outputs of earlier runs"
    )
    parser.add_argument(
        "--rerun-changed",
        action="store_true",
        help="run lines again that have changed since they were answered, in place of those "
        "answers (default: such an input is refused)",
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        metavar="N",
        help="requests at a time (default: twice --max-num-seqs, and 32 with --base-url)",
    )
    parser.add_argument(
        "--max-line-mb",
        type=int,
        default=128,
        metavar="N",
        help="MiB of the longest line that is read (default: 128)",
    )
    parser.has_models = True
    _add_server_flags(parser)
    _add_cluster_flags(parser)
    add_engine_flags(parser)
    parser.common = COMMON
    parser.set_defaults(handler=run)


def _add_place_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the input, and of the output."""
    parser.add_argument(
        "input",
        metavar="IN.jsonl",
        help="file of requests; or a Parquet file (.parquet), or a folder of images; a path, or a "
        "URL that fsspec opens, such as s3://bucket/in.jsonl",
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="OUT.jsonl",
        required=True,
        help="file for the answers; with the end .parquet a Parquet file; a path or a URL",
    )
    parser.add_argument(
        "--prompt", metavar="TEXT", help="what is asked about each image of a folder or a table"
    )
    parser.add_argument(
        "--body",
        type=_members,
        default={},
        metavar="JSON",
        help="members of the body of each request that is made of an image or a row, such as "
        "'{\"max_tokens\": 100}'",
    )


def _add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a server that answers, and of the names that requests use."""
    parser.add_argument(
        "--base-url", metavar="URL", help="send the requests to this server, load no model"
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="key for --base-url (default: SENSORIUM_API_KEY, or else OPENAI_API_KEY)",
    )
    parser.add_argument(
        "--request-timeout",
        type=float,
        default=3600.0,
        metavar="SECONDS",
        help="time for one request to --base-url (default: 3600)",
    )
    parser.add_argument(
        "--served-model-name",
        nargs="+",
        default=(),
        metavar="NAME",
        help="names by which requests may call the model",
    )


def _add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of several engines on Ray."""
    parser.add_argument(
        "--replicas",
        type=int,
        metavar="N",
        help="engines that share the work, each in a process of its own on Ray (needs the extra "
        "ray); without it one engine runs, without Ray",
    )
    parser.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="cluster of Ray on which --replicas run: auto for the one of this machine, or "
        "HOST:PORT (default: one that is started on this machine for the run)",
    )
    parser.add_argument(
        "--media-replicas",
        type=int,
        metavar="N",
        help="processes beside --replicas that tokenize, fetch and decode media on a CPU each "
        "(default: as many as engines)",
    )
    parser.add_argument(
        "--replica-cpus",
        type=float,
        default=1.0,
        metavar="N",
        help="CPUs that Ray reserves for each of --replicas (default: 1)",
    )
    parser.add_argument(
        "--replica-gpus",
        type=float,
        metavar="N",
        help="GPUs that Ray reserves for each of --replicas (default: as many as "
        "--tensor-parallel-size where --device is cuda, else none)",
    )


def _members(text: str) -> dict[str, Any]:
    try:
        members = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"no JSON: {error}") from None
    if not isinstance(members, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return members


def run(arguments: argparse.Namespace) -> int:
    """Answer all lines; return the exit status."""
    forgo_pools()
    _check(arguments)
    allow_folder(arguments)
    given = places.Wishes(
        prompt=arguments.prompt,
        body=arguments.body,
        # A server, and machines of a cluster, may not have the folder.
        inline=bool(arguments.base_url or arguments.ray_address),
        most_image_bytes=_most_image_bytes(arguments),
    )
    with (
        places.lines_of(arguments.input, given) as source,
        places.local_output(arguments.output, overwrite=arguments.overwrite) as output,
        places.local_output(
            errors_place(arguments.errors, arguments.output), overwrite=arguments.overwrite
        ) as errors,
    ):
        return _run(arguments, Files(source, output, errors))


def _most_image_bytes(arguments: argparse.Namespace) -> int:
    """Return the bytes of the largest image that may be put into a line, there as base64."""
    [model, *_] = arguments.listed_models or [arguments]
    given: int | None = getattr(model, "max_media_bytes", None)
    line_bytes: int = arguments.max_line_mb * MIB
    return min(given or MediaConfig.max_media_bytes, line_bytes // 4 * 3)


def allow_folder(arguments: argparse.Namespace) -> None:
    """Open the folder of the input, if it is one, for the engines, unless flags name another."""
    if not places.is_folder(arguments.input) or arguments.base_url:
        return
    for model in arguments.listed_models or [arguments]:
        if not getattr(model, "allowed_local_media_path", None):
            model.allowed_local_media_path = str(places.local_path(arguments.input).absolute())


def _run(arguments: argparse.Namespace, files: Files) -> int:
    if not os.environ.get("SENSORIUM_LOG_LEVEL") and bar_class() is not LoggedBar:
        environment.set_log_level("warning")  # a bar is shown, or no progress is wanted
    from sensorium.cli.batch.remote import RemoteCaller
    from sensorium.cli.batch.run import local_caller, run_batch

    caller: Any
    if arguments.replicas is not None:
        return _run_on_ray(arguments, files)
    if arguments.base_url:
        at_once = REMOTE_AT_ONCE
        caller = RemoteCaller(
            arguments.base_url, api_key=_api_key(arguments), timeout=arguments.request_timeout
        )
    else:
        models = models_of(arguments)
        at_once = 2 * max(model.engine.scheduler.max_num_seqs for model in models)
        caller = local_caller(models)
    return run_batch(_job(arguments, files, at_once), caller)


def _run_on_ray(arguments: argparse.Namespace, files: Files) -> int:
    from sensorium.ray.cluster import require_ray

    require_ray()
    from sensorium.cli.batch.replicas import Cluster, run_on_ray
    from sensorium.ray.data.batch import Replicas
    from sensorium.ray.data.stages import gpus_of

    [model] = models_of(arguments)
    num_gpus = arguments.replica_gpus
    job = _job(arguments, files, 2 * model.engine.scheduler.max_num_seqs)
    replicas = Replicas(
        engines=arguments.replicas,
        preparing=arguments.media_replicas or arguments.replicas,
        rows=job.num_at_once,
        num_cpus=arguments.replica_cpus,
        num_gpus=gpus_of(model.engine) if num_gpus is None else num_gpus,
    )
    return run_on_ray(job, model, Cluster(arguments.ray_address, replicas))


def _job(arguments: argparse.Namespace, files: Files, at_once: int) -> Job:
    from sensorium.cli.batch.run import Job

    return Job(
        source=files.source.path,
        is_made=files.source.is_made,
        answers=files.answers,
        errors=files.errors,
        num_at_once=arguments.concurrency or at_once,
        max_line_bytes=arguments.max_line_mb * MIB,
        patience=PATIENCE,
        in_order=arguments.in_order,
        overwrite=arguments.overwrite,
        rerun_changed=arguments.rerun_changed,
    )


def models_of(arguments: argparse.Namespace) -> list[ServedConfig]:
    """Return the model, or those that a file of flags lists. Raises ConfigError."""
    models = [
        ServedConfig(
            engine=build_engine_config(model),
            server=ServerConfig(
                served_model_name=tuple(model.served_model_name),
                max_body_bytes=arguments.max_line_mb * MIB,
                disable_access_log=True,
            ),
        )
        for model in arguments.listed_models or [arguments]
    ]
    check_models(models)
    return models


def _check(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for values that cannot be used."""
    _check_cluster(arguments)
    for name in ("concurrency", "max_line_mb", "replicas", "media_replicas"):
        value = getattr(arguments, name)
        if value is not None and not 1 <= value <= 1 << 20:
            raise ConfigError(f"{name} must be from 1 to {1 << 20}, got {value}.", param=name)
    if not arguments.request_timeout > 0:
        raise ConfigError("request_timeout must be greater than 0.", param="request_timeout")
    files = {
        "The input": arguments.input,
        "--output": arguments.output,
        "--errors": errors_place(arguments.errors, arguments.output),
    }
    for (name, path), (other_name, other) in itertools.combinations(files.items(), 2):
        if _is_same(path, other):
            raise ConfigError(f"{name} and {other_name} must be two files.")


def _check_cluster(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for flags that do not go together."""
    if arguments.replicas is None:
        for name in ("ray_address", "media_replicas", "replica_gpus"):
            if getattr(arguments, name) is not None:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} needs --replicas, the number of engines.", param=name)
        return
    if arguments.base_url:
        raise ConfigError(
            "--replicas starts engines, and --base-url uses those of a server: give one of them.",
            param="replicas",
        )
    if len(arguments.listed_models or ()) > 1:
        raise ConfigError(
            "--replicas runs one model; the file of flags lists several.", param="replicas"
        )
    for name in ("replica_cpus", "replica_gpus"):
        value = getattr(arguments, name)
        if value is not None and not 0 <= value <= 1 << 16:
            raise ConfigError(f"{name} must be from 0 to {1 << 16}, got {value}.", param=name)


def errors_place(given: str | None, output: str) -> str:
    """Return the file for lines that failed: the one given, or one named after the output."""
    if given:
        return given
    return output.removesuffix(".jsonl").removesuffix(".parquet") + ".errors.jsonl"


def _is_same(given: str, other: str) -> bool:
    """Return true for two names of one file, through links as well."""
    if places.is_url(given) or places.is_url(other):
        return given == other
    path, other_path = places.local_path(given), places.local_path(other)
    try:
        return path.samefile(other_path)
    except OSError:  # one is not there yet
        return os.path.realpath(path) == os.path.realpath(other_path)


def _api_key(arguments: argparse.Namespace) -> str | None:
    keys = (arguments.api_key, *environment.api_keys_of_environment())
    return next(filter(None, keys), None) or os.environ.get("OPENAI_API_KEY")
