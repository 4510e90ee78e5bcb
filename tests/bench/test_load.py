from __future__ import annotations

import asyncio
import itertools
import json
import math
import statistics

import pytest

from sensorium.bench import report
from sensorium.bench.client import StreamClient
from sensorium.bench.load import LoadPlan, LoadResult, chat_body, run_load
from sensorium.bench.workload import RandomWorkload
from sensorium.errors import ConfigError
from tests.bench.fake_server import CACHED_TOKENS, serving

WORKLOAD = RandomWorkload(input_len=4)


async def run(plan: LoadPlan, kinds: list[str] | None = None) -> LoadResult:
    """Run the plan against a fake server; ``kinds``: the behaviour for each request."""
    async with serving() as fake, StreamClient(fake.base_url) as client:
        return await run_load(client, bodies(plan, kinds), plan)


def bodies(plan: LoadPlan, kinds: list[str] | None = None) -> list[bytes]:
    return [
        chat_body(WORKLOAD, index, "m", plan.output_len, {"fake": kinds[index]} if kinds else {})
        for index in range(plan.num_prompts)
    ]


def test_a_body_is_a_streamed_greedy_chat_request() -> None:
    sent = json.loads(chat_body(WORKLOAD, 0, "m", 7, {"ignore_eos": True, "temperature": 1.0}))
    assert sent["messages"] == [{"role": "user", "content": WORKLOAD.text(0)}]
    assert (sent["model"], sent["max_tokens"], sent["stream"]) == ("m", 7, True)
    assert sent["stream_options"] == {"include_usage": True}
    assert (sent["ignore_eos"], sent["temperature"]) == (True, 1.0)


def test_poisson_arrivals() -> None:
    plan = LoadPlan(num_prompts=4000, output_len=1, request_rate=20.0, seed=3)
    arrivals = plan.arrivals()
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    assert arrivals[0] == 0.0
    assert statistics.fmean(gaps) == pytest.approx(1 / 20, rel=0.1)
    assert statistics.stdev(gaps) == pytest.approx(1 / 20, rel=0.1), "exponential: spread = mean"
    assert plan.arrivals() == arrivals
    assert LoadPlan(num_prompts=3, output_len=1).arrivals() == [0.0, 0.0, 0.0]


def test_who_leaves() -> None:
    leaves = LoadPlan(num_prompts=30, output_len=10, leave_fraction=1 / 3).leaves()
    leaving = [after for after in leaves if after is not None]
    assert len(leaving) == 10
    assert all(1 <= after <= 5 for after in leaving)
    assert LoadPlan(num_prompts=30, output_len=10).leaves() == [None] * 30


async def test_all_requests_are_answered_once() -> None:
    plan = LoadPlan(num_prompts=20, output_len=3)
    ended = []
    async with serving() as fake, StreamClient(fake.base_url) as client:
        result = await run_load(client, bodies(plan), plan, ended.append)
        texts = [sent["messages"][0]["content"] for sent in fake.bodies]
    assert sorted(texts) == sorted(WORKLOAD.text(index) for index in range(20))
    assert len(ended) == len(result.records) == 20
    assert all(record.completed for record in result.records)
    assert result.seconds >= max(record.end_to_end for record in result.records)


@pytest.mark.parametrize("concurrency", [1, 4, None])
async def test_concurrency_is_the_most_in_flight(concurrency: int | None) -> None:
    plan = LoadPlan(num_prompts=12, output_len=2, concurrency=concurrency)
    hold = asyncio.Event()
    async with serving(hold) as fake, StreamClient(fake.base_url) as client:
        load = asyncio.create_task(run_load(client, bodies(plan), plan))
        expected = concurrency or 12
        while fake.most_at_once < expected:
            await asyncio.sleep(0)
        hold.set()
        await load
        assert fake.most_at_once == expected


async def test_errors_and_leavers_are_counted_apart() -> None:
    kinds = ["", "refuse", "refuse", "break", "no_usage"]
    result = await run(LoadPlan(num_prompts=5, output_len=4), kinds)
    found = report.load_results(result)
    assert found["errors"] == {"503 overloaded": 2, "broken_stream": 1}
    assert found["error_messages"]["503 overloaded"] == "The queue is full."
    assert (found["num_requests"], found["num_completed"], found["num_left"]) == (5, 2, 0)
    assert (found["prompt_tokens"], found["completion_tokens"]) == (10, 8)
    assert found["cached_tokens"] == CACHED_TOKENS
    assert found["num_without_usage"] == 1
    assert found["output_tokens_per_second"] == pytest.approx(8 / result.seconds)
    assert found["e2e_seconds"]["maximum"] <= result.seconds
    table = report.load_table(found)
    assert "2 of 5 requests completed" in table
    assert "2 x 503 overloaded: The queue is full." in table

    left = await run(LoadPlan(num_prompts=6, output_len=400, leave_fraction=0.5))
    assert report.load_results(left)["num_left"] == 3
    assert report.load_results(left)["num_completed"] == 3


async def test_nothing_completed_is_still_a_report() -> None:
    result = await run(LoadPlan(num_prompts=2, output_len=2), ["refuse", "refuse"])
    found = report.load_results(result)
    assert found["ttft_seconds"] is None
    assert "0 of 2 requests completed" in report.load_table(found)
    json.dumps(found, allow_nan=False)


async def test_details_count_from_the_first_request() -> None:
    result = await run(LoadPlan(num_prompts=3, output_len=2))
    rows = report.detail(result)
    assert min(row["start"] for row in rows) == 0.0
    assert all(row["start"] <= row["chunks"][0] <= row["end"] for row in rows)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"num_prompts": 0}, "num_prompts"),
        ({"output_len": 0}, "output_len"),
        ({"request_rate": 0.0}, "request_rate"),
        ({"request_rate": math.nan}, "request_rate"),
        ({"concurrency": 0}, "concurrency"),
        ({"leave_fraction": 1.5}, "leave_fraction"),
    ],
)
def test_wrong_values_name_their_flag(changes: dict[str, object], param: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LoadPlan(**{"num_prompts": 1, "output_len": 1, **changes})
    assert caught.value.param == param
