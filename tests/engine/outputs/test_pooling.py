"""Requests for vectors: over the wire as bytes, through the frontend, their metrics and their
failures.
"""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import numpy as np
import pytest

from sensorium.core.plan import UNUSABLE
from sensorium.core.request import SequenceUpdate
from sensorium.engine import wire
from sensorium.engine.outputs.pooling import PoolingCollector, pooling_request
from sensorium.engine.prompts.types import PreparedPrompt, RawPrompt, parse_conversation
from sensorium.engine.serving.frontend import Frontend
from sensorium.errors import (
    InvalidRequestError,
    ModelOutputNotFiniteError,
    OverloadedError,
    SensoriumError,
    UnavailableError,
)
from sensorium.metrics.report import RequestReport
from sensorium.models.embedder import Embedder
from sensorium.params import PoolingParams
from tests.engine.serving.test_frontend import FakeEngine, FakePreparer, new_frontend

PREPARED = PreparedPrompt("a", (1, 2), num_item_tokens={"image": 1}, cache_salt=b"salt")
PARAMS = PoolingParams(dimensions=3, normalize=True)
USER = [{"role": "user", "content": "a"}]
VECTOR = np.array([0.5, -0.25, 3e-8], np.float32)


def news(request_id: str, **fields: Any) -> SequenceUpdate:
    return SequenceUpdate(request_id, finish_reason="stop", embedding=VECTOR.tobytes(), **fields)


def test_a_request_and_its_vector_cross_the_wire() -> None:
    request = pooling_request(PREPARED, PARAMS, "r", 3, 1.5)
    assert (request.max_tokens, request.priority, request.arrival_time) == (0, 3, 1.5)
    assert request.cache_salt == b"salt"
    sent = wire.decode_to_engine(wire.encode(wire.Submit(request, ())))
    assert isinstance(sent, wire.Submit)
    assert sent.request == request
    large = SequenceUpdate("r", finish_reason="stop", embedding=bytes(range(256)) * 32)
    data = wire.encode(wire.Updates([large]))
    assert len(data) < len(large.embedding or b"") + 300, "raw bytes, not a list of numbers"
    received = wire.decode_from_engine(data)
    assert isinstance(received, wire.Updates)
    assert received.updates == [large]


def test_a_stream_collects_its_vector() -> None:
    request = pooling_request(PREPARED, PARAMS, "r", 0, 1.5)
    stream = PoolingCollector("outer", PREPARED, request)
    assert not stream.finished
    assert not stream.apply(news("r", num_cached_tokens=1, first_scheduled_time=2.0))
    output = stream.output
    assert stream.finished
    np.testing.assert_array_equal(output.outputs, VECTOR)
    assert output.outputs.flags.writeable
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("outer", "a", [1, 2])
    assert (output.usage.total_tokens, output.usage.cached_tokens) == (2, 1)
    assert output.num_item_tokens == {"image": 1}
    assert stream.metrics.first_scheduled_time == 2.0
    with pytest.raises(ValueError, match="has its embedding"):
        stream.apply(SequenceUpdate("r"))


@pytest.mark.parametrize(
    ("message", "expected", "param"),
    [(UNUSABLE, ModelOutputNotFiniteError, "input[3]"), ("other", UnavailableError, None)],
)
def test_failures_are_the_callers_or_the_engines(
    message: str, expected: type[SensoriumError], param: str | None
) -> None:
    prepared = dataclasses.replace(PREPARED, param="input[3]")
    stream = PoolingCollector("r", prepared, pooling_request(prepared, PARAMS, "r", 0, 0.0))
    with pytest.raises(expected, match=message[:20]) as caught:
        stream.apply(SequenceUpdate("r", finish_reason="error", error=message))
    assert caught.value.param == param
    assert not stream.finished


