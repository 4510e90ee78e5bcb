"""Encoders apart: what a process for HTTP asks of them, where items go, and what their death does."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import numpy as np
import psutil
import pytest
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from sensorium import LLM, SamplingParams
from sensorium.errors import OverloadedError
from sensorium.multimodal.items import EMBEDS_DTYPE, Features, MediaItem
from sensorium.ray.encoders import client
from sensorium.ray.encoders.client import Encoders
from sensorium.ray.encoders.router import bounded
from sensorium.ray.media.features import FeaturesRef
from tests.e2e.serving import Server
from tests.ray.test_serving import metrics, wait_for
from tests.reliability.media import picture_url

PIXELS = np.full(100, 7, np.uint8)
BITS = np.arange(16, dtype=np.uint8).reshape(2, 8)


def item(digest: bytes, *, precomputed: bool = False) -> MediaItem:
    return MediaItem("image", digest, Features("image", {"pixels": PIXELS}, 2, {}, precomputed))


def made(digest: bytes) -> Features:
    return Features("image", {"embeds": BITS}, 2, {EMBEDS_DTYPE: "float32"}, precomputed=True)


class FakeAnswer:
    """Answer of an encoder, which comes when ``future`` has it."""

    def __init__(self) -> None:
        self.future: asyncio.Future[Features | None] = asyncio.get_running_loop().create_future()
        self.is_cancelled = False

    def __await__(self) -> Any:
        return self.future.__await__()

    def cancel(self) -> None:
        self.is_cancelled = True


class FakeHandle:
    """Handle of encoders that answer with ``outcomes`` in turn; without one they wait."""

    app_name, deployment_name = "app", "Encoder"

    def __init__(self, *outcomes: Features | Exception | None) -> None:
        self.outcomes = list(outcomes)
        self.answers: list[FakeAnswer] = []
        self.asked: list[bytes] = []
        self.encode = self

    def remote(self, digest: bytes, reference: FeaturesRef) -> FakeAnswer:
        self.asked.append(digest)
        answer = FakeAnswer()
        self.answers.append(answer)
        if self.outcomes:
            outcome = self.outcomes.pop(0)
            if isinstance(outcome, Exception):
                answer.future.set_exception(outcome)
            else:
                answer.future.set_result(outcome)
        return answer


class FakeFeatures:
    """Features that go to engines as they are."""

    async def references(self, items: list[MediaItem]) -> tuple[FeaturesRef, ...]:
        return tuple(FeaturesRef(one, "plain") for one in items)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def fleet(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Replicas of encoders that are there."""
    replicas: dict[str, Any] = {"one": None}
    monkeypatch.setattr(client, "put_features", lambda one: FeaturesRef(one, None))
    monkeypatch.setattr("ray.put", lambda arrays: ("put", arrays))
    monkeypatch.setattr(client, "encoders_of", lambda *_: replicas)
    monkeypatch.setattr(client, "LOOK_SECONDS", 0.01)
    monkeypatch.setattr(client, "DOWN_SECONDS", 0.0)
    return replicas


def encoders(handle: FakeHandle, *, kept: int = 1000, waiting: int = 1000) -> Encoders:
    features: Any = FakeFeatures()
    return Encoders(handle, features, most_kept=kept, most_waiting=waiting)


async def until_asked(handle: FakeHandle, number: int) -> None:
    while len(handle.asked) < number:
        await asyncio.sleep(0.001)


async def test_an_item_is_encoded_once() -> None:
    handle = FakeHandle()
    apart = encoders(handle)
    first = asyncio.create_task(apart.references([item(b"a"), item(b"a")], [b"a", b"a"]))
    second = asyncio.create_task(apart.references([item(b"a")], [b"a"]))
    await until_asked(handle, 1)
    handle.answers[0].future.set_result(made(b"a"))
    found = [*await first, *await second, *await apart.references([item(b"a")], [b"a"])]
    assert handle.asked == [b"a"]
    for reference in found:
        assert (reference.item.digest, reference.item.features.precomputed) == (b"a", True)
        assert reference.item.features.meta == {EMBEDS_DTYPE: "float32"}
        assert not reference.item.features.arrays
        assert reference.arrays == ("put", {"embeds": BITS})


