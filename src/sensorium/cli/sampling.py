"""Sampling flags of ``sensorium chat`` and ``sensorium generate``."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from sensorium.bounds import NUMERIC, bounds_of
from sensorium.params import SamplingParams

_HELP = {
    "max_tokens": "maximum number of tokens of an answer; to the end of the context if not given",
    "temperature": "0 always selects the most likely token",
    "top_p": "keep the most likely tokens whose probabilities add up to this",
    "top_k": "keep this many of the most likely tokens; 0 keeps all",
    "min_p": "keep tokens at least this likely, relative to the most likely one",
    "seed": "makes the answer reproducible",
    "min_tokens": "minimum number of tokens of an answer",
    "presence_penalty": "penalty for tokens that were generated before",
    "frequency_penalty": "penalty for tokens by how often they were generated before",
    "repetition_penalty": "divides the logits of tokens that occurred before",
    "n": "number of answers",
}


def add_sampling_flags(parser: argparse.ArgumentParser, *, samples: bool = False) -> None:
    """Add the flags; one that is not given leaves no attribute.

    Args:
        parser: of the command.
        samples: add ``--n``, too.
    """
    group = parser.add_argument_group("sampling")
    fields = {field.name: field for field in dataclasses.fields(SamplingParams)}
    for name, text in _HELP.items():
        if name == "n" and not samples:
            continue
        group.add_argument(
            f"--{name.replace('_', '-')}",
            # The engine has a seed of its own, for random weights.
            dest=f"sampling_{name}",
            type=NUMERIC[str(fields[name].type)],
            metavar="N",
            default=argparse.SUPPRESS,
            help=f"{text} ({bounds_of(fields[name])})",
        )
    group.add_argument(
        "--stop",
        dest="sampling_stop",
        action="append",
        metavar="TEXT",
        default=argparse.SUPPRESS,
        help="end the answer before this text; repeatable",
    )


def sampling_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the given values by the names of ``SamplingParams`` (and of the API's fields)."""
    prefix = "sampling_"
    given = vars(arguments)
    return {k.removeprefix(prefix): v for k, v in given.items() if k.startswith(prefix)}
