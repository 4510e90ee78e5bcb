"""The sampling flags of ``chat`` and ``generate``."""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple


class _Flag(NamedTuple):
    name: str
    kind: type
    help: str


_FLAGS = (
    _Flag("max_tokens", int, "most tokens of an answer; up to the context's end when not given"),
    _Flag("temperature", float, "0 always takes the most likely token"),
    _Flag("top_p", float, "keep the most likely tokens up to this probability together"),
    _Flag("top_k", int, "keep this many of the most likely tokens; 0 keeps all"),
    _Flag("min_p", float, "keep tokens at least this likely, relative to the best"),
    _Flag("seed", int, "makes the answer repeatable"),
    _Flag("min_tokens", int, "fewest tokens of an answer"),
    _Flag("presence_penalty", float, "against tokens that occurred, -2 to 2"),
    _Flag("frequency_penalty", float, "against tokens by how often they occurred, -2 to 2"),
    _Flag("repetition_penalty", float, "divides the logits of tokens that occurred"),
)


def add_sampling_flags(parser: argparse.ArgumentParser, *, samples: bool = False) -> None:
    """Add the flags; ``samples``: also ``--n``. Those not given leave no trace."""
    group = parser.add_argument_group("sampling")
    for flag in _FLAGS:
        group.add_argument(
            f"--{flag.name.replace('_', '-')}",
            # The engine has a seed of its own, for random weights.
            dest=f"sampling_{flag.name}",
            type=flag.kind,
            metavar="N",
            default=argparse.SUPPRESS,
            help=flag.help,
        )
    group.add_argument(
        "--stop",
        dest="sampling_stop",
        action="append",
        metavar="TEXT",
        default=argparse.SUPPRESS,
        help="end the answer where this text comes; repeatable",
    )
    if samples:
        group.add_argument(
            "--n",
            dest="sampling_n",
            type=int,
            metavar="N",
            default=argparse.SUPPRESS,
            help="number of answers",
        )


def sampling_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """The values that were given, by the names of ``SamplingParams`` (and of the API's fields)."""
    prefix = "sampling_"
    given = vars(arguments)
    return {k.removeprefix(prefix): v for k, v in given.items() if k.startswith(prefix)}
