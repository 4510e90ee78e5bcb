"""A conversation: its messages, the attachments of the next one, and its commands."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from sensorium.cli.attachments import KINDS, Attachment, split_line, user_message
from sensorium.cli.chat.reader import Reader
from sensorium.cli.chat.remote import Thought
from sensorium.cli.chat.screen import Screen
from sensorium.errors import ConfigError, SensoriumError

HELP = """/image PATH   attach an image to the next message (or /video, /audio, /file, or drop one)
/system TEXT  set the system message; /system alone shows it, /system "" removes it
/retry        ask the last question again
/clear        start a new conversation
/save FILE    write the conversation to a file, /load FILE reads it
/help         show these commands
/exit         quit, as Ctrl-D does; Ctrl-C stops an answer

Enter sends; Alt-Enter, Ctrl-J or a backslash before Enter begin a new line, and so does Enter
between \"\"\" and \"\"\". Arrow keys bring back earlier lines, Tab completes commands and paths."""
COMMANDS = (
    *(f"/{modality}" for modality in KINDS),
    *("/system", "/retry", "/clear", "/reset", "/save", "/load", "/help", "/exit", "/quit"),
)
PATHS_AFTER = (*(f"/{modality}" for modality in KINDS), "/save", "/load")
"""Commands that take a path."""
FORMAT = "sensorium_chat"
"""Key by which a saved conversation is known; its value is the version of the format."""
_COMMAND = re.compile(r"/[a-z]+")
MOST_BYTES = 1 << 30
"""Size of a saved conversation that is read."""


class Model(Protocol):
    """A source of answers."""

    name: str

    def stream(
        self, messages: Sequence[Mapping[str, Any]], sampling: Mapping[str, Any]
    ) -> Iterator[str]:
        """Yield the answer piece by piece."""

    def close(self) -> None:
        """Release all resources."""


