"""``sensorium chat``: a conversation in the terminal, with images, video and audio."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from sensorium.cli.attachments import (
    KINDS,
    Attachment,
    add_attachment_flags,
    split_line,
    user_message,
)
from sensorium.cli.commands.serve import add_model_argument, take_model_argument
from sensorium.cli.flags import add_engine_flags, build_engine_config, engine_keywords
from sensorium.cli.sampling import add_sampling_flags, sampling_values
from sensorium.environment import api_keys_of_environment
from sensorium.errors import SensoriumError

DESCRIPTION = (
    "Chat with a model. Without --base-url the model is loaded in this process. The path of an "
    "image, a video or an audio file that is typed or dropped into a line is attached to it."
)
HELP = """/image PATH   attach an image to the next message
/video PATH   attach a video
/audio PATH   attach an audio file
/reset        start a new conversation
/help         show these commands
/exit         quit (also Ctrl-D); Ctrl-C stops an answer"""
COMMANDS = ("/exit", "/quit", "/reset", "/help", *(f"/{modality}" for modality in KINDS))


class Model(Protocol):
    """A source of answers."""

    name: str

    def stream(
        self, messages: Sequence[Mapping[str, Any]], sampling: Mapping[str, Any]
    ) -> Iterator[str]:
        """Yield the answer piece by piece."""

    def close(self) -> None:
        """Release all resources."""


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
    add_sampling_flags(parser)
    add_engine_flags(parser, without=("seed",))
    parser.set_defaults(handler=run)


def run(arguments: argparse.Namespace) -> int:
    """Chat until the user quits."""
    take_model_argument(arguments)
    for attachment in arguments.attachments:
        attachment.part()  # report a wrong path before the model is loaded
    model = open_model(arguments)
    try:
        session = Session(model, sampling_values(arguments), system=arguments.system)
        session.attachments = list(arguments.attachments)
        if sys.stdin.isatty():
            _enable_line_editing()
            print(f"{model.name} - /help for commands")
        while session.turn():
            pass
    finally:
        model.close()
    return 0


def open_model(arguments: argparse.Namespace) -> Model:
    """Return the model behind ``--base-url``, or load one. Raises SensoriumError."""
    if arguments.base_url:
        from sensorium.cli.remote import RemoteModel

        key = arguments.api_key or next(iter(api_keys_of_environment()), None)
        return RemoteModel(arguments.base_url, model=getattr(arguments, "model", None), api_key=key)
    build_engine_config(arguments)  # report mistakes before torch is imported
    from sensorium.cli.local import LocalModel

    return LocalModel(**{"model": "demo", **engine_keywords(arguments)})


class Session:
    """A conversation: its messages, and the attachments of the next one."""

    def __init__(self, model: Model, sampling: Mapping[str, Any], *, system: str | None) -> None:
        self._model = model
        self._sampling = sampling
        self._opening = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, Any]] = list(self._opening)
        self.attachments: list[Attachment] = []

    def turn(self) -> bool:
        """Read a line and act on it; return False when the user quits."""
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return False
        except KeyboardInterrupt:
            print("\nType /exit to quit.")
            return True
        text, attachments = split_line(line)
        # Anything else that begins with a slash may be the path of a file.
        if line.partition(" ")[0] in COMMANDS or (line.startswith("/") and not attachments):
            return self._command(line.strip())
        self.attachments += attachments
        if text:
            self._ask(text)
        elif attachments:
            print(f"{len(self.attachments)} attached; now ask a question.")
        return True

    def _command(self, line: str) -> bool:
        word, _, rest = line.partition(" ")
        if word in ("/exit", "/quit"):
            return False
        if word == "/reset":
            self.messages, self.attachments = list(self._opening), []
            print("A new conversation.")
        elif word[1:] in KINDS and rest.strip():
            self._attach(word[1:], rest.strip())
        else:
            print(HELP)
        return True

    def _attach(self, modality: str, argument: str) -> None:
        named = [attachment.source for attachment in split_line(argument)[1]] or [argument]
        found = [Attachment(modality, source) for source in named]
        try:
            for attachment in found:
                attachment.part()
        except SensoriumError as error:
            print(f"error: {error.message}", file=sys.stderr)
            return
        self.attachments += found
        print(f"{len(self.attachments)} attached.")

    def _ask(self, text: str) -> None:
        """Send the conversation with a new message; drop the message if that fails."""
        answer = ""
        try:
            self.messages.append(user_message(text, self.attachments))
            for piece in self._model.stream(self.messages, self._sampling):
                answer += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except SensoriumError as error:
            self.messages.pop()
            print(f"error: {error.message}", file=sys.stderr)
            return
        print()
        self.attachments = []
        self.messages.append({"role": "assistant", "content": answer})


def _enable_line_editing() -> None:
    """Enable arrow keys and history if Python has readline."""
    import contextlib
    import importlib

    with contextlib.suppress(ImportError):
        importlib.import_module("readline")
