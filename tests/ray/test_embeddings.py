"""Embeddings that replicas share: the index, and what a replica does with it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import numpy as np
import pytest
import ray
from ray.serve.exceptions import RayServeException

from sensorium.config import engine_config
from sensorium.engine import wire
from sensorium.errors import EngineDeadError
from sensorium.ray.media import embeddings
from sensorium.ray.media.embeddings import (
    EmbeddingsRef,
    SharedEmbeddings,
    SharedIndex,
    space_of,
)

BITS = np.arange(32, dtype=np.uint8).reshape(4, 8)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the index answer late, as on a machine under load."""
    monkeypatch.setattr(embeddings, "FIND_SECONDS", 60.0)


class FakeClient:
    """An engine that has encoded some items."""

    def __init__(self, digests: dict[bytes, np.ndarray]) -> None:
        self._digests = digests
        self.asked: list[bytes] = []

    async def embeddings(self, digest: bytes) -> wire.Embeddings:
        self.asked.append(digest)
        if digest == b"dead":
            raise EngineDeadError("dead")
        return wire.Embeddings(1, self._digests.get(digest), "bfloat16")


def reference(num_bytes: int) -> EmbeddingsRef:
    return EmbeddingsRef(None, "float32", num_bytes)  # type: ignore[arg-type]


def test_the_index_keeps_to_its_budget() -> None:
    index = SharedIndex(100)
    for name in (b"a", b"b", b"c"):
        index.keep(name, reference(40))
    assert index.find(b"a") is None
    assert index.find(b"b") is not None
    index.keep(b"d", reference(40))
    assert index.find(b"c") is None, "b was asked for later"
    assert index.stats() == (2, 80)
    index.keep(b"b", reference(60))
    assert index.stats() == (2, 100)
    index.keep(b"too large", reference(101))
    index.forget(b"unknown")
    assert index.stats() == (2, 100)


@pytest.fixture
def index(ray_address: str) -> Any:
    actor = ray.remote(num_cpus=0)(SharedIndex).remote(1000)
    yield actor
    ray.kill(actor)


async def test_one_replica_finds_what_another_has_encoded(index: Any) -> None:
    one, other = SharedEmbeddings(index, b"model"), SharedEmbeddings(index, b"model")
    client: Any = FakeClient({b"item": BITS})
    assert await other.find(b"item") is None
    one.offer([b"item", b"gone", b"dead"], client)
    one.offer([b"item"], client)
    await one.settled()
    assert client.asked == [b"item", b"gone", b"dead"], "each once"
    found = await other.find(b"item")
    assert found is not None
    assert found[0].tobytes() == BITS.tobytes()
    assert (found[0].shape, found[1]) == (BITS.shape, "bfloat16")
    assert (one.num_offered, other.num_found) == (1, 1)
    assert await SharedEmbeddings(index, b"other model").find(b"item") is None


class Other:
    """A replica in another process."""

    async def offer(self, index: Any) -> int:
        shared = SharedEmbeddings(index, b"model")
        shared.offer([b"item"], FakeClient({b"item": BITS}))  # type: ignore[arg-type]
        await shared.settled()
        return os.getpid()


async def test_what_a_dead_replica_has_left_is_forgotten(index: Any) -> None:
    other: Any = ray.remote(num_cpus=0)(Other).remote()
    process = await other.offer.remote(index)
    here = SharedEmbeddings(index, b"model")
    assert await here.find(b"item") is not None
    os.kill(process, signal.SIGKILL)
    end = time.monotonic() + 60
    while await here.find(b"item") is not None or (await index.stats.remote())[0]:
        assert time.monotonic() < end
        await asyncio.sleep(0.05)


class FailingIndex:
    """An index whose deployment cannot be reached; ``find.remote`` is as that of a handle."""

    def __init__(self) -> None:
        self.asked = 0
        self.find = self

    async def remote(self, key: bytes) -> EmbeddingsRef | None:
        self.asked += 1
        raise RayServeException("unavailable")


async def test_an_index_that_fails_is_left_alone_for_a_while() -> None:
    failing = FailingIndex()
    shared = SharedEmbeddings(failing, b"model")
    assert await shared.find(b"one") is None
    assert await shared.find(b"two") is None
    assert failing.asked == 1


def test_models_with_other_weights_share_nothing() -> None:
    demo = space_of(engine_config(model="demo"))
    assert demo is not None
    assert demo == space_of(engine_config(model="demo"))
    assert demo != space_of(engine_config(model="demo", dtype="float32"))
    assert demo != space_of(engine_config(model="demo-audio"))
    assert space_of(engine_config(model="demo", load_format="dummy")) is None
