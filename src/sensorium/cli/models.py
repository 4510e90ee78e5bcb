"""``sensorium models``: the families that run, and what they take."""

from __future__ import annotations

import argparse
import json
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "models",
        help="the families that run, and what they take",
        description="Print the model families that run, what they take, and a checkpoint of each.",
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects")
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Print one line for each family."""
    from sensorium.models.registry import FAMILIES

    if arguments.json:
        found = [
            {
                "family": family.name,
                "takes": ["text", *family.modalities],
                "architectures": list(family.architectures),
                "checkpoint": family.checkpoint,
            }
            for family in FAMILIES
        ]
        print(json.dumps(found, indent=2))
        return 0
    rows = [("family", "takes", "architecture", "checkpoint, for example")]
    for family in FAMILIES:
        takes, architectures = ", ".join(("text", *family.modalities)), family.architectures
        rows.append((family.name, takes, ", ".join(architectures), family.checkpoint))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print("  ".join(padded).rstrip())
    return 0
