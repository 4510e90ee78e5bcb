"""What the metrics hear of requests: the times between the right moments, and the right ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from sensorium.core.plan import NO_TOKEN_LEFT
from sensorium.core.request import SequenceUpdate, TokenSample
from sensorium.engine.outputs import request_metrics
from sensorium.engine.outputs.request_metrics import status_line
from sensorium.engine.outputs.stream import OutputCollector
from sensorium.engine.prompts.types import RawPrompt
from sensorium.engine.serving.frontend import Frontend
from sensorium.engine.stats import EngineStats
from sensorium.errors import EngineDeadError, SensoriumError
from sensorium.metrics.report import RequestReport
from sensorium.params import SamplingParams
from tests.engine.serving.test_frontend import PROMPT, FakeEngine, no_text
from tests.engine.serving.test_frontend import new_frontend as plain_frontend
from tests.fakes import ManualClock

__all__ = ["no_text"]


class Metrics:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.first: list[float] = []
        self.between: list[float] = []
        self.queued: list[float] = []
        self.reports: list[RequestReport] = []

    def first_token(self, seconds: float) -> None:
        self.first.append(seconds)

    def inter_token(self, seconds: float) -> None:
        self.between.append(seconds)

    def queue(self, seconds: float) -> None:
        self.queued.append(seconds)

    def finished(self, report: RequestReport) -> None:
        self.reports.append(report)


def new_frontend() -> tuple[Frontend, FakeEngine, Metrics]:
    frontend, engine, _ = plain_frontend()
    frontend.metrics = metrics = Metrics()
    return frontend, engine, metrics


def token(request_id: str = "r#0", reason: Any = None, **fields: Any) -> SequenceUpdate:
    """News of one token; the sequence was first scheduled at 12."""
    fields = {"num_cached_tokens": 1, "first_scheduled_time": 12.0, **fields}
    return SequenceUpdate(request_id, sample=TokenSample(5), finish_reason=reason, **fields)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ManualClock:
    """The time of the frontend's process; the request comes at 10."""
    clock = ManualClock(10.0)
    for module in ("serving.frontend", "outputs.stream", "outputs.request_metrics"):
        monkeypatch.setattr(f"sensorium.engine.{module}.time", _Time(clock))
    return clock


class _Time:
    def __init__(self, clock: ManualClock) -> None:
        self.monotonic = clock


async def test_each_time_is_between_the_right_moments(clock: ManualClock) -> None:
    frontend, engine, metrics = new_frontend()
    stream = frontend.generate(PROMPT, SamplingParams(), request_id="r")
    waiting = asyncio.ensure_future(anext(stream))
    while not engine.output_queues:
        await asyncio.sleep(0)
    output_queue = engine.output_queues["r#0"]
    clock.now = 15.0
    output_queue.put_nowait(token())
    await waiting
    clock.now = 16.0
    output_queue.put_nowait(token())
    await anext(stream)
    clock.now = 19.0
    output_queue.put_nowait(token())
    output_queue.put_nowait(token(reason="length"))
    await anext(stream)
    clock.now = 25.0  # the client is slow to take it
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert (metrics.first, metrics.queued) == ([5.0], [2.0])
    assert metrics.between == [1.0, 1.5, 1.5], "two tokens came at once, and share the time"
    [report] = metrics.reports
    assert (report.prefill_seconds, report.decode_seconds) == (3.0, 4.0)
    assert (report.inference_seconds, report.e2e_seconds) == (7.0, 15.0)
    assert report.seconds_per_token == pytest.approx(4 / 3)
    assert (report.num_prompt_tokens, report.num_cached_tokens) == (1, 1)
    assert (report.num_generation_tokens, report.longest_sample, report.max_tokens) == (4, 4, 4)


async def test_tokens_that_come_with_the_first_are_counted(clock: ManualClock) -> None:
    """The engine was faster than this process: no token of ten goes missing between the others."""
    frontend, engine, metrics = new_frontend()
    stream = frontend.generate(PROMPT, SamplingParams(), request_id="r")
    waiting = asyncio.ensure_future(anext(stream))
    while not engine.output_queues:
        await asyncio.sleep(0)
    output_queue = engine.output_queues["r#0"]
    clock.now = 15.0
    for _ in range(4):
        output_queue.put_nowait(token())
    await waiting
    clock.now = 18.0
    for reason in (None, None, None, None, None, "length"):
        output_queue.put_nowait(token(reason=reason))
    await anext(stream)
    assert metrics.first == [5.0]
    assert metrics.between == [0.0] * 3 + [0.5] * 6


async def test_samples_side_by_side_have_times_of_their_own(clock: ManualClock) -> None:
    frontend, engine, metrics = new_frontend()
    stream = frontend.generate(PROMPT, SamplingParams(n=3), request_id="r")
    waiting = asyncio.ensure_future(anext(stream))
    while len(engine.output_queues) < 3:
        await asyncio.sleep(0)
    output_queues = dict(engine.output_queues)
    for at, reasons in ((15.0, (None, None, "length")), (17.0, ("stop", "length", None))):
        clock.now = at
        for name, reason in zip(output_queues, reasons, strict=True):
            if at == 15.0 or reason:
                output_queues[name].put_nowait(token(name, reason))
        await (waiting if at == 15.0 else anext(stream))
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert metrics.between == [2.0, 2.0], "five tokens of three samples"
    [report] = metrics.reports
    assert (report.num_samples, report.num_generation_tokens, report.longest_sample) == (3, 5, 2)
    assert report.finish_reason == "length", "one of three was cut"
    assert report.num_prompt_tokens == 1, "a prompt counts once"


