"""The load of pictures, its files and its figures, against a server without an engine."""

from __future__ import annotations

import asyncio
import importlib
import io
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from tests.server.fake_frontend import FakeFrontend
from tests.server.harness import running

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def media_load(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "media_load", raising=False)
    return importlib.import_module("media_load")


def metrics_of(values: list[float]) -> str:
    """The text of /metrics with these values in a histogram."""
    registry = CollectorRegistry()
    histogram = Histogram(
        "sensorium:lag_seconds", "Lag.", ("model_name",), registry=registry, buckets=(1, 2, 4)
    ).labels("m")
    for value in values:
        histogram.observe(value)
    return generate_latest(registry).decode()


def test_histograms_are_read_from_metrics(media_load: ModuleType) -> None:
    earlier = media_load.read_histogram(metrics_of([0.5, 1.5]), "lag_seconds")
    later = media_load.read_histogram(metrics_of([0.5, 1.5, 1.0, 3, 9, 9]), "lag_seconds")
    assert later.bounds == (1, 2, 4, math.inf)
    assert later.counts == (2, 1, 1, 2)
    assert later.since(earlier).counts == (1, 0, 1, 2)
    with pytest.raises(LookupError, match="other_seconds"):
        media_load.read_histogram(metrics_of([]), "other_seconds")


def test_quantiles_are_bounds_of_buckets(media_load: ModuleType) -> None:
    histogram = media_load.Histogram((1.0, 2.0, math.inf), (98, 1, 1))
    assert [histogram.quantile(q) for q in (0.5, 0.98, 0.99, 1)] == [1.0, 1.0, 2.0, math.inf]
    found = histogram.as_dict()
    assert (found["p50"], found["p99"], found["max"]) == (1.0, 2.0, None)
    assert json.loads(json.dumps(found)) == found
    empty = media_load.Histogram((1.0, math.inf), (0, 0))
    assert empty.quantile(0.99) == 0.0


def test_each_body_has_another_picture_of_its_size(media_load: ModuleType) -> None:
    bodies = media_load.Bodies("demo", (64, 48), 4)
    urls = set()
    for number in (0, 1, media_load.NUM_PICTURES, 10**15):
        pieces = bodies.body(number)
        body = json.loads(b"".join(pieces))
        url = body["messages"][0]["content"][0]["image_url"]["url"]
        urls.add(url)
        data = media_load.base64.b64decode(url.partition(",")[2], validate=True)
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            assert (image.format, image.size) == ("JPEG", (64, 48))
            assert image.info["comment"] == b"%024d" % number
    assert len(urls) == 4


def test_large_pictures_have_megabytes(media_load: ModuleType) -> None:
    num_bytes = [len(media_load.noisy_jpeg(number, 1024, 1024)) for number in range(4)]
    assert num_bytes == sorted(num_bytes)
    assert num_bytes[0] * 4 > 1_000_000  # at 2048 x 2048
    assert num_bytes[-1] * 4 < 4_000_000


async def test_clients_send_picture_after_picture(media_load: ModuleType) -> None:
    async with running(FakeFrontend()) as server:
        load = media_load.ImageLoad(server.base_url, "demo", 2, 0.2, (64, 64))
        result = await media_load._send_images(load, media_load.Bodies("demo", (64, 64), 4))
        calls = server.frontend.calls
        assert result.statuses == {200: len(calls)}
        assert len(result.seconds) == len(calls) >= 2
        urls = {call.prompt.conversation.refs[0].source for call in calls}
        assert len(urls) == len(calls)
        assert result.num_body_bytes > sum(map(len, urls))


async def test_pictures_repeat_when_they_shall(media_load: ModuleType) -> None:
    numbers = media_load._numbers(3)
    first = [next(numbers) for _ in range(7)]
    assert first == [first[0], first[0] + 1, first[0] + 2] * 2 + [first[0]]


async def test_texts_and_health_are_asked_until_the_end(media_load: ModuleType) -> None:
    until = asyncio.Event()
    async with running(FakeFrontend()) as server:
        texts = asyncio.create_task(media_load.ask_texts(server.base_url, "demo", until))
        health = asyncio.create_task(media_load.probe_health(server.base_url, until))
        async with asyncio.timeout(10):
            while len(server.frontend.calls) < 2:
                await asyncio.sleep(0.005)
        until.set()
        assert len(await texts) >= 2
        assert min(await health) > 0
        assert all(not call.prompt.conversation.refs for call in server.frontend.calls)


@pytest.mark.parametrize(
    ("statuses", "p99", "ok"),
    [
        ({"200": 5}, 0.01, True),
        ({"200": 5}, 0.015, False),
        ({"200": 5}, None, False),
        ({"200": 5, "503": 1}, 0.001, False),
        ({}, 0.001, False),
    ],
)
def test_what_passes(
    media_load: ModuleType, statuses: dict[str, int], p99: float | None, ok: bool
) -> None:
    found = {"under_load": {"loop_lag_seconds": {"p99": p99}, "statuses": statuses}}
    assert media_load.passed(found, 0.01) is ok
