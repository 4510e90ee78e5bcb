from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensorium.bench.client import RequestRecord, StreamClient, events
from tests.bench.fake_server import CACHED_TOKENS, serving


def body(max_tokens: int = 6, **members: Any) -> bytes:
    return json.dumps({"max_tokens": max_tokens, "stream": True, **members}).encode()


async def ask(
    request: bytes, *, timeout: float = 30.0, leave_after: int | None = None
) -> RequestRecord:
    async with serving() as fake, StreamClient(fake.base_url, timeout=timeout) as client:
        return await client.send(request, leave_after=leave_after)


async def test_a_whole_answer() -> None:
    record = await ask(body(6))
    assert record.completed
    assert (record.prompt_tokens, record.completion_tokens) == (10, 6)
    assert record.cached_tokens == CACHED_TOKENS
    assert len(record.chunk_times) == 6, "the chunk with the role and the last one have no text"
    assert record.start_time < record.chunk_times[0] <= record.chunk_times[-1] <= record.end_time
    assert len(record.inter_chunk_times) == 5


async def test_tokens_are_those_of_the_usage_not_the_chunks() -> None:
    record = await ask(body(6, fake="pairs"))
    assert (len(record.chunk_times), record.completion_tokens) == (3, 6)
    span = record.chunk_times[-1] - record.chunk_times[0]
    assert record.time_per_output_token == pytest.approx(span / 5)


async def test_without_usage_the_chunks_count() -> None:
    record = await ask(body(6, fake="no_usage"))
    assert record.completed
    assert not record.has_usage
    assert (record.prompt_tokens, record.completion_tokens) == (0, 6)


async def test_tokens_without_text_have_a_first_one_too() -> None:
    record = await ask(body(6, fake="silent"))
    assert record.completed
    assert record.completion_tokens == 6
    assert record.time_to_first_token is not None
    assert record.time_per_output_token is None


@pytest.mark.parametrize(
    ("kind", "code", "message"),
    [
        ("refuse", "503 overloaded", "The queue is full."),
        ("plain_refuse", "500", "it broke"),
        ("break", "broken_stream", "[DONE]"),
        ("error", "broken_stream", "The engine has stopped."),
    ],
)
async def test_errors_are_recorded_by_code(kind: str, code: str, message: str) -> None:
    record = await ask(body(fake=kind))
    assert record.error == code
    assert message in record.error_message
    assert not record.completed


async def test_a_timeout_is_recorded() -> None:
    record = await ask(body(fake="slow"), timeout=0.05)
    assert record.error == "timeout"


async def test_no_server() -> None:
    async with StreamClient("http://127.0.0.1:9") as client:
        record = await client.send(body())
        assert record.error == "connection"
        with pytest.raises(ConnectionError, match="lists no model"):
            await client.first_model()


async def test_leaving_midway_hangs_up() -> None:
    hold = asyncio.Event()
    hold.set()
    async with serving(hold) as fake, StreamClient(fake.base_url) as client:
        record = await client.send(body(100_000), leave_after=2)
        assert record.left
        assert record.error is None
        assert not record.completed
        assert 2 <= len(record.chunk_times) < 100_000
        while not fake.num_hung_up:  # the server sees the closed socket when it next writes
            await asyncio.sleep(0)


async def test_key_and_model() -> None:
    async with serving() as fake:
        async with StreamClient(f"{fake.base_url}/v1/", api_key="k-1") as client:
            assert await client.first_model() == "fake-model"
            await client.send(body())
        async with StreamClient(fake.base_url) as client:
            await client.send(body())
        assert fake.authorizations == ["Bearer k-1", None]


@given(st.lists(st.sampled_from(["{}", "[DONE]", "ä", "two\nlines"])), st.integers(1, 9))
def test_events_survive_any_cut(payloads: list[str], size: int) -> None:
    text = ": a comment\r\n\r\n"
    for data in payloads:
        text += "".join(f"data: {line}\r\n" for line in data.split("\n")) + "\r\n"
    raw = text.encode()

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(raw), size):
            yield raw[start : start + size]

    async def collect() -> list[str]:
        return [data async for data in events(chunks())]

    assert asyncio.run(collect()) == payloads
