"""Images of a folder as lines of requests.

Links are followed to files of the folder only. What cannot become a request becomes the error of
its row: an image that is too large, a link that leads out of the folder, something that is no file.
"""

from __future__ import annotations

import hashlib
import mimetypes
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from sensorium.cli.batch.tables import CHAT, conversation, data_url, line
from sensorium.errors import ConfigError, MediaRefusedError, MediaTooLargeError, RequestError
from sensorium.server.batches.lines import Refusal
from sensorium.server.batches.urls import without_secrets

IMAGES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".heic"}
)
"""Ends of the names of images."""
_OF_FILES = (PermissionError, FileNotFoundError, IsADirectoryError)
"""Errors that concern one file, wherever it is."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of images.

    Attributes:
        system: File system of fsspec.
        place: Path of the folder there.
        is_local: The files are this machine's.
        inline: Put the images into the requests, which else name their files.
        most_bytes: Bytes of the largest image that is put into a request.
    """

    system: Any
    place: str
    is_local: bool
    inline: bool
    most_bytes: int

    def lines(self, prompt: str, body: Mapping[str, Any]) -> Iterator[bytes]:
        """Yield a request for each image, in the order of their paths, or a refused one.

        Raises ConfigError when there is none.
        """
        found = self.system.find(self.place)
        paths = sorted(path for path in found if Path(path).suffix.lower() in IMAGES)
        if not paths:
            raise ConfigError(f"There is no image below {without_secrets(self.place)!r}.")
        for path in paths:
            name = path.removeprefix(self.place.rstrip("/")).lstrip("/")
            # Names of files are bytes; those that are no text have no other form in JSON.
            name = os.fsencode(name).decode(errors="backslashreplace")
            try:
                version = self._version(path) if self.is_local else None
                url = self._inlined(path) if self.inline else Path(path).as_uri()
            except RequestError as error:
                refusal = Refusal(error.code, error.message, "image")
                yield line(name, CHAT, None, refused=refusal)
                continue
            identity = _identity(name, version or url, prompt, body)
            made = {**body, "messages": conversation(url, prompt)}
            yield line(name, CHAT, made, identity=identity)

    def _version(self, path: str) -> str:
        """Return what changes with the contents of a local file: its size and time.

        Raises MediaRefusedError for what is no file of the folder.
        """
        real, folder = os.path.realpath(path), os.path.realpath(self.place)
        if os.path.commonpath([real, folder]) != folder:
            raise MediaRefusedError("The image is a link that leads out of the folder.")
        try:
            status = os.stat(real)
        except OSError as error:
            raise MediaRefusedError(f"The image cannot be read: {error.strerror}.") from error
        if not stat.S_ISREG(status.st_mode):
            raise MediaRefusedError("The image is not a regular file.")
        return f"{status.st_size}-{status.st_mtime_ns}"

    def _inlined(self, path: str) -> str:
        """Return an image as a URL. Raises MediaTooLargeError, MediaRefusedError.

        OSError where the file system, and not the file, is what fails.
        """
        try:
            with self.system.open(path, "rb") as file:
                data = file.read(self.most_bytes + 1)
        except OSError as error:
            # Of a file system elsewhere, most errors are those of the connection.
            if not (self.is_local or isinstance(error, _OF_FILES)):
                raise
            what = error.strerror or type(error).__name__
            raise MediaRefusedError(f"The image cannot be read: {what}.") from error
        if len(data) > self.most_bytes:
            raise MediaTooLargeError(
                f"The image has more than {self.most_bytes} bytes, the limit of "
                "--max-media-bytes and three quarters of --max-line-mb."
            )
        return data_url(data, mimetypes.guess_type(path)[0] or "image/png")


def _identity(name: str, version: str, prompt: str, body: Mapping[str, Any]) -> str:
    """Return what tells a request about an image from others, however the image travels.

    ``name``: path below the folder. ``version``: what changes with the image's contents.
    """
    told = msgspec.json.encode([name, version, prompt, body])
    return hashlib.blake2b(told, digest_size=16).hexdigest()
