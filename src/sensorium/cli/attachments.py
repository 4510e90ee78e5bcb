"""Pictures that a user names on the command line or pastes into a line of chat."""

from __future__ import annotations

import base64
import mimetypes
import re
import shlex
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sensorium.errors import ConfigError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_REMOTE = ("http://", "https://", "data:")
# A quoted path, or one whose spaces are escaped, as terminals write a file that is dropped on them.
_WORD = re.compile(r"""'[^']+'|"[^"]+"|(?:\\.|[^\s\\])+""")


def image_part(source: str) -> dict[str, Any]:
    """The content part for a path or URL; a file is read now, into a ``data:`` URL.

    Raises ConfigError for a file that cannot be read.
    """
    return {"type": "image_url", "image_url": {"url": _url(source)}}


def _url(source: str) -> str:
    if source.startswith(_REMOTE):
        return source
    path = _path(source)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{source!r} cannot be read: {error.strerror}.") from error
    kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _path(source: str) -> Path:
    if source.startswith("file:"):
        source = unquote(urlsplit(source).path)
    return Path(source).expanduser()


def split_line(line: str) -> tuple[str, list[str]]:
    """The text of a line, and the existing picture files that it names, which are taken out of it."""
    found: list[str] = []

    def take(match: re.Match[str]) -> str:
        source = _unquoted(match[0])
        if source.lower().endswith(SUFFIXES) and _path(source).is_file():
            found.append(source)
            return ""
        return match[0]

    text = _WORD.sub(take, line)
    return (" ".join(text.split()) if found else line.strip()), found


def _unquoted(word: str) -> str:
    try:
        parts = shlex.split(word)
    except ValueError:
        return word
    return parts[0] if len(parts) == 1 else word


def user_message(text: str, images: list[str]) -> dict[str, Any]:
    """A message with the pictures before the text. Raises ConfigError for a file that cannot be
    read.
    """
    parts = [image_part(image) for image in images]
    content: Any = [*parts, {"type": "text", "text": text}] if parts else text
    return {"role": "user", "content": content}