class Session:
    """A conversation with a model.

    Args:
        model: answers.
        sampling: values for each request.
        reader: gives messages and commands.
        screen: shows answers.
        system: the system message.
    """

    def __init__(
        self,
        model: Model,
        sampling: Mapping[str, Any],
        *,
        reader: Reader,
        screen: Screen,
        system: str | None = None,
    ) -> None:
        self._model = model
        self._sampling = sampling
        self._reader = reader
        self._screen = screen
        self.system = system
        self.messages: list[dict[str, Any]] = []
        self.attachments: list[Attachment] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/system": self._set_system,
            "/retry": self._retry,
            "/clear": self._clear,
            "/reset": self._clear,
            "/save": self._save,
            "/load": self._load,
            "/help": lambda _: self._screen.say(HELP),
            **{f"/{modality}": self._attacher(modality) for modality in KINDS},
        }

    def turn(self) -> bool:
        """Read a message or command and act on it; return False when the user quits."""
        try:
            line = self._reader.read()
        except KeyboardInterrupt:
            self._screen.say("Ctrl-D or /exit quits.")
            return True
        if line is None:
            return False
        text, attachments = split_line(line)
        word, _, rest = line.strip().partition(" ")
        if word in ("/exit", "/quit"):
            return False
        try:
            # Anything else that begins with a slash may be the path of a file.
            if word in self._commands:
                self._commands[word](rest.strip())
            elif _COMMAND.fullmatch(word) and not attachments:
                self._screen.say(HELP)
            else:
                self._attach(attachments)
                if text:
                    self._ask_next(text)
                elif attachments:
                    self._say_attached()
        except SensoriumError as error:
            self._screen.fail(error.message)
        return True

    def attach(self, attachments: Sequence[Attachment]) -> None:
        """Attach media to the next message. Raises ConfigError for one that cannot be read."""
        for attachment in attachments:
            attachment.part()
        self._attach(attachments)

    def _attach(self, attachments: Sequence[Attachment]) -> None:
        self.attachments += attachments
        for attachment in attachments:
            self._screen.show(attachment)

    def _say_attached(self) -> None:
        self._screen.say(f"{len(self.attachments)} attached; now ask a question.")

    def _ask_next(self, text: str) -> None:
        """Ask with what is attached, which belongs to this message alone."""
        if self._ask(user_message(text, self.attachments)):
            self.attachments = []

    def _attacher(self, modality: str) -> Callable[[str], None]:
        def run(argument: str) -> None:
            if not argument:
                raise ConfigError(f"/{modality} needs the path or URL of {KINDS[modality]}.")
            named = [attachment.source for attachment in split_line(argument)[1]]
            self.attach([Attachment(modality, source) for source in named or [argument]])
            self._say_attached()

        return run

    def _ask(self, message: dict[str, Any]) -> bool:
        """Send the conversation with a new message; drop that if there is no answer.

        Returns:
            True if there is an answer, or the part of one.

        Raises:
            SensoriumError: the model refused or failed.
        """
        answer = ""
        stopped = False
        self.messages.append(message)
        opening = [{"role": "system", "content": self.system}] if self.system else []
        try:
            with self._screen.answer() as sink:
                try:
                    for piece in self._model.stream([*opening, *self.messages], self._sampling):
                        if isinstance(piece, Thought):
                            sink.think(piece)
                            continue
                        answer += piece
                        sink.write(piece)
                except KeyboardInterrupt:
                    stopped = True
        except SensoriumError:
            self.messages.pop()
            raise
        if stopped:
            self._screen.say("[stopped]" if answer else "[stopped before the answer began]")
        if stopped and not answer:
            self.messages.pop()
            return False
        self.messages.append({"role": "assistant", "content": answer})
        return True

    def _retry(self, _: str) -> None:
        places = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not places:
            raise ConfigError("There is no question to ask again.")
        before, question = self.messages, self.messages[places[-1]]
        self.messages = before[: places[-1]]
        answered = False
        try:
            answered = self._ask(question)
        finally:
            if not answered:  # the old answer stays
                self.messages = before

    def _clear(self, _: str) -> None:
        self.messages, self.attachments = [], []
        self._screen.say("A new conversation.")

    def _set_system(self, text: str) -> None:
        if text in ('""', "''"):
            self.system = None
            self._screen.say("There is no system message now.")
        elif text:
            self.system = text
            self._screen.say("The system message is set.")
        else:
            self._screen.say(self.system or "There is no system message.")

    def _save(self, name: str) -> None:
        path = _named(name, "/save")
        saved = {
            FORMAT: 1,
            "model": self._model.name,
            "system": self.system,
            "messages": self.messages,
        }
        try:
            if path.exists():
                _read(path)  # refuses to overwrite anything else
            descriptor, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(saved, file, ensure_ascii=True, indent=1)
            os.replace(unfinished, path)
        except OSError as error:
            raise ConfigError(f"{name!r} cannot be written: {error.strerror}.") from error
        self._screen.say(f"{len(self.messages)} messages saved in {path}.")

    def _load(self, name: str) -> None:
        saved = _read(_named(name, "/load"))
        self.system, self.messages, self.attachments = saved["system"], saved["messages"], []
        self._screen.say(f"{len(self.messages)} messages loaded.")


def _named(name: str, command: str) -> Path:
    if not name:
        raise ConfigError(f"{command} needs the name of a file.")
    if "\0" in name:
        raise ConfigError(f"{name!r} is no name of a file.")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{name!r}: {error}.") from error


def _read(path: Path) -> dict[str, Any]:
    """Return a saved conversation. Raises ConfigError for anything else."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ConfigError(f"{str(path)!r} is larger than {MOST_BYTES} bytes.")
        saved = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{str(path)!r} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError):
        saved = None
    if not isinstance(saved, dict) or FORMAT not in saved or not _is_whole(saved):
        raise ConfigError(f"{str(path)!r} is not a conversation saved by /save.")
    return saved


def _is_whole(saved: Mapping[str, Any]) -> bool:
    messages, system = saved.get("messages"), saved.get("system")
    return (
        (system is None or isinstance(system, str))
        and isinstance(messages, list)
        and all(
            isinstance(message, dict)
            and message.get("role") in ("user", "assistant")
            and isinstance(message.get("content"), str | list)
            for message in messages
        )
    )
