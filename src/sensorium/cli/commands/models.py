"""``sensorium models``: list of supported models; of one, what ``sensorium info`` says."""

from __future__ import annotations

import argparse
import json
from typing import Any

from sensorium.cli.commands import info
from sensorium.errors import ConfigError

COMMON = {
    "--mmproj": "--mmproj mmproj-model-f16.gguf",
    "--revision": "--revision v1.0",
    "--dtype": "--dtype float32",
    "--quantization": "--quantization int8",
    "--max-model-len": "--max-model-len 8k",
    "--json": "--json",
}


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "models",
        help="list the supported models and what they take, or describe one",
        usage="%(prog)s [MODEL] [options]",
        description="Print the supported model families, what they take, and a checkpoint of each; "
        "then embedding models, and tested models that run through transformers' own code. Other "
        "models of transformers run the same way (docs/other_models.md). With a MODEL, print what "
        "it is and needs, as sensorium info does; the flags are for that.",
    )
    info.add_options(parser, "print a JSON list; with a MODEL, an object")
    parser.common = COMMON
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Print a line per family, embedding model and tested model of transformers; or of one model.

    The exit status is 1 for a model that cannot run here. Raises ConfigError for flags
    of a model where none is named.
    """
    if arguments.model_argument is not None:
        return info.print_needs(arguments)
    if info.is_configured(arguments):
        raise ConfigError("These flags describe one model: name it, as in sensorium models demo.")
    found = _families() + _embedders() + _others()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    rows = [("family", "takes", "makes", "architecture", "checkpoint, for example")]
    for row in found:
        takes, architectures = ", ".join(row["takes"]), ", ".join(row["architectures"])
        rows.append((row["family"], takes, row["makes"], architectures, row["checkpoint"]))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print("  ".join(padded).rstrip())
    return 0


def _families() -> list[dict[str, Any]]:
    from sensorium.models.registry import FAMILIES

    return [
        {
            "family": family.name,
            "takes": ["text", *family.modalities],
            "makes": "text",
            "architectures": list(family.architectures),
            "checkpoint": family.checkpoint,
        }
        for family in FAMILIES
    ]


def _embedders() -> list[dict[str, Any]]:
    from sensorium.models.embedder import PUBLISHED
    from sensorium.models.registry import resolve

    return [
        {
            "family": name,
            "takes": ["text", *resolve({"architectures": [architecture]}).modalities],
            "makes": "embeddings",
            "architectures": [architecture],
            "checkpoint": checkpoint,
        }
        for name, checkpoint, architecture in PUBLISHED
    ]


def _others() -> list[dict[str, Any]]:
    from sensorium.models.families.hf import EXAMPLES

    return [
        {
            "family": f"{name} (through transformers)",
            "takes": ["text", *modalities],
            "makes": "text",
            "architectures": [architecture],
            "checkpoint": checkpoint,
        }
        for name, checkpoint, architecture, modalities in EXAMPLES
    ]
