"""Media that clients name by ids, over several processes for HTTP: what one got, another finds."""

from __future__ import annotations

import asyncio
import dataclasses
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import ray
import torch
from PIL import Image
from ray.serve.exceptions import RayServeException

from sensorium.errors import MediaNotCachedError
from sensorium.multimodal.items import Features, MediaItem, MediaRef
from sensorium.multimodal.shared_memory import SharedArraysFolder
from sensorium.ray.media import index as indexes
from sensorium.ray.media import names
from sensorium.ray.media.features import FeaturesOut
from sensorium.ray.media.index import SharedRef, own_node
from sensorium.ray.media.names import NamesElsewhere, NamesIndex
from tests.multimodal.pipelines import Setup, cached_ref, embeds_ref, object_ref
from tests.ray.indexes import emptied

RED, BLUE = (np.full((4, 4, 3), shade, np.uint8) for shade in (9, 200))


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the directory answer late, as on a machine under load."""
    monkeypatch.setattr(indexes, "FIND_SECONDS", 60.0)
    monkeypatch.setattr(names, "DATA_SECONDS", 60.0)


@pytest.fixture
def directory(ray_address: str) -> Iterator[Any]:
    actor = ray.remote(num_cpus=0)(NamesIndex).remote(1 << 20)
    yield actor
    ray.kill(actor)


class Recorded(NamesElsewhere):
    """The directory as a process uses it, with the digests of what it offers."""

    def __init__(self, index: Any, features: FeaturesOut) -> None:
        super().__init__(index, features)
        self.digests: list[bytes] = []

    def offer(self, digest: bytes, features: Features) -> None:
        self.digests.append(digest)
        super().offer(digest, features)


class Process:
    """What a process for HTTP has of media."""

    def __init__(self, directory: Any) -> None:
        self.out = FeaturesOut()
        self.names = Recorded(directory, self.out)
        self._folder = SharedArraysFolder()
        self.media = Setup(elsewhere=self.names, shared_folder=self._folder, enable_mm_embeds=True)

    async def load(self, *refs: Any, **options: Any) -> list[MediaItem]:
        items = await self.media.load(*refs, **options)
        await self.names.settled()
        return items


def pixels(item: MediaItem) -> list[int]:
    return sorted(set(np.ravel(item.features.arrays["pixels"]).tolist()))


async def test_what_one_process_got_another_finds_by_its_id(directory: Any) -> None:
    one, other = Process(directory), Process(directory)
    [sent] = await one.load(object_ref(RED, "a"))
    [found] = await other.load(cached_ref("a"))
    assert pixels(found) == [9]
    assert found.digest == sent.digest
    assert found.features.content == sent.features.content
    [again] = await other.load(cached_ref("a"), tenant="")
    assert again.features.arrays is found.features.arrays, "it is kept here"
    assert other.media.processor.num_calls == 0


async def test_an_id_stands_for_the_first_item_in_all_processes(directory: Any) -> None:
    """As in one process: whatever comes under a known id is not even looked at."""
    one, other = Process(directory), Process(directory)
    await one.load(object_ref(RED, "a"))
    [found] = await other.load(object_ref(BLUE, "a"))
    assert pixels(found) == [9]
    assert other.media.processor.num_calls == 0


@pytest.mark.parametrize("scope", [{"tenant": "ben"}, {"cache_salt": "salt"}])
async def test_nobody_finds_what_another_has_named(directory: Any, scope: dict[str, str]) -> None:
    one, other = Process(directory), Process(directory)
    await one.load(object_ref(RED, "a"))
    with pytest.raises(MediaNotCachedError, match="'a'"):
        await other.load(cached_ref("a"), **scope)
    [own] = await other.load(object_ref(BLUE, "a"), **scope)
    assert pixels(own) == [200]


async def test_embeddings_have_ids_too(directory: Any) -> None:
    one, other = Process(directory), Process(directory)
    embeds = torch.arange(16, dtype=torch.float32).reshape(2, 8)
    [sent] = await one.load(embeds_ref(embeds, "a"))
    for ref in (cached_ref("a"), embeds_ref(embeds * 0, "a")):
        [found] = await other.load(ref)
        assert found.digest == sent.digest
        assert found.features.precomputed
        assert found.features.arrays["embeds"].tolist() == embeds.tolist()


async def test_a_lost_directory_is_only_a_miss(directory: Any) -> None:
    one, other = Process(directory), Process(directory)
    await one.load(object_ref(RED, "a"))
    ray.kill(directory)
    with pytest.raises(MediaNotCachedError):
        await other.load(cached_ref("a"))
    assert pixels((await other.load(object_ref(BLUE, "a")))[0]) == [200]
    assert pixels((await one.load(cached_ref("a")))[0]) == [9]


async def test_one_item_under_an_id_and_without_has_one_copy_in_the_store(directory: Any) -> None:
    one = Process(directory)
    [named] = await one.load(object_ref(RED, "a"))
    plain = dataclasses.replace(named, digest=b"plain")
    first, second = await one.out.references([named, plain])
    assert (first.item.digest, second.item.digest) == (named.digest, b"plain")
    assert first.arrays == second.arrays
    assert len(one.out) == 1


async def test_what_died_with_a_process_is_offered_by_one_that_has_it(
    directory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names, "AGAIN_SECONDS", 0.0)
    one, other, third = Process(directory), Process(directory), Process(directory)
    [item] = await one.load(object_ref(RED, "a"))
    await other.load(cached_ref("a"))
    [key] = one.names.digests
    await directory.forget.remote(key, await directory.find.remote(key))
    with pytest.raises(MediaNotCachedError):
        await third.load(cached_ref("a"))
    await other.load(cached_ref("a"))
    [found] = await third.load(cached_ref("a"))
    assert found.digest == item.digest


@pytest.mark.parametrize("about", [None, Features("image", {}, 4)])
async def test_what_is_no_features_is_forgotten(directory: Any, about: Any) -> None:
    here = NamesElsewhere(directory, FeaturesOut())
    data = ray.put({"pixels": RED})
    await directory.keep.remote(b"a", SharedRef(data, 7, about, own_node()))
    assert await directory.stats.remote() == (1, 7)
    assert await here.find(b"a") is None
    await emptied(directory)


class Away:
    """A directory that answers nobody."""

    def __init__(self) -> None:
        self.asked = 0
        self.find = self.keep = self

    async def remote(self, *_: object) -> None:
        self.asked += 1
        await asyncio.sleep(0)
        raise RayServeException("unavailable")


async def test_other_items_under_one_id_in_two_processes_do_not_mix(ray_address: str) -> None:
    """Neither has heard of the other's when it comes; engines are asked by the items' digests."""
    one, other = Process(Away()), Process(Away())
    for first, second in (
        (bytes_ref(RED), bytes_ref(BLUE)),
        (embeds_ref(torch.ones(2, 8), "a"), embeds_ref(torch.zeros(2, 8), "a")),
    ):
        [mine], [yours] = await one.load(first), await other.load(second)
        assert mine.digest != yours.digest
        [again], [same] = await one.load(cached_ref("a")), await other.load(first)
        assert (again.digest, same.digest) == (mine.digest, yours.digest)
        one, other = Process(Away()), Process(Away())
    [red], [copy] = await one.load(bytes_ref(RED)), await other.load(bytes_ref(RED))
    assert red.digest == copy.digest


def bytes_ref(pixels: np.ndarray) -> MediaRef:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return MediaRef("image", "bytes", file.getvalue(), "a", "p")


async def test_each_machine_has_room_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A quarter of its store, and what comes to a full one takes no room of another's."""
    nodes = [
        {"NodeID": name, "Alive": name != "gone", "Resources": {"object_store_memory": store}}
        for name, store in (("small", 400.0), ("large", 4000.0), ("gone", 4000.0))
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    index = NamesIndex(10_000)
    for number, (node, num_bytes) in enumerate(
        [("large", 900), ("small", 60), ("small", 60), ("small", 101), ("gone", 1)]
    ):
        reference: Any = SharedRef(None, num_bytes, node=node)  # type: ignore[arg-type]
        await index.keep(str(number).encode(), reference)
    assert await index.stats() == (2, 960)
    assert await index.find(b"1") is None
    assert await index.find(b"2") is not None


async def test_two_requests_for_an_id_ask_once() -> None:
    directory = Away()
    process = Process(directory)
    loads = [process.media.load(cached_ref("a")) for _ in range(2)]
    found = await asyncio.gather(*loads, return_exceptions=True)
    assert [type(one) for one in found] == [MediaNotCachedError] * 2
    assert directory.asked == 1
