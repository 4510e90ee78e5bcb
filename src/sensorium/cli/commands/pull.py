"""``sensorium pull MODEL``: download a model ahead of its use."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from sensorium.cli.flags import add_flags, add_progress_flag, build_engine_config, print_warning
from sensorium.config import ENGINE_SECTIONS
from sensorium.errors import ConfigError

DESCRIPTION = (
    "Download a model from the Hugging Face hub, so that serve and LLM(...) start without waiting. "
    "Before the weights are fetched it says how many bytes that takes, on disk and in memory, and "
    "refuses a model that cannot run here. Files that are here already stay, and a download that "
    "broke off, or was ended, goes on where it was."
)
COMMON = {
    "--dry-run": "--dry-run",
    "--force": "--force",
    "--revision": "--revision v1.0",
    "--download-dir": "--download-dir /srv/models",
    "--dtype": "--dtype float32",
    "--quantization": "--quantization int8",
    "--device": "--device cpu",
    "--max-model-len": "--max-model-len 8k",
    "--json": "--json",
    "--no-progress": "--no-progress",
}


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "pull",
        help="download a model, and say what it needs",
        usage="%(prog)s MODEL [options]",
        description=DESCRIPTION,
    )
    parser.add_argument("model_argument", metavar="MODEL", help="Hugging Face id")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what is needed and download no weights"
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="download a model, too, for which there is not enough memory",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    add_progress_flag(parser)
    add_flags(parser, ENGINE_SECTIONS["model"], "model", ("model",))
    parser.common = COMMON
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Say what the model needs and download it."""
    arguments.model = arguments.model_argument
    config = build_engine_config(arguments)
    options = config.model
    from sensorium.models.loading import checkpoint

    if checkpoint.is_local(options.model):
        raise ConfigError(f"{options.model!r} is here already: there is nothing to download.")
    from sensorium.models.needs import needs_of

    needs = needs_of(options, config.cache.kv_cache_dtype, config.parallel)
    if not arguments.json:
        print("\n".join(needs.lines()), flush=True)
    problem = needs.problem()
    if problem is not None and not (arguments.force and needs.fits_on_disk):
        raise ConfigError(f"{options.model} is not downloaded: {problem}")
    if problem is not None:
        print_warning(problem)
    folder = None if arguments.dry_run else str(_downloaded(options))
    if arguments.json:
        json.dump({**needs.as_dict(), "folder": folder}, sys.stdout, indent=2)
        print()
    elif folder is not None:
        print(f"{options.model} is in {folder}")
    return 0


def _downloaded(options: Any) -> Any:
    from sensorium.models import loader

    return loader.fetch(options.model, options.revision, options.download_dir, options.mmproj)