async def test_what_encoders_do_not_make_stays_as_it_is() -> None:
    """Embeddings, items of an adapter that changes the encoder, and what cannot be encoded."""
    handle = FakeHandle(None)
    items = [item(b"a", precomputed=True), item(b"b"), item(b"bad")]
    found = await encoders(handle).references(items, [b"a", b"b, with an adapter", b"bad"])
    assert [reference.arrays for reference in found] == ["plain"] * 3
    assert handle.asked == [b"bad"]


async def test_the_latest_embeddings_are_kept_within_a_budget() -> None:
    handle = FakeHandle(*(made(b"") for _ in range(5)))
    apart = encoders(handle, kept=2 * BITS.nbytes)
    for name in (b"a", b"b", b"a", b"c", b"a", b"b"):
        await apart.references([item(name)], [name])
    assert handle.asked == [b"a", b"b", b"c", b"b"], "b was asked for longest ago"
    small = encoders(handle, kept=1)
    [reference] = await small.references([item(b"a")], [b"a"])
    assert reference.item.features.precomputed


async def test_another_encoder_is_asked_when_one_dies() -> None:
    handle = FakeHandle(RayActorError(), made(b"a"))
    [reference] = await encoders(handle).references([item(b"a")], [b"a"])
    assert reference.item.features.precomputed
    assert handle.asked == [b"a", b"a"]


