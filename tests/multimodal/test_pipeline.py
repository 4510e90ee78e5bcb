import asyncio
import dataclasses
import threading
from collections.abc import Mapping
from typing import NoReturn

import numpy as np
import pytest
import torch
from aiohttp import web

from sensorium.config import MediaConfig
from sensorium.errors import (
    InvalidRequestError,
    MediaFetchError,
    MediaTooLargeError,
    MediaUndecodableError,
    OverloadedError,
)
from sensorium.multimodal.cache.features import FeatureCache
from sensorium.multimodal.decode.loaders import DecodeJob, Prepared
from sensorium.multimodal.items import Features, Fetched, MediaRef
from sensorium.multimodal.pipeline import MediaPipeline
from sensorium.multimodal.shared_memory import NoRoomError, SharedArrays, SharedArraysFolder
from sensorium.multimodal.workers.pool import DecoderStats
from tests.multimodal.pipelines import object_ref, url_ref
from tests.multimodal.support import (
    FakeProcessor,
    data_url,
    encoded,
    media_server,
    picture,
    raw_server,
)


async def test_items_come_in_order_whatever_their_source(make) -> None:
    setup = make()
    sources = [picture(4, 4, seed) for seed in range(4)]
    items = await setup.load(
        object_ref(sources[0]),
        url_ref(data_url(encoded(sources[1]))),
        MediaRef("image", "bytes", encoded(sources[2])),
        object_ref(np.asarray(sources[3])),
    )
    for item, source in zip(items, sources, strict=True):
        assert item.modality == "image"
        assert np.array_equal(item.features.arrays["pixels"], np.asarray(source))
    assert len({item.digest for item in items}) == 4
    assert all(len(item.digest) == 32 for item in items)


async def test_nothing_to_load(make) -> None:
    assert await make().load() == []


async def test_a_repeated_item_is_not_decoded_again(make) -> None:
    setup = make()
    for ref in (url_ref(data_url(encoded(picture()))), object_ref(picture(seed=1))):
        first = (await setup.load(ref))[0]
        second = (await setup.load(ref))[0]
        assert second.features is first.features
        assert second.digest == first.digest
    stats = setup.pipeline.stats()
    assert (stats.decode.count, stats.preprocess.count) == (2, 2)
    assert (stats.cache.queries, stats.cache.hits) == (4, 2)
    assert stats.cache.num_bytes == 2 * picture().width * picture().height * 3


async def test_a_repeated_data_url_is_not_even_read_again(make, monkeypatch) -> None:
    setup = make()
    ref = url_ref(data_url(encoded(picture())))
    first = (await setup.load(ref))[0]

    async def fetch(*args: object) -> Fetched:
        raise AssertionError("read again")

    monkeypatch.setattr(setup.pipeline.fetcher, "fetch", fetch)
    assert (await setup.load(ref))[0].features is first.features
    monkeypatch.undo()
    scaled = (await setup.load(ref, mm_processor_kwargs={"scale": 2}))[0]
    assert scaled.digest != first.digest
    setup.cache.clear()
    again = (await setup.load(ref))[0]
    assert again.digest == first.digest
    assert again.features is not first.features


async def test_the_same_bytes_from_two_places_are_one_item(make) -> None:
    setup = make()
    data = encoded(picture())
    items = await setup.load(url_ref(data_url(data)), MediaRef("image", "bytes", data))
    assert items[0].digest == items[1].digest
    assert setup.processor.num_calls == 1


async def test_options_make_items_of_their_own(make) -> None:
    setup = make()
    ref = object_ref(picture())
    plain = (await setup.load(ref))[0].digest
    scaled = (await setup.load(ref, mm_processor_kwargs={"scale": 2}))[0].digest
    other = {"image": {"rgba_background_color": [0, 0, 0]}}
    dark = (await setup.load(ref, media_io_kwargs=other))[0].digest
    assert len({plain, scaled, dark}) == 3
    white = {"image": {"rgba_background_color": (255, 255, 255)}}
    assert (await setup.load(ref, media_io_kwargs=white))[0].digest == plain


