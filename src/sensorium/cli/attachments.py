"""Media and other files named on the command line or in a line of ``sensorium chat``."""

from __future__ import annotations

import argparse
import base64
import mimetypes
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from sensorium.errors import ConfigError

KINDS = {
    "image": "an image",
    "video": "a video",
    "audio": "an audio file",
    "file": "a PDF, or any of these",
}
"""Modalities, and files whose content says what they are."""
SUFFIXES = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"), "image"),
    **dict.fromkeys((".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi"), "video"),
    **dict.fromkeys((".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".m4a", ".aac"), "audio"),
    ".pdf": "file",
}
_MOST_SHOWN = 80
_WEB = ("http://", "https://")
_REMOTE = (*_WEB, "data:")
# A quoted path, or one with escaped spaces: terminals write dropped files so. A quote within quotes
# stands as '\'' or '"'"'.
_WORD = re.compile(r"""'[^']+'(?:(?:\\'|"'")'[^']*')*|"(?:\\.|[^"\\])+"|(?:\\.|[^\s\\])+""")


_SPACES = re.compile(r"[ \t]+")


class Attachment(NamedTuple):
    """A path or URL, and a key of ``KINDS``."""

    modality: str
    source: str

    @property
    def is_remote(self) -> bool:
        """Return whether the source is a URL that the engine fetches, or data itself."""
        return self.source.startswith(_REMOTE)

    @property
    def path(self) -> Path:
        """Return the file. Raises RuntimeError where it lies in the home of an unknown user."""
        return _path(self.source)

    @property
    def name(self) -> str:
        """Return a short name for people: that of the file, or the beginning of the URL."""
        if self.is_remote:
            return self.source[:_MOST_SHOWN]
        return self.path.name

    def part(self) -> dict[str, Any]:
        """Return the content part of a message, a file as a ``data:`` URL.

        Raises:
            ConfigError: the file cannot be read.
        """
        url = _url(self.source)
        if self.modality == "file":
            remote = url.startswith(_WEB)
            file = {"file_url": url} if remote else {"file_data": url, "filename": self.name}
            return {"type": "file", "file": file}
        name = f"{self.modality}_url"
        return {"type": name, name: {"url": url}}


class _Attach(argparse.Action):
    """Collect attachments of all modalities in the order of their flags; ``const`` is one."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Append one attachment."""
        found = [*getattr(namespace, self.dest, ()), Attachment(self.const, values)]
        setattr(namespace, self.dest, found)


def add_attachment_flags(parser: argparse.ArgumentParser, whose: str) -> None:
    """Add ``--image``, ``--video``, ``--audio`` and ``--file``, which fill ``attachments``.

    Args:
        parser: of the command.
        whose: end of their help.
    """
    for modality, kind in KINDS.items():
        parser.add_argument(
            f"--{modality}",
            dest="attachments",
            action=_Attach,
            const=modality,
            default=[],
            metavar="PATH",
            help=f"{kind} (path or URL){whose}; repeatable",
        )


def _url(source: str) -> str:
    if source.startswith(_REMOTE):
        return source
    try:
        path = _path(source)
        data = path.read_bytes()
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{source!r} cannot be read: {reason}.") from error
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _path(source: str) -> Path:
    if source.startswith("file:"):
        source = unquote(urlsplit(source).path)
    return Path(source).expanduser()


def _is_file(source: str) -> bool:
    try:
        return _path(source).is_file()
    except (OSError, RuntimeError):  # the name is too long, or the user of ~user is unknown
        return False


def split_line(line: str) -> tuple[str, list[Attachment]]:
    """Split a line into its text and the existing media files and PDFs that it names."""
    found: list[Attachment] = []

    def take(match: re.Match[str]) -> str:
        source = _unquoted(match[0])
        modality = SUFFIXES.get(Path(source).suffix.lower())
        if modality is not None and _is_file(source):
            found.append(Attachment(modality, source))
            return ""
        return match[0]

    text = _WORD.sub(take, line)
    return (_SPACES.sub(" ", text).strip() if found else line.strip()), found


def _unquoted(word: str) -> str:
    try:
        parts = shlex.split(word)
    except ValueError:
        return word
    return parts[0] if len(parts) == 1 else word


def user_message(text: str, attachments: Iterable[Attachment]) -> dict[str, Any]:
    """Return a message with the media before the text.

    Raises:
        ConfigError: a file cannot be read.
    """
    parts: Sequence[Any] = [attachment.part() for attachment in attachments]
    content: Any = [*parts, {"type": "text", "text": text}] if parts else text
    return {"role": "user", "content": content}