class Metrics:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def queue(self, seconds: float) -> None:
        self.told.append("queue")

    def finished(self, report: RequestReport) -> None:
        self.told.append((report.finish_reason, report.num_prompt_tokens, report.num_cached_tokens))
        assert (report.num_generation_tokens, report.max_tokens) == (0, 0)


def pooling_frontend() -> tuple[Frontend, FakeEngine, FakePreparer, Metrics]:
    frontend, client, input_processor = new_frontend()
    input_processor.embedder = Embedder(8, normalize=False, matryoshka=True)
    metrics = Metrics()
    frontend.metrics = metrics  # type: ignore[assignment]
    return frontend, client, input_processor, metrics


async def test_the_frontend_waits_for_the_vector_and_reports_it() -> None:
    frontend, client, _, metrics = pooling_frontend()
    work = asyncio.ensure_future(
        frontend.embed(RawPrompt(text="a"), PoolingParams(), request_id="r")
    )
    while not client.output_queues:
        await asyncio.sleep(0)
    client.output_queues["r"].put_nowait(news("r", num_cached_tokens=1, first_scheduled_time=0.0))
    output = await work
    np.testing.assert_array_equal(output.outputs, VECTOR)
    assert metrics.told == ["queue", ("stop", 1, 1)]
    assert not client.output_queues


@pytest.mark.parametrize("how", ["cancel", "error", "full"])
async def test_whatever_ends_it_leaves_nothing(how: str) -> None:
    frontend, client, _, metrics = pooling_frontend()
    if how == "full":
        client.fail_after = 0
    work = asyncio.ensure_future(
        frontend.embed(RawPrompt(text="a"), PoolingParams(), request_id="r")
    )
    while not client.output_queues and not work.done():
        await asyncio.sleep(0)
    if how == "cancel":
        work.cancel()
    elif how == "error":
        client.output_queues["r"].put_nowait(OverloadedError("full"))
    with pytest.raises((OverloadedError, asyncio.CancelledError)):
        await work
    assert not client.output_queues
    assert metrics.told == [("abort" if how == "cancel" else "error", 1, 0)]


async def test_a_generating_frontend_makes_no_vectors() -> None:
    frontend, client, _ = new_frontend()
    with pytest.raises(InvalidRequestError, match="--runner pooling"):
        await frontend.embed(RawPrompt(text="a"), PoolingParams(), request_id="r")
    assert not client.output_queues


@pytest.mark.parametrize(
    ("params", "embedder", "message"),
    [
        (PoolingParams(dimensions=4), Embedder(8), "is_matryoshka"),
        (PoolingParams(dimensions=9), Embedder(8, matryoshka=True), "embeddings have 8"),
        (PoolingParams(dimensions=5), Embedder(8, matryoshka=True, sizes=(2, 4)), "2, 4 only"),
        (
            PoolingParams(dimensions=9),
            Embedder(8, matryoshka=True, sizes=(9,)),
            "embeddings have 8",
        ),
    ],
)
def test_sizes_that_a_model_does_not_have(
    params: PoolingParams, embedder: Embedder, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        embedder.resolve(params)
    assert caught.value.param == "dimensions"


def test_what_is_left_open_is_as_the_model_says() -> None:
    embedder = Embedder(8, normalize=False, matryoshka=True, sizes=(2, 4))
    assert embedder.resolve(PoolingParams()) == PoolingParams(normalize=False)
    assert embedder.resolve(PoolingParams(8, True)) == PoolingParams(8, True)
    assert embedder.resolve(PoolingParams(4)) == PoolingParams(4, False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"messages": [], "tools": None}, "Unknown key 'tools' beside 'messages'"),
        ({"messages": [], "chat_template_kwarg": {}}, "Did you mean 'chat_template_kwargs'"),
        ({"messages": [], "continue_final_message": "no"}, "true or false, got 'no'"),
        ({"messages": USER, "mm_processor_kwargs": 5}, "mm_processor_kwargs must be a dict"),
        ({"messages": 5}, "messages"),
    ],
)
def test_wrong_conversations(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        parse_conversation(given)
