"""Lines of inputs: what they must have, and inputs that are large or hostile."""

from __future__ import annotations

import io
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.server.batches.lines import (
    BadLine,
    Line,
    TooLong,
    digest_of,
    number_of,
    output_id,
    parse_line,
    raw_lines,
    read_lines,
    survey,
)

MOST = 1 << 16
GOOD: dict[str, Any] = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"messages": []},
}


def read(data: bytes, url: str | None = None) -> list[Line | BadLine]:
    file = io.BytesIO(data)
    return list(read_lines(file, survey(file, MOST), MOST, url))


def jsonl(*entries: Any) -> bytes:
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)


def test_a_good_line() -> None:
    [line] = read(b"\n  " + jsonl(GOOD | {"extra": 1})[:-1])
    assert line == Line(2, "a", "/v1/chat/completions", b'{"messages": []}')


@pytest.mark.parametrize(
    ("raw", "code", "param"),
    [
        (b"no json", "invalid_json_line", None),
        (b"[1]", "invalid_json_line", None),
        (b"\xff\xfe", "invalid_json_line", None),
        (b"[" * 100_000, "invalid_json_line", None),
        (b'{"a":' * 20_000, "invalid_json_line", None),
        (jsonl(GOOD | {"custom_id": 7}), "missing_required_parameter", "custom_id"),
        (jsonl(GOOD | {"custom_id": ""}), "missing_required_parameter", "custom_id"),
        (jsonl(GOOD | {"custom_id": "x" * 513}), "missing_required_parameter", "custom_id"),
        (jsonl(GOOD | {"method": "post"}), "invalid_method", "method"),
        (jsonl(GOOD | {"url": "http://127.0.0.1/"}), "invalid_url", "url"),
        (jsonl(GOOD | {"url": "/v1/files/../chat/completions"}), "invalid_url", "url"),
        (jsonl(GOOD | {"url": ["/v1/completions"]}), "invalid_url", "url"),
        (jsonl(GOOD | {"body": "text"}), "missing_required_parameter", "body"),
        (
            jsonl({k: v for k, v in GOOD.items() if k != "body"}),
            "missing_required_parameter",
            "body",
        ),
        (jsonl(GOOD | {"body": {"stream": True}}), "invalid_request", "body.stream"),
        (jsonl(GOOD | {"body": {"background": True}}), "invalid_request", "body.background"),
    ],
    ids=range(16),
)
def test_bad_lines(raw: bytes, code: str, param: str | None) -> None:
    line = parse_line(raw, 3)
    assert isinstance(line, BadLine)
    assert (line.code, line.param, line.number) == (code, param, 3)
    assert "Line 3" in line.message
    assert len(line.message) < 1000


def test_the_url_of_a_batch() -> None:
    [line] = read(jsonl(GOOD), "/v1/embeddings")
    assert isinstance(line, BadLine)
    assert line.code == "mismatched_endpoint"


def test_repeated_ids_are_told_apart_from_the_first() -> None:
    lines = read(jsonl(GOOD, GOOD | {"custom_id": "b"}, GOOD, GOOD | {"method": "GET"}))
    assert isinstance(lines[0], Line)
    assert isinstance(lines[1], Line)
    for line in lines[2:]:
        assert isinstance(line, BadLine)
        assert line.code == "duplicate_custom_id"
        assert "line 1" in line.message


def test_long_lines_are_skipped_unread() -> None:
    data = jsonl(GOOD) + b"x" * (5 * MOST) + b"\n" + jsonl(GOOD | {"custom_id": "b"})
    first, long, last = read(data)
    assert isinstance(first, Line)
    assert isinstance(long, BadLine)
    assert (long.number, long.code) == (2, "line_too_long")
    assert isinstance(last, Line)
    assert last.number == 3


def test_long_lines_have_digests() -> None:
    """All of a line counts, but its end: a last line may get one later."""
    long = b"x" * (5 << 20)
    texts = [long + b"y\n", long + b"y", long + b"z\n", b"y" + long[1:] + b"y\n"]
    found = [survey(io.BytesIO(text), MOST).digests[1] for text in texts]
    assert found[0] == found[1]
    assert len(set(found)) == 3
    assert digest_of(long + b"y") not in found, "another limit, another outcome"
    assert [line.digest for line in read(texts[0])] == [found[0]]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=400), st.integers(1, 50))
def test_any_bytes_are_lines_of_some_kind(data: bytes, most: int) -> None:
    numbers = [number for number, _ in raw_lines(io.BytesIO(data), most)]
    assert numbers == sorted(set(numbers))
    lines = raw_lines(io.BytesIO(data), most)
    assert all(isinstance(line, TooLong) or len(line) <= most for _, line in lines)
    for line in read(data):
        assert line.number in range(1, data.count(b"\n") + 2)


def test_a_hundred_thousand_lines_take_little_memory() -> None:
    data = b"".join(
        b'{"custom_id":"line %d","method":"POST","url":"/v1/completions","body":{"prompt":"x"}}\n'
        % i
        for i in range(100_000)
    )
    file = io.BytesIO(data)
    tracemalloc.start()
    found = survey(file, MOST)
    num = sum(1 for _ in read_lines(file, found, MOST))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert num == found.num_lines == 100_000
    assert peak < 8 << 20


def test_reading_ends_soon_after_the_most_lines() -> None:
    blank = io.BytesIO(b"\n" * 100_000)
    found = survey(blank, MOST, 10)
    assert not found.is_whole
    assert blank.tell() < 100
    assert len(found.marks) == 1
    many = io.BytesIO(b"x\n" * 100_000)
    assert not survey(many, MOST, 10).is_whole
    assert many.tell() < 100
    enough = survey(io.BytesIO(b"x\n\n" * 10 + b"\n" * 20), MOST, 10)
    assert (enough.is_whole, enough.num_lines) == (True, 10)


def test_ids_of_outputs() -> None:
    assert number_of(output_id(17)) == 17
    for wrong in (None, 7, "", "batch_req_", "batch_req_x", "batch_req_" + "9" * 30, "batch_req_²"):
        assert number_of(wrong) is None


def test_only_made_lines_say_what_they_are() -> None:
    why = {"code": "x" * 10, "message": "y" * 1000}
    members = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {}}
    raw = json.dumps({**members, "refused": why, "identity": "z"}).encode()
    by_content = parse_line(raw, 1)
    assert isinstance(by_content, Line)
    assert by_content.digest == survey(io.BytesIO(raw), MOST).digests[1] == digest_of(raw)
    refused = parse_line(raw, 1, is_made=True)
    assert isinstance(refused, BadLine)
    assert refused.code == why["code"]
    found = survey(io.BytesIO(raw), MOST, is_made=True)
    assert refused.digest == found.digests[1] == digest_of(b"z")
    assert list(read_lines(io.BytesIO(raw), found, MOST)) == [refused]


def test_long_urls_are_looked_at_in_part() -> None:
    raw = json.dumps({"custom_id": "a", "method": "POST", "url": "://" * 1_000_000, "body": {}})
    assert isinstance(parse_line(raw.encode(), 1), BadLine)  # minutes, were it quadratic
