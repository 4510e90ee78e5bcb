"""Served models under fuzz: requests that nobody should send, and good ones among damaged ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fuzz.campaign import Plan, fuzz
from tests.fuzz.crowd import mixed
from tests.fuzz.requests import Sent
from tests.fuzz.served import Served

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("model", "num_requests"), [("demo", 200), ("demo-audio", 80)])
async def test_any_request_gets_an_answer(model: str, num_requests: int, tmp_path: Path) -> None:
    """Among them a load of good requests with a tenth of damaged media, from sixteen clients."""
    async with Served(model, tmp_path) as served:
        report = await fuzz(served, Plan(num_requests, 4, seed=0, folder=tmp_path))
        assert not report.violations
        load = await mixed(served, Plan(num_requests // 2, 16, seed=0, folder=tmp_path), 0.1)
        assert not load.violations
        assert load.counts["200"] >= 0.7 * load.num_requests
    assert served.status == 0


def post(path: str, body: object) -> Sent:
    return Sent(path, json.dumps(body).encode(), value=body)


async def test_faults_that_were_found_here(tmp_path: Path) -> None:
    """Each was a 5xx, or a refusal of a good request, when the fuzzer came upon it."""
    async with Served("demo", tmp_path) as served:
        padding = {"prompt": [1320, 5], "max_tokens": 1, "logprobs": 2, "echo": True}
        answer = await served.send(post("/v1/completions", padding))
        assert answer.status == 200, answer.body
    assert served.status == 0
