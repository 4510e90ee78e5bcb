"""Rows of Parquet files and images of folders as lines of requests; outputs as a Parquet file."""

from __future__ import annotations

import base64
import importlib.util
import itertools
import mimetypes
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from sensorium.errors import ConfigError
from sensorium.server.batches.lines import number_of

IMAGES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif", ".heic"}
)
"""Ends of the names of images."""
CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
_URLS = {"messages": CHAT, "prompt": COMPLETIONS, "input": EMBEDDINGS}
_ROWS = 1024


def require_pyarrow() -> None:
    """Raise ConfigError where Parquet files cannot be read and written."""
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError('Parquet files need pyarrow: pip install "sensorium[ray]", or pyarrow.')


def lines_of_folder(
    system: Any, folder: str, prompt: str, body: Mapping[str, Any], *, inline: bool
) -> Iterator[bytes]:
    """Yield a request for each image below a folder, in the order of their paths.

    ``inline`` puts the images into the requests, which else name their files. Raises ConfigError
    when there is none.
    """
    paths = sorted(path for path in system.find(folder) if Path(path).suffix.lower() in IMAGES)
    if not paths:
        raise ConfigError(f"There is no image below {folder!r}.")
    for path in paths:
        if inline:
            kind = mimetypes.guess_type(path)[0] or "image/png"
            url = _data_url(system.cat_file(path), kind)
        else:
            url = Path(path).as_uri()
        name = path.removeprefix(folder.rstrip("/")).lstrip("/")
        yield _line(name, CHAT, {**body, "messages": _conversation(url, prompt)})


def lines_of_table(file: Any, prompt: str | None, body: Mapping[str, Any]) -> Iterator[bytes]:
    """Yield a request for each row of a Parquet file. Raises ConfigError for other columns.

    Columns are those of a line (``url``, ``body``), or the members of a body, of which
    ``messages``, ``prompt`` or ``input`` says what kind it is. With a ``prompt``, the column
    ``image`` has images.
    """
    require_pyarrow()
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(file)
    names = set(table.schema_arrow.names)
    number = 0
    for batch in table.iter_batches(batch_size=_ROWS):
        for row in batch.to_pylist():
            number += 1
            custom_id = row.pop("custom_id", None)
            name = f"row-{number}" if custom_id is None else str(custom_id)
            yield _line(name, *_request(row, names, prompt, body))


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
        given = row["body"]
        own = msgspec.json.decode(given) if isinstance(given, str | bytes) else _kept(given)
        return str(row["url"]), {**body, **own}
    if prompt is not None and "image" in names:
        image = row.pop("image")
        conversation = _conversation(_image_url(image), prompt)
        return CHAT, {**body, **_kept(row), "messages": conversation}
    for name, url in _URLS.items():
        if name in names:
            return url, {**body, **_kept(row)}
    raise ConfigError(
        "A Parquet file needs the columns url and body; or messages, prompt or input; or, with "
        f"--prompt, image. It has: {', '.join(sorted(names))}."
    )


def _kept(value: Any) -> Any:
    """Return a value without the empty members that all structures of a column have."""
    if isinstance(value, Mapping):
        return {name: _kept(member) for name, member in value.items() if member is not None}
    return [_kept(member) for member in value] if isinstance(value, list) else value


def _image_url(image: Any) -> str:
    """Return an image of a cell as a URL: bytes, a URL or path, or a structure of either."""
    if isinstance(image, Mapping):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return _data_url(image, "image/png")
    return str(image)


def _data_url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _conversation(url: str, prompt: str) -> list[dict[str, Any]]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": prompt}]
    return [{"role": "user", "content": parts}]


def _line(custom_id: str, url: str, body: Any) -> bytes:
    line = {"custom_id": custom_id, "method": "POST", "url": url, "body": body}
    return msgspec.json.encode(line) + b"\n"


def _columns(line: bytes) -> dict[str, Any]:
    """Return the columns of an output."""
    entry = msgspec.json.decode(line)
    response = entry.get("response") or {}
    body = response.get("body") or {}
    usage = body.get("usage") or {}
    return {
        "line": number_of(entry.get("id")),
        "custom_id": entry.get("custom_id"),
        "status_code": response.get("status_code"),
        "text": _text(body),
        "embedding": _embedding(body),
        "prompt_tokens": usage.get("prompt_tokens", usage.get("input_tokens")),
        "output_tokens": usage.get("completion_tokens", usage.get("output_tokens")),
        "body": msgspec.json.encode(body).decode(),
    }


def _text(body: Mapping[str, Any]) -> str | None:
    """Return the text of the first answer; None where there is none."""
    for choice in body.get("choices") or ():
        found = choice.get("text") or (choice.get("message") or {}).get("content")
        return found if isinstance(found, str) else None
    parts = (part for item in body.get("output") or () for part in item.get("content") or ())
    return next((part["text"] for part in parts if isinstance(part.get("text"), str)), None)


def _embedding(body: Mapping[str, Any]) -> list[float] | None:
    """Return the first embedding, if it came as numbers."""
    for entry in body.get("data") or ():
        found = entry.get("embedding")
        return found if isinstance(found, list) else None
    return None
