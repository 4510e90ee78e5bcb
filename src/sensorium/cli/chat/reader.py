"""Input of a conversation: an editor in a terminal, lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from sensorium.cli.chat.history import ChatHistory, default_path

if TYPE_CHECKING:
    from prompt_toolkit.completion import CompleteEvent, Completion
    from prompt_toolkit.document import Document
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

FENCE = '"""'
"""Begins and ends a message of several lines."""


class Reader(Protocol):
    """Source of messages and commands."""

    def read(self) -> str | None:
        """Return the next message; None at the end. Raises KeyboardInterrupt for Ctrl-C."""


class LineReader:
    """Messages in the lines of standard input; ``FENCE`` encloses one of several lines."""

    def read(self) -> str | None:
        """Return the next message."""
        line = sys.stdin.readline()
        if not line:
            return None
        lines = [line.rstrip("\n")]
        while is_open("\n".join(lines)):
            line = sys.stdin.readline()
            if not line:
                break
            lines.append(line.rstrip("\n"))
        return unfenced("\n".join(lines))


class TerminalReader:
    """An editor with history, completion and several lines.

    Enter sends; Alt-Enter and Ctrl-J begin a new line, and so does Enter behind a backslash or
    within ``FENCE``. Pasted text keeps its lines.
    """

    def __init__(self, commands: Sequence[str], paths_after: Sequence[str], *, keep: bool) -> None:
        from prompt_toolkit import PromptSession

        self._session: PromptSession[str] = PromptSession(
            history=ChatHistory(default_path() if keep else None),
            completer=_completer(commands, paths_after),
            complete_while_typing=False,
            multiline=True,
            key_bindings=_key_bindings(),
            prompt_continuation="… ",
            enable_open_in_editor=True,
        )

    def read(self) -> str | None:
        """Return the next message."""
        try:
            return unfenced(self._session.prompt("> "))
        except EOFError:
            return None


def is_open(text: str) -> bool:
    """Return whether a text begins with ``FENCE`` and lacks that at its end."""
    text = text.strip()
    return text.startswith(FENCE) and not (len(text) >= 2 * len(FENCE) and text.endswith(FENCE))


def unfenced(text: str) -> str:
    """Return a text without ``FENCE`` around it."""
    stripped = text.strip()
    if not stripped.startswith(FENCE):
        return text
    return stripped.removeprefix(FENCE).removesuffix(FENCE).strip("\n")


def _key_bindings() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        before = buffer.document.current_line_before_cursor
        if before.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    @bindings.add("c-j")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


def _completer(commands: Sequence[str], paths_after: Sequence[str]) -> Any:
    """Return a completer of commands, and of the paths behind some of them."""
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    paths = PathCompleter(expanduser=True)

    class CommandCompleter(Completer):
        def get_completions(
            self, document: Document, complete_event: CompleteEvent
        ) -> Iterable[Completion]:
            text = document.text_before_cursor
            word, space, rest = text.partition(" ")
            if space and word in paths_after:
                yield from paths.get_completions(Document(rest), complete_event)
            elif text.startswith("/") and not space:
                for name in commands:
                    if name.startswith(text):
                        yield Completion(name, -len(text))

    return CommandCompleter()
