"""Forms with a file (``multipart/form-data``), handed on piece by piece as they arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from sensorium.errors import InvalidRequestError, counted
from sensorium.server.context import context_of

MOST_PARTS = 32
MOST_FIELD_BYTES = 64 * 1024
"""Bytes of all fields but the file together, and of the headers of one part."""
MOST_NAME_CHARS = 255
STALL_SECONDS = 60.0
"""Seconds without a byte after which an upload is given up."""

_PIECE = 64 * 1024


class FileSink(Protocol):
    """Destination of the content of a file."""

    async def write(self, data: bytes) -> None:
        """Take the next bytes."""
        ...


@dataclass(slots=True)
class Form:
    """Fields of a form as text, and the name of its file; None without a file."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None


async def read_form(
    request: Request, open_sink: Callable[[], Awaitable[FileSink]], *, file_field: str = "file"
) -> Form:
    """Read a form; the content of its field ``file_field`` goes to the sink, never whole in memory.

    Raises InvalidRequestError for another content type, a malformed form, a field that comes twice,
    or an upload that stalls; ClientDisconnect; EngineDeadError when the server begins to shut down;
    and what the sink raises.
    """
    reader = _Reader(_boundary(request), file_field, open_sink)
    with context_of(request).arrivals.arriving():
        more = True
        while more:
            try:
                message = await asyncio.wait_for(request.receive(), STALL_SECONDS)
            except TimeoutError:
                raise InvalidRequestError(
                    f"The upload stalled: no byte came for {STALL_SECONDS:g} s."
                ) from None
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body, more = message.get("body", b""), message.get("more_body", False)
            for start in range(0, len(body), _PIECE):
                await reader.feed(body[start : start + _PIECE])
    return reader.end()


def _boundary(request: Request) -> bytes:
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data":
        raise InvalidRequestError(
            f"Content-Type must be multipart/form-data, got {kind.decode('latin-1')[:100]!r}. "
            "With curl, use -F file=@NAME."
        )
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 256:
        raise InvalidRequestError(
            "The Content-Type multipart/form-data needs a boundary of 1 to 256 characters."
        )
    return boundary


class _Reader:
    """Turns the parser's callbacks, which cannot wait, into calls that can."""

    def __init__(
        self, boundary: bytes, file_field: str, open_sink: Callable[[], Awaitable[FileSink]]
    ) -> None:
        self._form = Form()
        self._file_field = file_field
        self._open_sink = open_sink
        self._sink: FileSink | None = None
        self._part: str | None = None
        self._text = bytearray()
        self._num_parts = 0
        self._num_text_bytes = 0
        self._header: tuple[bytearray, bytearray] = (bytearray(), bytearray())
        self._disposition = b""
        self._num_header_bytes = 0
        self._events: list[tuple[str, bytes]] = []
        self._is_whole = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": lambda: self._events.append(("begin", b"")),
                "on_part_data": self._collector("data"),
                "on_part_end": lambda: self._events.append(("end", b"")),
                "on_header_field": self._collector("name"),
                "on_header_value": self._collector("value"),
                "on_header_end": lambda: self._events.append(("header", b"")),
                "on_headers_finished": lambda: self._events.append(("headers", b"")),
                "on_end": lambda: self._events.append(("whole", b"")),
            },
        )

    def _collector(self, kind: str) -> Callable[[bytes, int, int], None]:
        def collect(data: bytes, start: int, end: int) -> None:
            self._events.append((kind, data[start:end]))

        return collect

    async def feed(self, data: bytes) -> None:
        """Parse a piece of the body, and hand on what it holds."""
        try:
            self._parser.write(data)
        except FormParserError:
            raise _malformed() from None
        events, self._events = self._events, []
        for kind, content in events:
            if kind == "data" and self._sink is not None and self._part == self._file_field:
                await self._sink.write(content)
            elif kind == "headers":
                await self._begin_content()
            else:
                self._note(kind, content)

    def end(self) -> Form:
        """Return the form. Raises InvalidRequestError for one that is cut off."""
        if not self._is_whole:
            raise InvalidRequestError("The form ends before its closing boundary.")
        return self._form

    def _note(self, kind: str, content: bytes) -> None:
        """Handle an event that needs no waiting."""
        if kind == "begin":
            self._num_parts += 1
            if self._num_parts > MOST_PARTS:
                raise InvalidRequestError(f"The form has more than {MOST_PARTS} parts.")
            self._disposition, self._num_header_bytes = b"", 0
            self._header = (bytearray(), bytearray())
            self._part = None
        elif kind in ("name", "value"):
            self._num_header_bytes += len(content)
            if self._num_header_bytes > MOST_FIELD_BYTES:
                raise InvalidRequestError(
                    f"The headers of a part have more than {MOST_FIELD_BYTES} bytes."
                )
            self._header[kind == "value"].extend(content)
        elif kind == "header":
            if bytes(self._header[0]).lower() == b"content-disposition":
                self._disposition = bytes(self._header[1])
            self._header = (bytearray(), bytearray())
        elif kind == "data":
            self._num_text_bytes += len(content)
            if self._num_text_bytes > MOST_FIELD_BYTES:
                raise InvalidRequestError(
                    f"The fields of the form have more than {MOST_FIELD_BYTES} bytes besides the "
                    "file."
                )
            self._text.extend(content)
        elif kind == "end":
            self._end_part()
        elif kind == "whole":
            self._is_whole = True

    async def _begin_content(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name")
        if name is None:
            raise InvalidRequestError("A part of the form has no name.")
        self._part = name.decode("utf-8", "replace")[:MOST_NAME_CHARS]
        if self._part in self._form.fields or (
            self._part == self._file_field and self._form.filename is not None
        ):
            raise InvalidRequestError(
                f"The form has the field {self._part!r} twice; send "
                f"{counted(1, 'file')} in each request.",
                param=self._part,
            )
        if self._part == self._file_field:
            self._form.filename = safe_name(options.get(b"filename", b""))
            self._sink = await self._open_sink()

    def _end_part(self) -> None:
        if self._part is None:
            raise _malformed()
        if self._part != self._file_field:
            try:
                self._form.fields[self._part] = self._text.decode()
            except UnicodeDecodeError:
                raise InvalidRequestError(
                    f"The field {self._part!r} is not valid UTF-8.", param=self._part
                ) from None
        self._text = bytearray()
        self._part = None


def _malformed() -> InvalidRequestError:
    return InvalidRequestError("The body is not a well-formed multipart/form-data form.")


def safe_name(raw: bytes) -> str:
    """Return the last step of a client's file name, without control characters.

    The name is only shown; no file here is ever called so.
    """
    name = raw.decode("utf-8", "replace").replace("\\", "/").rpartition("/")[2]
    name = "".join(c for c in name if c.isprintable()).strip()[-MOST_NAME_CHARS:]
    return name if name.strip(".") else "upload"
