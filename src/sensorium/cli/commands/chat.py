"""``sensorium chat``: a conversation in the terminal, with images, video, audio and PDFs."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING, Any

from sensorium.cli.attachments import add_attachment_flags
from sensorium.cli.commands.serve import add_model_argument, take_model_argument
from sensorium.cli.flags import add_engine_flags, build_engine_config, engine_keywords
from sensorium.cli.sampling import add_sampling_flags, sampling_values
from sensorium.environment import api_keys_of_environment

if TYPE_CHECKING:
    from sensorium.cli.chat.reader import Reader
    from sensorium.cli.chat.screen import Screen
    from sensorium.cli.chat.session import Model

DESCRIPTION = (
    "Chat with a model. Without --base-url the model is loaded in this process. The path of an "
    "image, a video, an audio file or a PDF that is typed or dropped into a line is attached to "
    "it; /help lists commands. Without a terminal each line of the input is a message."
)
COMMON = {
    "--image": "--image photo.jpg",
    "--video": "--video clip.mp4",
    "--audio": "--audio question.wav",
    "--system": "--system 'Answer in one sentence.'",
    "--base-url": "--base-url http://127.0.0.1:8000",
    "--temperature": "--temperature 0",
    "--max-tokens": "--max-tokens 256",
    "--max-model-len": "--max-model-len 8k",
    "--quantization": "--quantization int8",
    "--config": "--config chat.yaml",
}


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "chat",
        help="chat with a model in the terminal",
        usage="%(prog)s [MODEL] [options]",
        description=DESCRIPTION,
    )
    add_model_argument(parser)
    parser.add_argument("--base-url", metavar="URL", help="address of a running server")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="key for that server; default: SENSORIUM_API_KEY, VLLM_API_KEY, APHRODITE_API_KEY",
    )
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    add_attachment_flags(parser, " for the first message")
    parser.add_argument(
        "--markdown",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="render answers as Markdown in a terminal (default: on)",
    )
    parser.add_argument(
        "--images",
        choices=("auto", "kitty", "iterm2", "sixel", "none"),
        default="auto",
        help="how the terminal shows images (default: auto, which asks it)",
    )
    parser.add_argument(
        "--history",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the lines that are typed in ~/.local/state/sensorium/chat_history (default: on)",
    )
    add_sampling_flags(parser)
    add_engine_flags(parser, without=("seed",))
    parser.common = COMMON
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Chat until the user quits."""
    from sensorium.cli.chat.session import Session

    take_model_argument(arguments)
    for attachment in arguments.attachments:
        attachment.part()  # report a wrong path before the model is loaded
    model = open_model(arguments)
    reader, screen = _reader(arguments), _screen(arguments)
    try:
        session = Session(
            model,
            sampling_values(arguments),
            reader=reader,
            screen=screen,
            system=arguments.system,
        )
        if sys.stdin.isatty():
            screen.say(f"{model.name} - /help for commands")
        session.attach(arguments.attachments)
        while session.turn():
            pass
    finally:
        model.close()
    return 0


def open_model(arguments: argparse.Namespace) -> Model:
    """Return the model behind ``--base-url``, or load one. Raises SensoriumError."""
    if arguments.base_url:
        from sensorium.cli.chat.remote import RemoteModel

        key = arguments.api_key or next(iter(api_keys_of_environment()), None)
        return RemoteModel(arguments.base_url, model=getattr(arguments, "model", None), api_key=key)
    build_engine_config(arguments)  # report mistakes before torch is imported
    from sensorium.cli.chat.local import LocalModel

    return LocalModel(**{"model": "demo", **engine_keywords(arguments)})


def _reader(arguments: argparse.Namespace) -> Reader:
    from sensorium.cli.chat.reader import LineReader, TerminalReader
    from sensorium.cli.chat.session import COMMANDS, PATHS_AFTER

    if sys.stdin.isatty() and sys.stdout.isatty():
        return TerminalReader(COMMANDS, PATHS_AFTER, keep=arguments.history)
    return LineReader()


def _screen(arguments: argparse.Namespace) -> Screen:
    from sensorium.cli.chat.screen import Screen, TerminalScreen

    if not sys.stdout.isatty():
        return Screen()
    with contextlib.suppress(AttributeError, ValueError):  # not the interpreter's own stream
        # A terminal without UTF-8 shows what it cannot as question marks.
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    return TerminalScreen(markdown=arguments.markdown, images=arguments.images)
