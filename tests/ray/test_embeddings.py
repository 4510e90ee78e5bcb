"""What replicas share through an index: embeddings, and the index itself."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.serve.exceptions import RayServeException

from sensorium.config import EngineConfig, engine_config
from sensorium.engine import wire
from sensorium.engine.loading import device_name
from sensorium.engine.stats import EngineFacts
from sensorium.errors import EngineDeadError
from sensorium.models.gguf import folder as folders
from sensorium.models.loading import checkpoint
from sensorium.models.loading.weight_files import identity_of_checkpoint
from sensorium.multimodal.items import Features, MediaItem
from sensorium.ray.media import embeddings
from sensorium.ray.media import index as indexes
from sensorium.ray.media.embeddings import SharedEmbeddings
from sensorium.ray.media.index import IndexClient, SharedIndex, SharedRef
from sensorium.ray.media.space import Space, files_of, space_of
from tests.checkpoints import make_text
from tests.checkpoints.gguf import write_gguf
from tests.ray.indexes import emptied

BITS = np.arange(32, dtype=np.uint8).reshape(4, 8)
FACTS = EngineFacts(64, 4, 16, 64, "cpu", "bfloat16", 1, 0.0, embed_bytes=8)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the index answer late, as on a machine under load."""
    monkeypatch.setattr(indexes, "FIND_SECONDS", 60.0)
    monkeypatch.setattr(embeddings, "DATA_SECONDS", 60.0)


def item(digest: bytes, num_embeds: int = 4) -> MediaItem:
    return MediaItem("image", digest, Features("image", {}, num_embeds))


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


def reference(num_bytes: int, data: object = None) -> SharedRef:
    return SharedRef(data, num_bytes)  # type: ignore[arg-type]


async def test_the_index_keeps_to_its_budget() -> None:
    index = SharedIndex(100)
    for name in (b"a", b"b", b"c"):
        await index.keep(name, reference(40))
    assert await index.find(b"a") is None
    assert await index.find(b"b") is not None
    await index.keep(b"d", reference(40))
    assert await index.find(b"c") is None, "b was asked for later"
    assert await index.stats() == (2, 80)
    await index.keep(b"b", reference(60))
    assert await index.stats() == (2, 100)
    await index.keep(b"too large", reference(101))
    await index.forget(b"unknown", reference(1))
    assert await index.stats() == (2, 100)


async def test_the_index_keeps_so_many_however_small() -> None:
    index = SharedIndex(100, most_entries=2)
    for name in (b"a", b"b", b"c"):
        await index.keep(name, reference(0))
    assert (await index.stats(), await index.find(b"a")) == ((2, 0), None)


async def test_a_complaint_about_the_one_before_takes_nothing_away() -> None:
    index = SharedIndex(100)
    await index.keep(b"a", reference(40, "old"))
    await index.keep(b"a", reference(40, "new"))
    await index.forget(b"a", reference(40, "old"))
    assert await index.find(b"a") == reference(40, "new")
    await index.forget(b"a", reference(40, "new"))
    assert await index.stats() == (0, 0)


@pytest.fixture
def index(ray_address: str) -> Any:
    actor = ray.remote(num_cpus=0)(SharedIndex).remote(1000)
    yield actor
    ray.kill(actor)


async def test_one_replica_finds_what_another_has_encoded(index: Any) -> None:
    one, other = (SharedEmbeddings(index, b"model", FACTS) for _ in range(2))
    client: Any = FakeClient({b"item": BITS})
    assert await other.find(item(b"item")) is None
    one.offer([item(b"item"), item(b"gone"), item(b"dead")], client)
    one.offer([item(b"item")], client)
    await one.settled()
    assert client.asked == [b"item", b"gone", b"dead"], "one offer at a time"
    one.offer([item(b"item"), item(b"gone"), item(b"dead")], client)
    await one.settled()
    assert client.asked[3:] == [b"gone", b"dead"], "again what has not been offered"
    found = await other.find(item(b"item"))
    assert found is not None
    assert found[0].tobytes() == BITS.tobytes()
    assert (found[0].shape, found[1]) == (BITS.shape, "bfloat16")
    assert (one.num_offered, other.num_found) == (1, 1)
    assert await SharedEmbeddings(index, b"other model", FACTS).find(item(b"item")) is None


