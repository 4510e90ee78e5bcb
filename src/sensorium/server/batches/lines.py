"""Lines of a batch's input, in OpenAI's form, and those of its output.

An input is read twice, both times line by line: ``survey`` counts its lines and finds repeated
ids, ``read_lines`` yields requests. Memory grows by 16 bytes a line.

The id of an output has the number of its line and a digest of it, which tells whether the line is
still the one that was answered.

An input is *made* where this program has written its lines, of images or the rows of a table. Such
lines may say why there is no request, and what their digest is of; those of others may not.
"""

from __future__ import annotations

import hashlib
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import msgspec
import numpy as np

from sensorium.server.batches.urls import without_secrets

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
_MOST_SHOWN = 200
"""Characters of a wrong URL that are looked at for its message."""
MOST_ID_CHARS = 512
BLANK_FACTOR = 4
"""Times as many lines as allowed that an input may have with its blank ones."""

_SKIPPED_BYTES = 1 << 20
_DIGEST_BYTES = 8
_TOO_LONG = b"too long"
"""Tells the digest of a line that is too long from that of the same line under a higher limit."""
_DIGEST = re.compile(r"_([0-9a-f]{16})_[0-9]+")
_MASK = (1 << 64) - 1
_NO_ID = 0


@dataclass(frozen=True, slots=True)
class Line:
    """A request: ``body`` is JSON; ``number`` counts the lines of the file from 1.

    ``digest``: that of the whole line, see ``digest_of``.
    """

    number: int
    custom_id: str
    url: str
    body: bytes
    digest: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line that is no request, and why."""

    number: int
    custom_id: str | None
    code: str
    message: str
    param: str | None = None
    digest: int = field(default=0, compare=False)

    def error(self) -> dict[str, Any]:
        """Return the error as lines of output and batches show it."""
        return {
            "code": self.code,
            "message": self.message,
            "param": self.param,
            "line": self.number,
        }


@dataclass(frozen=True, slots=True)
class TooLong:
    """A line of more bytes than allowed, of which only the digest is kept."""

    digest: int


class _Head(msgspec.Struct):
    custom_id: Any = None
    identity: Any = None


class Refusal(msgspec.Struct):
    """Reason why something, such as an image that is too large, has not become a request."""

    code: str
    message: str
    param: str | None = None


class _Request(_Head):
    method: Any = None
    url: Any = None
    body: msgspec.Raw = msgspec.Raw(b"")
    refused: Any = None


class _Body(msgspec.Struct):
    stream: Any = None
    background: Any = None


_head = msgspec.json.Decoder(_Head)
_request = msgspec.json.Decoder(_Request)
_body = msgspec.json.Decoder(_Body)


def raw_lines(file: BinaryIO, most_bytes: int) -> Iterator[tuple[int, bytes | TooLong]]:
    """Yield number and content of each line that is not blank, a digest for one of more bytes."""
    return ((number, raw) for number, raw in _all_lines(file, most_bytes) if raw != b"")


def _all_lines(file: BinaryIO, most_bytes: int) -> Iterator[tuple[int, bytes | TooLong]]:
    """Yield the same for all lines; blank ones are empty."""
    number = 0
    while line := file.readline(most_bytes + 1):
        number += 1
        if len(line) > most_bytes and not line.endswith(b"\n"):
            yield number, _skipped(file, line)
        else:
            yield number, line.strip()


def _skipped(file: BinaryIO, piece: bytes) -> TooLong:
    """Read the rest of a line that begins with ``piece``, in pieces; return its digest."""
    hasher = hashlib.blake2b(digest_size=_DIGEST_BYTES, person=_TOO_LONG)
    while True:
        hasher.update(piece.removesuffix(b"\n"))
        if not piece or piece.endswith(b"\n"):
            return TooLong(int.from_bytes(hasher.digest(), "big") or 1)
        piece = file.readline(_SKIPPED_BYTES)


@dataclass(frozen=True, slots=True)
class Survey:
    """Facts of a whole input.

    Attributes:
        num_lines: Lines that are not blank.
        marks: A number for the id of each line, by the line's number; 0 for lines without one.
        digests: The digest of each line, by its number.
        repeated: Those numbers that come more than once.
        is_whole: False when the input has more lines than allowed; the rest was not read.
        is_made: True where this program has written the lines.
    """

    num_lines: int
    marks: array[int]
    digests: array[int]
    repeated: frozenset[int]
    is_whole: bool = True
    is_made: bool = False


def mark_of(custom_id: str) -> int:
    """Return a number of 64 bits that is the same for equal ids within this process."""
    return (hash(custom_id) & _MASK) or 1


def digest_of(raw: bytes) -> int:
    """Return a number of 64 bits, greater than 0, that tells a line from others."""
    digest = hashlib.blake2b(raw, digest_size=_DIGEST_BYTES).digest()
    return int.from_bytes(digest, "big") or 1


def survey(
    file: BinaryIO, most_bytes: int, most_lines: int | None = None, *, is_made: bool = False
) -> Survey:
    """Read the input once, from its beginning.

    Args:
        file: The input.
        most_bytes: Bytes of the longest line.
        most_lines: Lines after which reading ends. So it does after ``BLANK_FACTOR`` times as
            many, blank ones included. No limit if None.
        is_made: This program has written the lines.
    """
    file.seek(0)
    marks, digests = array("Q", [_NO_ID]), array("Q", [0])
    num_lines = 0
    is_whole = True
    for number, raw in _all_lines(file, most_bytes):
        if most_lines is not None and (
            num_lines + (raw != b"") > most_lines or number > BLANK_FACTOR * most_lines
        ):
            is_whole = False
            break
        if raw == b"":
            continue
        num_lines += 1
        for numbers in (marks, digests):
            numbers.frombytes(bytes(numbers.itemsize * (number + 1 - len(numbers))))
        if isinstance(raw, TooLong):
            digests[number] = raw.digest
            continue
        head = _head_of(raw)
        digests[number] = _digest(raw, head, is_made=is_made)
        if isinstance(head.custom_id, str):
            marks[number] = mark_of(head.custom_id)
    ordered = np.sort(np.frombuffer(marks, np.uint64))
    same = ordered[1:][ordered[1:] == ordered[:-1]]
    repeated = frozenset(same[same != _NO_ID].tolist())
    return Survey(num_lines, marks, digests, repeated, is_whole, is_made)


def _head_of(raw: bytes) -> _Head:
    """Return what a line says of itself; nothing where it is not JSON."""
    try:
        return _head.decode(raw)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return _Head()


def _digest(raw: bytes, head: _Head, *, is_made: bool) -> int:
    """Return the digest of a line: of what it says that it is where it is made, else of all."""
    return digest_of(head.identity.encode() if is_made and isinstance(head.identity, str) else raw)


def read_lines(
    file: BinaryIO, found: Survey, most_bytes: int, url: str | None = None
) -> Iterator[Line | BadLine]:
    """Yield the lines of an input from its beginning, those that are no requests included.

    ``url``: the one that all lines must have.
    """
    file.seek(0)
    first_lines: dict[str, int] = {}
    for number, raw in raw_lines(file, most_bytes):
        if isinstance(raw, TooLong):
            message = f"Line {number} has more than {most_bytes} bytes, the limit."
            yield BadLine(number, None, "line_too_long", message, None, raw.digest)
            continue
        line = parse_line(raw, number, url, is_made=found.is_made)
        custom_id = line.custom_id
        if custom_id is not None and mark_of(custom_id) in found.repeated:
            first = first_lines.setdefault(custom_id, number)
            if first != number:
                message = (
                    f"Line {number} repeats the custom_id of line {first}: {custom_id!r:.200}."
                )
                code, param = "duplicate_custom_id", "custom_id"
                line = BadLine(number, custom_id, code, message, param, line.digest)
        yield line


def parse_line(
    raw: bytes, number: int, wanted_url: str | None = None, *, is_made: bool = False
) -> Line | BadLine:
    """Return the request in a line, or what is wrong with it.

    ``is_made``: this program has written the line, and may say that it has refused a row.
    """

    def bad(code: str, what: str, param: str | None = None) -> BadLine:
        return BadLine(number, custom_id, code, f"Line {number} {what}.", param, digest)

    custom_id: str | None = None
    try:
        request = _request.decode(raw)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        digest = digest_of(raw)
        return bad("invalid_json_line", f"is not a JSON object: {str(error)[:200]}")
    digest = _digest(raw, request, is_made=is_made)
    given = request.custom_id
    if not isinstance(given, str) or not 1 <= len(given) <= MOST_ID_CHARS:
        what = f"needs a custom_id, a string of 1 to {MOST_ID_CHARS} characters"
        return bad("missing_required_parameter", what, "custom_id")
    custom_id = given
    if is_made and request.refused is not None:
        why = msgspec.convert(request.refused, Refusal)
        return BadLine(number, custom_id, why.code, why.message, why.param, digest)
    if request.method != "POST":
        return bad(
            "invalid_method", f"needs the method 'POST', got {request.method!r:.80}", "method"
        )
    url = request.url
    if url not in URLS:
        shown = without_secrets(url[:_MOST_SHOWN]) if isinstance(url, str) else url
        return bad("invalid_url", f"needs a url of {', '.join(URLS)}, got {shown!r:.80}", "url")
    if wanted_url is not None and url != wanted_url:
        return bad(
            "mismatched_endpoint", f"has the url {url!r}; the batch is for {wanted_url}", "url"
        )
    body = bytes(request.body)
    if not body.startswith(b"{"):
        return bad("missing_required_parameter", "needs a body, a JSON object", "body")
    try:
        wishes = _body.decode(body)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return bad("invalid_json_line", "has a body that is not valid JSON", "body")
    if wishes.stream:
        return bad(
            "invalid_request", "asks for a stream, which a batch cannot write", "body.stream"
        )
    if wishes.background:
        return bad(
            "invalid_request",
            "asks for work in the background, where a batch cannot wait for it",
            "body.background",
        )
    return Line(number, custom_id, url, body, digest)


OUTPUT_PREFIX = "batch_req_"


def output_id(number: int, digest: int = 0) -> str:
    """Return the id of the output of a line; ``number_of`` and ``digest_in`` tell the line."""
    return f"{OUTPUT_PREFIX}{digest:016x}_{number}" if digest else f"{OUTPUT_PREFIX}{number}"


def digest_in(line_id: str) -> int:
    """Return the digest of the line that an output is for; 0 if the id has none."""
    found = _DIGEST.search(line_id)
    return int(found[1], 16) if found is not None else 0


def number_of(line_id: object) -> int | None:
    """Return the number of the line that an output is for; None if that cannot be told."""
    text = line_id.rpartition("_")[2] if isinstance(line_id, str) else ""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None