async def test_the_background_reaches_the_decoder(make) -> None:
    clear = picture(2, 2).convert("RGBA")
    clear.putalpha(0)
    setup = make(media_io_kwargs={"image": {"rgba_background_color": [1, 2, 3]}})
    item = (await setup.load(object_ref(clear)))[0]
    assert item.features.arrays["pixels"][0, 0].tolist() == [1, 2, 3]
    request = {"image": {"rgba_background_color": [4, 5, 6]}}
    item = (await setup.load(object_ref(clear), media_io_kwargs=request))[0]
    assert item.features.arrays["pixels"][0, 0].tolist() == [4, 5, 6]


async def test_the_bound_of_an_item_reaches_the_decoder_beside_the_background(make) -> None:
    clear = picture(8, 4).convert("RGBA")
    clear.putalpha(0)
    setup = make(media_io_kwargs={"image": {"rgba_background_color": [1, 2, 3]}})
    ref = object_ref(clear)
    small = dataclasses.replace(ref, loading={"max_pixels": 8})
    whole, item = await setup.load(ref, small)
    assert whole.features.arrays["pixels"].shape[:2] == (4, 8)
    assert item.features.arrays["pixels"].shape[:2] == (2, 4)
    assert item.features.arrays["pixels"][0, 0].tolist() == [1, 2, 3]
    assert whole.digest != item.digest


async def test_without_a_cache_everything_is_done_again(make) -> None:
    setup = make(cache_bytes=0)
    for _ in range(2):
        await setup.load(object_ref(picture()))
    assert setup.processor.num_calls == 2


# --- fetching -------------------------------------------------------------------------------------


async def test_a_hundred_requests_for_one_url_are_one_fetch_and_one_decode(make) -> None:
    setup = make(cache_bytes=0)
    setup.processor.gate = threading.Event()
    arrived = asyncio.Event()
    release = asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        arrived.set()
        await release.wait()
        return web.Response(body=encoded(picture()))

    async with media_server() as server:
        server.handlers["/a"] = handler
        loads = [asyncio.create_task(setup.load(url_ref(server.url("/a")))) for _ in range(99)]
        await arrived.wait()
        loads.append(asyncio.create_task(setup.load(url_ref(server.url("/a")))))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        release.set()
        while setup.processor.num_calls == 0:
            await asyncio.sleep(0)
        while setup.cache.stats().queries < 100:  # all know the digest before the processor ends
            await asyncio.sleep(0)
        setup.processor.gate.set()
        items = [item for found in await asyncio.gather(*loads) for item in found]
    assert server.paths == ["/a"]
    assert setup.processor.num_calls == 1
    assert len({item.digest for item in items}) == 1
    stats = setup.pipeline.stats()
    assert (stats.fetch.count, stats.decode.count, stats.preprocess.count) == (1, 1, 1)
    assert stats.fetch.num_bytes == len(encoded(picture()))
    assert stats.fetch.seconds > 0


async def test_a_hundred_requests_one_after_another_are_one_fetch_and_one_decode(make) -> None:
    """The host answers long before the last of them comes."""
    setup = make(media_url_reuse_seconds=3600.0)
    async with media_server() as server:
        server.serve("/a", encoded(picture()))
        for _ in range(100):
            await setup.load(url_ref(server.url("/a")))
        assert server.paths == ["/a"]
        await setup.load(url_ref(server.url("/a") + "?b"))
        assert server.paths == ["/a", "/a"]
    stats = setup.pipeline.stats()
    assert (stats.fetch.count, stats.decode.count, stats.preprocess.count) == (2, 1, 1)


async def test_the_same_url_twice_in_a_request_is_fetched_once(make) -> None:
    setup = make()
    async with media_server() as server:
        server.serve("/a", encoded(picture()))
        items = await setup.load(*[url_ref(server.url("/a"))] * 5)
    assert server.paths == ["/a"]
    assert len({item.digest for item in items}) == 1


async def test_a_caller_who_leaves_does_not_cancel_the_fetch_of_others(make) -> None:
    setup = make(media_url_reuse_seconds=0)
    arrived, release, gone = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def handler(request: web.Request) -> web.Response:
        arrived.set()
        try:
            await release.wait()
        except asyncio.CancelledError:
            gone.set()
            raise
        return web.Response(body=encoded(picture()))

    async with media_server() as server:
        server.handlers["/a"] = handler
        one, other = (asyncio.create_task(setup.load(url_ref(server.url("/a")))) for _ in range(2))
        await arrived.wait()
        one.cancel()
        await asyncio.gather(one, return_exceptions=True)
        release.set()
        assert len(await other) == 1
        arrived.clear()
        release.clear()
        last = asyncio.create_task(setup.load(url_ref(server.url("/a"))))
        await arrived.wait()
        last.cancel()
        await asyncio.gather(last, return_exceptions=True)
        await gone.wait()  # the server sees the connection close
    assert setup.pipeline.fetcher.num_running == 0