@pytest.mark.parametrize(
    ("data", "dtype"),
    [
        (BITS[:3], "bfloat16"),
        (BITS.astype(np.int16), "bfloat16"),
        (BITS, "float16"),
        ({"embeds": BITS}, "bfloat16"),
    ],
)
async def test_what_is_not_as_it_should_be_is_forgotten(index: Any, data: Any, dtype: str) -> None:
    shared = SharedEmbeddings(index, b"model", FACTS)
    await index.keep.remote(b"model" + b"item", SharedRef(ray.put(data), 32, dtype))
    assert await shared.find(item(b"item")) is None
    await emptied(index)
    assert shared.num_found == 0


async def test_what_was_given_up_may_be_offered_again(index: Any) -> None:
    shared = SharedEmbeddings(index, b"model", FACTS)
    client: Any = FakeClient(dict.fromkeys((b"a", b"b"), BITS))
    for number in range(2):
        shared.offer([item(b"a")], client)
        await shared.settled()
        assert shared.num_offered == number + 1
        [reference] = [await index.find.remote(b"model" + b"a")]
        await index.forget.remote(b"model" + b"a", reference)
        assert await shared.find(item(b"a")) is None


class Other:
    """A replica in another process."""

    async def offer(self, index: Any) -> int:
        shared = SharedEmbeddings(index, b"model", FACTS)
        shared.offer([item(b"item")], FakeClient({b"item": BITS}))  # type: ignore[arg-type]
        await shared.settled()
        return os.getpid()


async def test_what_a_dead_replica_has_left_is_forgotten(index: Any) -> None:
    other: Any = ray.remote(num_cpus=0)(Other).remote()
    process = await other.offer.remote(index)
    here = SharedEmbeddings(index, b"model", FACTS)
    assert await here.find(item(b"item")) is not None
    os.kill(process, signal.SIGKILL)
    end = time.monotonic() + 60
    while await here.find(item(b"item")) is not None or (await index.stats.remote())[0]:
        assert time.monotonic() < end
        await asyncio.sleep(0.05)


class FailingIndex:
    """An index whose deployment cannot be reached; each call is as that of a handle."""

    def __init__(self) -> None:
        self.asked = 0
        self.find = self.keep = self

    async def remote(self, *_: object) -> SharedRef | None:
        self.asked += 1
        raise RayServeException("unavailable")


async def test_an_index_that_fails_is_left_alone_for_a_while() -> None:
    failing = FailingIndex()
    shared = SharedEmbeddings(failing, b"model", FACTS)
    assert await shared.find(item(b"one")) is None
    assert await shared.find(item(b"two")) is None
    assert failing.asked == 1


class LateIndex:
    """An index that answers when it may; ``data`` is where the objects are."""

    def __init__(self, data: asyncio.Future[None]) -> None:
        self.asked = 0
        self.may_answer = asyncio.Event()
        self.find = self
        self.forget = types.SimpleNamespace(remote=self._cannot)
        self._data = data

    async def remote(self, _: bytes) -> SharedRef:
        self.asked += 1
        await self.may_answer.wait()
        return reference(1, asyncio.shield(self._data))

    def _cannot(self, *_: object) -> None:
        raise RayServeException("unavailable")


def is_there(_: SharedRef, data: object) -> bool:
    return data is None


async def test_an_index_that_is_late_is_left_alone_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(indexes, "FIND_SECONDS", 0.01)
    late = LateIndex(asyncio.get_running_loop().create_future())
    client = IndexClient(late, "things", 60.0)
    assert await client.find(b"a", is_there) is None
    late.may_answer.set()
    assert await client.find(b"b", is_there) is None
    assert late.asked == 1


async def test_an_object_that_is_late_keeps_no_other_from_being_found() -> None:
    data: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    late = LateIndex(data)
    late.may_answer.set()
    assert await IndexClient(late, "things", 0.01).find(b"a", is_there) is None
    client = IndexClient(late, "things", 60.0)
    first = asyncio.create_task(client.find(b"a", is_there))
    data.set_result(None)
    assert await first is not None
    assert await client.find(b"b", is_there) is not None
    assert late.asked == 3


async def test_objects_that_are_lost_are_forgotten_and_nothing_is_raised() -> None:
    data: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    data.set_exception(RayServeException("its owner has died"))
    late = LateIndex(data)
    late.may_answer.set()
    client = IndexClient(late, "things", 60.0)
    assert await client.find(b"a", is_there) is None
    assert await client.find(b"a", is_there) is None
    assert late.asked == 2


async def test_offers_that_fail_are_logged_once_and_made_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    client = IndexClient(FailingIndex(), "things", 60.0)

    async def made() -> SharedRef:
        return reference(1)

    for _ in range(3):
        client.offer(b"a", 1, made)
        await client.settled()
    assert client.num_offered == 0
    assert [r.message for r in caplog.records] == ["things are not shared: RayServeException"]