async def test_engines_encode_while_there_are_no_encoders(
    fleet: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    fleet.clear()
    handle = FakeHandle()
    apart = encoders(handle)
    for name in (b"a", b"b"):
        [reference] = await apart.references([item(name)], [name])
        assert reference.arrays == "plain"
    assert handle.asked == [b"a"], "the second one waits for nobody"
    assert handle.answers[0].is_cancelled
    assert caplog.text.count("no encoder is there") == 1
    fleet["two"] = None
    handle.outcomes = [made(b"c")]
    [reference] = await apart.references([item(b"c")], [b"c"])
    assert reference.item.features.precomputed


async def test_engines_encode_what_kills_encoders() -> None:
    handle = FakeHandle(*(RayActorError() for _ in range(client.MOST_TRIES)))
    [reference] = await encoders(handle).references([item(b"a")], [b"a"])
    assert reference.arrays == "plain"


async def test_too_many_items_are_refused() -> None:
    handle = FakeHandle()
    apart = encoders(handle, waiting=150)
    names = [b"a", b"larger than the limit together"]
    first = asyncio.create_task(apart.references([item(name) for name in names], names))
    await until_asked(handle, 2)
    with pytest.raises(OverloadedError) as caught:
        await apart.references([item(b"b")], [b"b"])
    assert caught.value.retry_after == 2
    for answer in handle.answers:
        answer.future.set_result(made(b"a"))
    await first
    handle.outcomes = [BackPressureError(1, 1)]
    with pytest.raises(OverloadedError):
        await apart.references([item(b"b")], [b"b"])
    handle.outcomes = [made(b"b")]
    await apart.references([item(b"b")], [b"b"])


async def test_a_request_that_leaves_frees_its_work_unless_others_want_it() -> None:
    handle = FakeHandle()
    apart = encoders(handle, waiting=150)
    leaving = asyncio.create_task(apart.references([item(b"a")], [b"a"]))
    staying = asyncio.create_task(apart.references([item(b"a")], [b"a"]))
    await until_asked(handle, 1)
    leaving.cancel()
    await asyncio.wait((leaving,))
    assert not handle.answers[0].is_cancelled
    staying.cancel()
    await asyncio.wait((staying,))
    while not handle.answers[0].is_cancelled:
        await asyncio.sleep(0.001)
    handle.outcomes = [made(b"b")]
    await apart.references([item(b"b")], [b"b"])


def test_a_busy_replica_comes_behind_the_others() -> None:
    assert bounded(["a", "b"], {}) == ["a", "b"]
    assert bounded(["a", "b"], {"a": 1}) == ["b", "a"]
    assert bounded(["a", "b"], {"a": 1, "b": 1}) == ["a", "b"]
    assert bounded(["a", "b"], {"a": 3, "b": 1}) == ["b", "a"]
    assert bounded(["a"], {"a": 9}) == ["a"]


# ---- one encoder and two engines of the demo

QUESTION = "What is this?"
FLAGS = (
    *("--data-parallel-size", "2", "--encoder-replicas", "1", "--dtype", "float32"),
    *("--num-kv-blocks", "256", "--disable-log-stats", "--ray-application", "apart"),
)


@pytest.fixture(scope="module")
def server(ray_address: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One encoder and two engines on the cluster of all tests here."""
    log = tmp_path_factory.mktemp("serve") / "log.txt"
    started = Server("demo", log, (*FLAGS, "--ray-address", ray_address))
    yield started
    assert started.stop(signal.SIGINT) == 0, log.read_text()


def asked(url: str, seed: int) -> list[int]:
    """Ask about a picture; the tokens of the answer."""
    parts = [
        {"type": "image_url", "image_url": {"url": picture_url(seed)}},
        {"type": "text", "text": QUESTION},
    ]
    body = {"model": "demo", "messages": [{"role": "user", "content": parts}], "max_tokens": 12}
    body |= {"temperature": 0, "return_token_ids": True}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"][0]["token_ids"])


def in_one_process(seeds: range) -> list[list[int]]:
    """Tokens of the answers about pictures, by an engine of this process."""
    chats = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": picture_url(seed)}},
                    {"type": "text", "text": QUESTION},
                ],
            }
        ]
        for seed in seeds
    ]
    llm = LLM("demo", dtype="float32", num_kv_blocks=256)
    params = SamplingParams(temperature=0, max_tokens=12)
    return [list(output.outputs[0].token_ids) for output in llm.chat(chats, params)]


def encoded_by_engines(url: str) -> float:
    """Items that went through the encoder of some engine."""
    text = httpx.get(f"{url}/metrics").text
    line = r'^sensorium:media_stage_items_total\{engine="\w+".*stage="encode"\} (\S+)$'
    return sum(map(float, re.findall(line, text, re.MULTILINE)))


def encoder_process() -> psutil.Process:
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any("ServeReplica:apart:Encoder" in part for part in process.cmdline()):
                return process
    raise AssertionError("there is no encoder")


@pytest.mark.slow
def test_pictures_are_encoded_apart_and_without_encoders_by_engines(server: Server) -> None:
    expected = in_one_process(range(6))
    assert [asked(server.url, seed) for seed in range(3)] == expected[:3]
    assert asked(server.url, 0) == expected[0]
    items = "encoder_replica_items_total"
    wait_for(lambda: sum(metrics(server.url, items).values()) >= 3)
    assert sum(metrics(server.url, items).values()) == 3, "each once"
    wait_for(lambda: sum(metrics(server.url, "mm_encoder_items_total").values()) >= 3)
    assert encoded_by_engines(server.url) == 0
    assert min(metrics(server.url, "encoder_replica_weight_bytes").values()) > 1e6

    before = set(metrics(server.url, items))
    encoder_process().kill()
    assert asked(server.url, 1) == expected[1], "its embeddings outlive it"
    assert asked(server.url, 3) == expected[3]
    wait_for(lambda: set(metrics(server.url, items)) - before)
    assert asked(server.url, 4) == expected[4]
    wait_for(lambda: sum(metrics(server.url, items).values()) >= 1)