async def test_one_bad_item_cancels_the_rest_and_is_named(make) -> None:
    setup = make(image_fetch_timeout=60.0)
    async with raw_server(keep_open=True) as server:
        refs = [url_ref(f"http://127.0.0.1:{server.port}/"), object_ref(np.zeros(3), param="bad")]
        with pytest.raises(InvalidRequestError) as caught:
            await setup.load(*refs)
    assert caught.value.param == "bad"
    assert setup.pipeline.fetcher.num_running == 0


async def test_a_shared_failure_names_each_callers_place(make) -> None:
    setup = make()
    async with media_server() as server:
        server.serve("/a", b"", status=404)
        loads = [setup.load(url_ref(server.url("/a"), param=f"p{i}")) for i in range(3)]
        found = await asyncio.gather(*loads, return_exceptions=True)
    assert server.paths == ["/a"]
    assert [error.param for error in found] == ["p0", "p1", "p2"]
    assert all(isinstance(error, MediaFetchError) and "404" in error.message for error in found)
    assert setup.pipeline.stats().failures == {"media_fetch_failed": 3}


async def test_a_shared_refusal_is_each_callers_own(make, monkeypatch) -> None:
    setup = make()
    shared = OverloadedError("later")
    shared.retry_after = 7

    async def refuse(*args: object) -> None:
        raise shared

    monkeypatch.setattr(setup.pipeline.fetcher, "fetch", refuse)
    found = await asyncio.gather(
        *(setup.load(url_ref("http://127.0.0.1/a")) for _ in range(2)), return_exceptions=True
    )
    assert [(type(e), e.message, e.retry_after) for e in found] == [
        (OverloadedError, "later", 7)
    ] * 2
    assert len({id(error) for error in (shared, *found)}) == 3


async def test_downloads_that_wait_to_be_decoded_are_bounded(make) -> None:
    """A content counts once for all requests that share it, and until the last of them is loaded."""
    data = [encoded(picture()), encoded(picture(40, 40))]
    assert len(data[1]) > len(data[0])
    setup = make(max_media_bytes_in_flight=len(data[0]) + len(data[1]) - 1)
    budget = setup.pipeline.fetcher.budget
    setup.processor.gate = threading.Event()
    async with media_server() as server:
        for path, body in zip("ab", data, strict=True):
            server.serve(f"/{path}", body)
        server.serve("/again", data[0])
        refs = [url_ref(server.url(path)) for path in ("/a", "/a", "/again")]
        loads = [asyncio.create_task(setup.load(ref)) for ref in refs]
        while budget.num_holders < 3:
            assert not any(load.done() for load in loads)
            await asyncio.sleep(0)
        assert budget.num_bytes == len(data[0])
        with pytest.raises(OverloadedError, match="wait to be decoded"):
            await setup.load(url_ref(server.url("/b")))
        assert budget.num_bytes == len(data[0])
        setup.processor.gate.set()
        await asyncio.gather(*loads)
        assert budget.num_bytes == 0
        assert len(await setup.load(url_ref(server.url("/b")))) == 1
    assert budget.num_bytes == 0


async def test_downloads_that_are_more_than_all_may_be_are_too_large(make) -> None:
    """Alone or together: no other request's end would make room for them."""
    data = [encoded(picture(seed=seed)) for seed in range(2)]
    most = max(map(len, data))
    async with media_server() as server:
        for path, body in zip("ab", data, strict=True):
            server.serve(f"/{path}", body)
        refs = [url_ref(server.url(path)) for path in ("/a", "/b")]
        for room, some in ((most - 1, refs), (most, refs), (len(data[0]) - 1, refs[:1])):
            setup = make(max_media_bytes_in_flight=room)
            with pytest.raises(MediaTooLargeError, match="--max-media-bytes-in-flight"):
                await setup.load(*some)
            assert setup.pipeline.fetcher.budget.num_bytes == 0
        assert len(await make(max_media_bytes_in_flight=sum(map(len, data))).load(*refs)) == 2


