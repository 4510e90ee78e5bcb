"""Rows of Parquet files as lines of requests; outputs as a Parquet file."""

from __future__ import annotations

import base64
import importlib.util
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from sensorium.errors import ConfigError
from sensorium.server.batches.lines import Refusal, number_of

CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
_URLS = {"messages": CHAT, "prompt": COMPLETIONS, "input": EMBEDDINGS}
_ROWS = 1024
_ROWS_READ = 32
"""Rows that are in memory at a time, in whose cells images may lie."""


class _NoRequestError(ValueError):
    """A row is no request; the message says why."""


def require_pyarrow() -> None:
    """Raise ConfigError where Parquet files cannot be read and written."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError('Parquet files need pyarrow: pip install "sensorium[ray]", or pyarrow.')


def lines_of_table(file: Any, prompt: str | None, body: Mapping[str, Any]) -> Iterator[bytes]:
    """Yield a request for each row of a Parquet file. Raises ConfigError for other columns.

    Columns are those of a line (``url``, ``body``), or the members of a body, of which
    ``messages``, ``prompt`` or ``input`` says what kind it is. With a ``prompt``, the column
    ``image`` has images. A row that is no request becomes a line that is refused.
    """
    require_pyarrow()
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(file)
    names = set(table.schema_arrow.names)
    number = 0
    for batch in table.iter_batches(batch_size=_ROWS_READ):
        for row in batch.to_pylist():
            number += 1
            custom_id = row.pop("custom_id", None)
            name = f"row-{number}" if custom_id is None else str(custom_id)
            try:
                yield line(name, *_request(row, names, prompt, body))
            except _NoRequestError as error:
                refusal = Refusal("invalid_json_line", f"Row {number} {error}.", "body")
                yield line(name, str(row.get("url") or CHAT), None, refused=refusal)


def write_table(lines: Path, target: Any) -> None:
    """Write outputs as a Parquet file: a row each, with what is asked for most in columns."""
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema(
        [
            ("line", pyarrow.int64()),
            ("custom_id", pyarrow.string()),
            ("status_code", pyarrow.int32()),
            ("text", pyarrow.string()),
            ("embedding", pyarrow.list_(pyarrow.float32())),
            ("prompt_tokens", pyarrow.int64()),
            ("output_tokens", pyarrow.int64()),
            ("body", pyarrow.large_string()),
        ]
    )
    with (
        lines.open("rb") as file,
        pyarrow.parquet.ParquetWriter(target, schema, compression="zstd") as writer,
    ):
        lines_left = (line for line in file if line.endswith(b"\n"))
        while some := list(itertools.islice(lines_left, _ROWS)):
            rows = [_columns(line) for line in some]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))


def _request(
    row: dict[str, Any], names: set[str], prompt: str | None, body: Mapping[str, Any]
) -> tuple[str, Any]:
    """Return address and body of a row's request."""
    if {"url", "body"} <= names:
        return str(row["url"]), {**body, **_own_body(row["body"])}
    if prompt is not None and "image" in names:
        image = row.pop("image")
        messages = conversation(_image_url(image), prompt)
        return CHAT, {**body, **_kept(row), "messages": messages}
    for name, url in _URLS.items():
        if name in names:
            return url, {**body, **_kept(row)}
    raise ConfigError(
        "A Parquet file needs the columns url and body; or messages, prompt or input; or, with "
        f"--prompt, image. It has: {', '.join(sorted(names))}."
    )


def _own_body(given: Any) -> Mapping[str, Any]:
    """Return the body in a cell, JSON or a structure. Raises _NoRequestError for anything else."""
    own = given
    if isinstance(given, str | bytes):
        try:
            own = msgspec.json.decode(given)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            what = str(error)[:200]
            raise _NoRequestError(f"has a body that is not valid JSON: {what}") from error
    if not isinstance(own, Mapping):
        raise _NoRequestError(f"needs a body, a JSON object; it has {type(own).__name__}")
    return own if own is not given else _kept(own)


def _kept(value: Any) -> Any:
    """Return a value without the empty members that all structures of a column have."""
    if isinstance(value, Mapping):
        return {name: _kept(member) for name, member in value.items() if member is not None}
    return [_kept(member) for member in value] if isinstance(value, list) else value


def _image_url(image: Any) -> str:
    """Return an image of a cell as a URL: bytes, a URL or path, or a structure of either.

    Raises _NoRequestError where there is none.
    """
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return data_url(image, "image/png")
    if not isinstance(image, str):
        raise _NoRequestError("has no image: bytes, a URL or a path")
    return image


def data_url(data: bytes, kind: str) -> str:
    """Return data of a media type as a URL."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def conversation(url: str, prompt: str) -> list[dict[str, Any]]:
    """Return messages that ask about an image."""
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
    return [{"role": "user", "content": parts}]


def line(
    custom_id: str,
    url: str,
    body: Any,
    *,
    identity: str | None = None,
    refused: Refusal | None = None,
) -> bytes:
    """Return a line of an input.

    ``identity`` tells the request from others where its text does not; ``refused`` says why there
    is no body.
    """
    made = {"custom_id": custom_id, "method": "POST", "url": url, "body": body}
    more = {"identity": identity, "refused": refused}
    made |= {name: value for name, value in more.items() if value is not None}
    return msgspec.json.encode(made, enc_hook=str) + b"\n"


class _Response(msgspec.Struct):
    status_code: Any = None
    body: msgspec.Raw = msgspec.Raw(b"null")


class _Output(msgspec.Struct):
    id: Any = None
    custom_id: Any = None
    response: _Response | None = None


_output = msgspec.json.Decoder(_Output)


def _columns(line: bytes) -> dict[str, Any]:
    """Return the columns of an output. What a server answers otherwise than agreed has none."""
    entry = _output.decode(line)
    response = entry.response or _Response()
    raw = bytes(response.body)
    try:
        body = _members(msgspec.json.decode(raw))
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        body = {}
    usage = _members(body.get("usage"))
    return {
        "line": number_of(entry.id),
        "custom_id": entry.custom_id if isinstance(entry.custom_id, str) else None,
        "status_code": _whole_number(response.status_code, 32),
        "text": _text(body),
        "embedding": _embedding(body),
        "prompt_tokens": _whole_number(usage.get("prompt_tokens", usage.get("input_tokens"))),
        "output_tokens": _whole_number(usage.get("completion_tokens", usage.get("output_tokens"))),
        "body": None if raw == b"null" else raw.decode(errors="replace"),
    }


def _text(body: Mapping[str, Any]) -> str | None:
    """Return the text of the first answer; None where there is none."""
    for choice in map(_members, _entries(body.get("choices"))):
        found = choice.get("text") or _members(choice.get("message")).get("content")
        return found if isinstance(found, str) else None
    items = map(_members, _entries(body.get("output")))
    parts = (_members(part) for item in items for part in _entries(item.get("content")))
    texts = (part.get("text") for part in parts)
    return next((text for text in texts if isinstance(text, str)), None)


def _embedding(body: Mapping[str, Any]) -> list[float] | None:
    """Return the first embedding, if it came as numbers."""
    for entry in map(_members, _entries(body.get("data"))):
        found = entry.get("embedding")
        if not isinstance(found, list):
            return None
        vector = _entries(found)
        return [float(value) for value in vector] if all(map(_is_number, vector)) else None
    return None


def _members(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _entries(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _whole_number(value: Any, num_bits: int = 64) -> int | None:
    """Return an integer that a column of so many bits holds; None for anything else."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return value if is_whole and abs(value) < 1 << (num_bits - 1) else None
