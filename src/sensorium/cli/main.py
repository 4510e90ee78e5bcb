"""Entry point of the command line: commands, and exit status of errors."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sensorium import __version__
from sensorium.cli.chat.control import shown
from sensorium.cli.commands import (
    batch,
    bench,
    chat,
    doctor,
    embed,
    generate,
    info,
    models,
    pull,
    serve,
)
from sensorium.cli.flags import Parser, flag_of
from sensorium.environment import set_progress
from sensorium.errors import ConfigError, SensoriumError
from sensorium.progress import write_lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status.

    Returns:
        0, 1 when a request failed, 2 when the configuration is wrong.
    """
    arguments = build_parser().parse_args(sys.argv[1:] if argv is None else argv)
    if hasattr(arguments, "progress"):
        set_progress(arguments.progress)
    write_lines()
    try:
        return int(arguments.handler(arguments) or 0)
    except SensoriumError as error:
        print(f"error: {shown(_in_words_of_flags(error), sys.stderr)}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 141


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = Parser(
        prog="sensorium",
        description="Run and serve multimodal language models.",
        epilog="'sensorium COMMAND --help' shows the common flags of a command, with examples; "
        "'--help all' shows all of them. To begin with: sensorium chat demo --image FILE.png",
    )
    parser.add_argument("--version", action="version", version=f"sensorium {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    serve.add_parser(commands)
    chat.add_parser(commands)
    generate.add_parser(commands)
    embed.add_parser(commands)
    batch.add_parser(commands)
    pull.add_parser(commands)
    info.add_parser(commands)
    doctor.add_parser(commands)
    models.add_parser(commands)
    bench.add_parser(commands)
    return parser


def _in_words_of_flags(error: SensoriumError) -> str:
    """Return the message with a field of the configuration written as its flag."""
    name = error.param
    if isinstance(error, ConfigError) and name and error.message.startswith(f"{name} "):
        return flag_of(name) + error.message[len(name) :]
    return error.message


if __name__ == "__main__":
    sys.exit(main())