@pytest.mark.parametrize(
    ("ending", "reason"),
    [
        ("leave", "abort"),
        ("cancel", "abort"),
        (EngineDeadError("gone"), "error"),
        (SequenceUpdate("r#1", finish_reason="error", error=NO_TOKEN_LEFT), "error"),
        (SequenceUpdate("nobody"), "error"),
    ],
)
async def test_what_ends_a_request_before_its_time(ending: Any, reason: str) -> None:
    frontend, engine, metrics = new_frontend()
    stream = frontend.generate(PROMPT, SamplingParams(n=2), request_id="r")
    waiting = asyncio.ensure_future(anext(stream))
    while len(engine.output_queues) < 2:
        await asyncio.sleep(0)
    output_queue = engine.output_queues["r#0"]
    output_queue.put_nowait(token(reason="stop"))
    await waiting
    if ending == "leave":
        await stream.aclose()
    else:
        further = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        if ending == "cancel":
            further.cancel()
        else:
            output_queue.put_nowait(ending)
        with pytest.raises((SensoriumError, KeyError, asyncio.CancelledError)):
            await further
    [report] = metrics.reports
    assert report.finish_reason == reason, "though one sample had ended well"
    assert not engine.output_queues.keys() - {"r#0"}


async def test_a_client_that_leaves_after_the_end_takes_nothing_back() -> None:
    frontend, engine, metrics = new_frontend()
    stream = frontend.generate(PROMPT, SamplingParams(), request_id="r")
    waiting = asyncio.ensure_future(anext(stream))
    while not engine.output_queues:
        await asyncio.sleep(0)
    engine.output_queues["r#0"].put_nowait(token(reason="stop"))
    await waiting
    await stream.aclose()
    assert [report.finish_reason for report in metrics.reports] == ["stop"]


async def test_a_request_that_got_no_token_has_no_times_of_the_model() -> None:
    frontend, engine, metrics = new_frontend()
    work = asyncio.ensure_future(
        anext(frontend.generate(RawPrompt(text="a"), SamplingParams(), request_id="r"))
    )
    while not engine.output_queues:
        await asyncio.sleep(0)
    work.cancel()
    await asyncio.gather(work, return_exceptions=True)
    [report] = metrics.reports
    assert (report.prefill_seconds, report.decode_seconds) == (None, None)
    assert (report.inference_seconds, report.seconds_per_token) == (None, None)
    assert not metrics.first + metrics.between + metrics.queued


def test_a_clock_that_differs_gives_no_negative_times() -> None:
    """The engine's process and this one read the same clock, but not at the same moment."""
    stream = OutputCollector(
        request_id="r",
        engine_ids=["r#0"],
        text="a",
        token_ids=[1],
        num_item_tokens={},
        params=SamplingParams(),
        continues=False,
        tokenizer=None,  # type: ignore[arg-type]
        arrival_time=10.0,
    )
    times = stream.metrics
    times.first_scheduled_time, times.first_token_time = 9.0, 8.0
    metrics = Metrics()
    request_metrics.report_tokens(metrics, stream, None)
    request_metrics.report_end(metrics, stream, "abort", max_tokens=3)
    assert metrics.queued == [0.0]
    assert metrics.reports[0].prefill_seconds == 0.0


def test_the_line_of_the_log_speaks_of_media_where_there_are_any() -> None:
    stats = EngineStats(
        num_running=3,
        num_waiting=2,
        kv_blocks_total=200,
        kv_blocks_used=50,
        prefix_queries=10,
        prefix_hits=4,
        encoder_queries=9,
        encoder_hits=3,
    )
    text = "3 running, 2 waiting; KV cache 25.0 % used; prefix cache hits 40.0 %"
    assert status_line(stats) == text
    stats.media = {"num_loading": 7, "processor_cache_queries": 8.0, "processor_cache_hits": 2.0}
    media = "7 media items loading; processor cache hits 25.0 %; encoder cache hits 33.3 %"
    assert status_line(stats) == f"{text}; {media}"
    assert "hits 0.0 %" in status_line(EngineStats(media={"num_loading": 0.0}))


async def test_a_step_that_comes_in_parts_is_one_time_for_each_sample(clock: ManualClock) -> None:
    """The tokens of many samples are delivered some at a time."""
    frontend, engine, metrics = new_frontend()
    stream = frontend.generate(PROMPT, SamplingParams(n=3), request_id="r")
    waiting = asyncio.ensure_future(anext(stream))
    while len(engine.output_queues) < 3:
        await asyncio.sleep(0)
    output_queue = engine.output_queues["r#0"]
    for step in range(3):
        clock.now = 15.0 + step
        for sample in range(3):
            output_queue.put_nowait(token(f"r#{sample}"))
            await waiting
            waiting = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert metrics.between == [1.0] * 6, "three samples of three tokens"