async def test_offers_under_way_have_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(indexes, "MOST_OFFER_BYTES", 100)
    client, asked, may_go_on = IndexClient(FailingIndex(), "things", 60.0), [], asyncio.Event()

    def offer(name: bytes, num_bytes: int) -> None:
        async def made() -> None:
            asked.append(name)
            await may_go_on.wait()

        client.offer(name, num_bytes, made)

    offer(b"large", 1000)
    offer(b"dropped", 1)
    may_go_on.set()
    await client.settled()
    offer(b"a", 60)
    offer(b"dropped", 41)
    offer(b"b", 40)
    await client.settled()
    assert asked == [b"large", b"a", b"b"]


def space(model: str, numerics: str = "cpu avx2 bfloat16", **options: Any) -> bytes:
    config: EngineConfig = engine_config(model=model, **options)
    return space_of(config, numerics, files_of(config))


def test_models_with_other_weights_share_nothing() -> None:
    demo = space("demo")
    assert demo
    assert demo == space("demo")
    assert demo == space("demo", dtype="bfloat16", device="cpu", num_threads=3), "as numerics says"
    assert demo != space("demo", media_io_kwargs={"video": {"fps": 1}})
    assert demo != space("demo-audio")
    assert not space("demo", load_format="dummy")
    assert not space("demo", "")


def test_encoders_whose_bits_differ_share_nothing() -> None:
    assert len({space("demo", bits) for bits in ("cpu avx2 float16", "cuda H200 float16")}) == 2


async def test_weights_that_were_replaced_while_they_were_read_have_no_identity(
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(checkpoint.find("demo"), tmp_path / "model"))
    [weights] = folder.glob("*.safetensors")
    own = Space(engine_config(model=str(folder)))
    await own.look_before()
    first = await own.look("cpu")
    assert first
    own.forget()
    assert not own.value
    assert await own.look("cpu") == first, "started again from the same files"
    os.utime(weights, ns=(1, 1))
    assert not await own.look("cpu"), "from which files is not known"
    assert await own.look("cpu") not in (b"", first)
    weights.unlink()
    fetched = Space(engine_config(model=str(folder)))
    await fetched.look_before()
    assert not await fetched.look("cpu")


def test_a_gguf_file_is_told_by_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "cache_root", lambda: tmp_path / "caches")
    file = tmp_path / "model.gguf"
    write_gguf(make_text("qwen2", tmp_path / "text"), file)
    first = space(str(file))
    assert first == space(str(file))
    os.utime(file, ns=(1, 1))
    assert space(str(file)) not in (b"", first)


def test_copies_of_a_checkpoint_are_told_apart_by_any_change(tmp_path: Path) -> None:
    def copied(name: str) -> Path:
        return Path(shutil.copytree(checkpoint.find("demo"), tmp_path / name))

    first, configured, renamed, later = map(copied, ("first", "configured", "renamed", "later"))
    assert identity_of_checkpoint(first) == identity_of_checkpoint(copied("second"))
    config = configured / "config.json"
    config.write_text(config.read_text() + "\n")
    [weights] = renamed.glob("*.safetensors")
    weights.rename(renamed / "other.safetensors")
    [weights] = later.glob("*.safetensors")
    os.utime(weights, ns=(1, 1))
    assert (
        len({identity_of_checkpoint(folder) for folder in (first, configured, renamed, later)}) == 4
    )


def test_a_file_of_the_hubs_cache_is_told_by_its_name_there(tmp_path: Path) -> None:
    blobs, folders = tmp_path / "blobs", [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for folder in (blobs, *folders):
        folder.mkdir()
    for number, folder in enumerate(folders):
        blob = blobs / (("1" if number < 2 else "2") * 64)
        blob.write_bytes(b"the same")
        os.utime(blob, ns=(number, number))
        (folder / "model.safetensors").symlink_to(blob)
    one, two, three = map(identity_of_checkpoint, folders)
    assert one == two != three


def test_gpus_are_told_apart_by_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [("NVIDIA T4", (7, 5)), ("NVIDIA H200", (9, 0))]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: kinds[device.index][0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: kinds[device.index][1])
    found = [device_name(torch.device(name)) for name in ("cuda:0", "cuda:1", "cpu")]
    assert found == ["NVIDIA T4 7.5", "NVIDIA H200 9.0", ""]