async def test_files_of_this_machine_are_no_downloads(make, tmp_path) -> None:
    (tmp_path / "a").write_bytes(encoded(picture()))
    setup = make(max_media_bytes_in_flight=1, allowed_local_media_path=str(tmp_path))
    assert len(await setup.load(url_ref(f"{tmp_path}/a"))) == 1


async def test_a_request_is_refused_as_soon_as_too_much_has_come(make) -> None:
    """Another that waits for one of the same downloads gets it all the same."""
    body = encoded(picture())
    setup = make(max_request_media_bytes=2 * len(body) - 1, image_fetch_timeout=60.0)
    release = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(body))})
        await response.prepare(request)
        await response.write(body[:-1])
        await release.wait()
        await response.write(body[-1:])
        return response

    async with media_server() as server:
        for path in "abc":
            server.handlers[f"/{path}"] = handler
        other = asyncio.create_task(setup.load(url_ref(server.url("/a"))))
        refs = [url_ref(server.url(f"/{path}"), param=path) for path in "abc"]
        with pytest.raises(MediaTooLargeError, match="together") as caught:
            await setup.load(*refs)
        assert caught.value.param in ("a", "b", "c")
        release.set()
        assert len(await other) == 1
    assert setup.pipeline.fetcher.budget.num_bytes == 0


async def test_all_downloads_of_a_request_are_bounded_together(make) -> None:
    data = encoded(picture())
    setup = make(max_request_media_bytes=2 * len(data))
    refs = [MediaRef("image", "bytes", data, param=f"p{i}") for i in range(3)]
    assert len(await setup.load(*refs[:2])) == 2
    with pytest.raises(MediaTooLargeError, match="together"):
        await setup.load(*refs)
    urls = [url_ref(data_url(data))] * 3
    with pytest.raises(MediaTooLargeError):
        await setup.load(*urls)


async def test_encoded_files_are_bounded(make) -> None:
    data = encoded(picture())
    setup = make(max_media_bytes=len(data) - 1)
    for ref in (MediaRef("image", "bytes", data), url_ref(data_url(data))):
        with pytest.raises(MediaTooLargeError):
            await setup.load(ref)


