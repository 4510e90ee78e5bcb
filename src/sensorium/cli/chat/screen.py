"""Output of a conversation: Markdown and images in a terminal, plain text elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Literal, Protocol

from sensorium.cli.attachments import Attachment
from sensorium.cli.chat.control import harmless

Images = Literal["auto", "kitty", "iterm2", "sixel", "none"]


class Sink(Protocol):
    """Receiver of the pieces of an answer."""

    def write(self, text: str) -> object:
        """Show a piece."""

    def think(self, text: str) -> object:
        """Show that the model thinks, and what, until the answer begins."""


class Screen:
    """Standard output without a terminal: what the model writes, byte by byte."""

    @contextlib.contextmanager
    def answer(self) -> Iterator[Sink]:
        """Receive an answer within the context."""
        yield _Plain(escape=False)
        print(flush=True)

    def say(self, text: str) -> None:
        """Print a line about the conversation itself."""
        print(harmless(text))

    def fail(self, text: str) -> None:
        """Print an error."""
        sys.stdout.flush()
        print(f"error: {harmless(text)}", file=sys.stderr)

    def show(self, attachment: Attachment) -> None:
        """Show an attachment; without a terminal, nothing."""


class TerminalScreen(Screen):
    """A terminal.

    Args:
        markdown: render answers as Markdown.
        images: how images are shown; ``auto`` asks the terminal once.
        environ: environment variables, in which some terminals name themselves.
    """

    def __init__(
        self,
        *,
        markdown: bool = True,
        images: Images = "auto",
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._images = images
        self._environ = environ
        self._markdown = markdown and environ.get("TERM") != "dumb"

    @contextlib.contextmanager
    def answer(self) -> Iterator[Sink]:
        """Receive an answer within the context; its control characters are not obeyed."""
        if not self._markdown:
            yield _Plain(escape=True)
            print(flush=True)
            return
        from rich.console import Console

        from sensorium.cli.chat.markdown import MarkdownAnswer

        with MarkdownAnswer(Console(highlight=False, emoji=False)) as shown:
            yield _Escaped(shown)

    def show(self, attachment: Attachment) -> None:
        """Show an image where the terminal can; name what cannot be shown."""
        if attachment.modality == "image" and not attachment.is_remote and self._drawn(attachment):
            return
        self.say(f"[{attachment.modality}: {attachment.name}]")

    def _drawn(self, attachment: Attachment) -> bool:
        from sensorium.cli.chat import pictures

        if self._images == "auto":
            self._images = pictures.detect(self._environ, pictures.ask_terminal) or "none"
        if self._images == "none":
            return False
        image = pictures.thumbnail(str(attachment.path))
        if image is None:
            return False
        print(pictures.drawn(image, self._images))
        self.say(attachment.name)
        return True


class _Plain:
    """Pieces as they come."""

    def __init__(self, *, escape: bool) -> None:
        self._escape = escape

    def write(self, text: str) -> None:
        print(harmless(text) if self._escape else text, end="", flush=True)

    def think(self, text: str) -> None:
        """Show nothing: only the answer is written."""


class _Escaped:
    """Another sink that gets no control characters."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def write(self, text: str) -> None:
        self._sink.write(harmless(text))

    def think(self, text: str) -> None:
        self._sink.think(harmless(text))