async def test_one_corrupt_item_in_ten_harms_no_other(make) -> None:
    setup = make()
    async with media_server() as server:
        for i in range(30):
            data = encoded(picture(seed=i))
            server.serve(f"/{i}", data[: len(data) // 2] if i % 10 == 3 else data)
        loads = [setup.load(url_ref(server.url(f"/{i}"))) for i in range(30)]
        found = await asyncio.gather(*loads, return_exceptions=True)
    bad = [i for i, result in enumerate(found) if isinstance(result, MediaUndecodableError)]
    assert bad == [3, 13, 23]
    assert all(isinstance(r, list) for i, r in enumerate(found) if i not in bad)


async def test_local_files(make, tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(picture()))
    setup = make(allowed_local_media_path=str(tmp_path))
    items = await setup.load(url_ref(f"{tmp_path}/a.png"), url_ref(f"file://{tmp_path}/a.png"))
    assert items[0].digest == items[1].digest
    assert setup.processor.num_calls == 1


class FullDecoders:
    """No room for the features of the first items."""

    def __init__(self, num_failures: int, cache: FeatureCache) -> None:
        self.num_failures = num_failures
        self.cache = cache
        self.num_entries: list[int] = []

    async def prepare(self, job: DecodeJob, source: object) -> Prepared:
        self.num_entries.append(self.cache.stats().num_entries)
        if len(self.num_entries) <= self.num_failures:
            raise OverloadedError("no room")
        return Prepared(Features("image", {"pixels": np.zeros(3, np.uint8)}, 4), 0.1, 3, 0.1)

    def stats(self) -> DecoderStats:
        return DecoderStats()

    def close(self) -> None:
        return


class CrowdedDecoders(FullDecoders):
    """Features of ``num_bytes`` each; there is room for 100, of which others have some."""

    def __init__(self, num_bytes: int, num_others: int) -> None:
        super().__init__(0, FeatureCache(0))
        self.num_bytes = num_bytes
        self.num_used = num_others

    async def prepare(self, job: DecodeJob, source: object) -> Prepared:
        if self.num_used + self.num_bytes > 100:
            raise NoRoomError(self.num_bytes, 100)
        self.num_used += self.num_bytes
        pixels = np.zeros(self.num_bytes, np.uint8)
        return Prepared(Features("image", {"pixels": pixels}, 4), 0.1, 3, 0.1)


@pytest.mark.parametrize(
    ("num_bytes", "num_others", "num_items", "kind"),
    [
        (100, 1, 1, OverloadedError),
        (101, 0, 1, MediaTooLargeError),
        (50, 51, 2, OverloadedError),
        (51, 0, 2, MediaTooLargeError),
    ],
)
async def test_what_can_never_fit_is_too_large(
    num_bytes: int, num_others: int, num_items: int, kind: type[Exception]
) -> None:
    """Where waiting would not help, the request is refused for good."""
    decoders = CrowdedDecoders(num_bytes, num_others)
    pipeline = MediaPipeline(MediaConfig(), FakeProcessor(), FeatureCache(0), decoders=decoders)
    refs = [MediaRef("image", "bytes", encoded(picture(seed=i))) for i in range(num_items)]
    with pytest.raises(kind) as caught:
        await pipeline.load(refs)
    assert type(caught.value) is kind
    if kind is MediaTooLargeError:
        assert f"{num_items * num_bytes} bytes" in str(caught.value)
    pipeline.close()


async def test_embeddings_that_can_never_fit_are_too_large() -> None:
    class Full(SharedArraysFolder):
        together = threading.Barrier(1)
        """Where writes wait for those of the other items, whose sizes are known then."""

        def write(self, arrays: Mapping[str, np.ndarray]) -> NoReturn:
            self.together.wait(60)
            size = sum(array.nbytes for array in arrays.values())
            raise NoRoomError(size, 2 * size - 1)

    config, processor, folder = MediaConfig(enable_mm_embeds=True), FakeProcessor(), Full()
    pipeline = MediaPipeline(config, processor, FeatureCache(0), shared_folder=folder)
    one, two = (MediaRef("image", "embeds", torch.ones(1, 4, 8) * n, param=f"p{n}") for n in (1, 2))
    with pytest.raises(OverloadedError):
        await pipeline.load([one])
    folder.together = threading.Barrier(2)
    with pytest.raises(MediaTooLargeError):
        await pipeline.load([one, two])
    folder.together.abort()
    pipeline.close()


@pytest.mark.parametrize("num_failures", [1, 2])
async def test_what_is_cached_makes_room_once(num_failures: int) -> None:
    cache = FeatureCache(1 << 20)
    cache.put(b"old", Features("image", {"pixels": np.zeros(9, np.uint8)}, 1))
    decoders = FullDecoders(num_failures, cache)
    pipeline = MediaPipeline(MediaConfig(), FakeProcessor(), cache, decoders=decoders)
    ref = MediaRef("image", "bytes", encoded(picture()))
    if num_failures == 1:
        (item,) = await pipeline.load([ref])
        assert item.features.num_embeds == 4
    else:
        with pytest.raises(OverloadedError):
            await pipeline.load([ref])
    assert decoders.num_entries == [1, 0]
    pipeline.close()


async def test_all_features_lie_in_segments_where_they_have_to() -> None:
    folder = SharedArraysFolder()
    cache = FeatureCache(1 << 20)
    config = MediaConfig(enable_mm_embeds=True)
    pipeline = MediaPipeline(config, FakeProcessor(), cache, shared_folder=folder)
    embeds = torch.ones(2, 4, 8)
    refs = [
        MediaRef("image", "object", picture()),
        MediaRef("image", "bytes", encoded(picture(seed=1))),
        MediaRef("image", "embeds", embeds, uuids=("a", "b")),
    ]
    items = await pipeline.load(refs)
    items += await pipeline.load([MediaRef("image", "cached", None, "a")])
    assert all(isinstance(item.features.arrays, SharedArrays) for item in items)
    np.testing.assert_array_equal(items[0].features.arrays["pixels"], np.asarray(picture()))
    np.testing.assert_array_equal(items[4].features.arrays["embeds"], embeds[0].numpy())
    assert items[4].features is items[2].features
    pipeline.close()
    folder.close()
