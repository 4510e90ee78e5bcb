import asyncio
import base64
import io

import numpy as np
import pytest
import torch
from aiohttp import web

from sensorium.errors import (
    InvalidEmbeddingsError,
    MediaNotCachedError,
    TooManyItemsError,
)
from sensorium.multimodal.items import MediaRef
from tests.multimodal.pipelines import cached_ref, embeds_ref, object_ref, url_ref
from tests.multimodal.support import encoded, media_server, picture


async def test_an_id_stands_for_its_item(make) -> None:
    setup = make()
    first = (await setup.load(object_ref(picture(), "a")))[0]
    second = (await setup.load(cached_ref("a")))[0]
    assert second.digest == first.digest
    assert second.features is first.features
    third = (await setup.load(url_ref("http://127.0.0.1:1/never", "a")))[0]
    assert third.features is first.features
    assert setup.processor.num_calls == 1
    assert first.digest != (await setup.load(object_ref(picture())))[0].digest


async def test_ids_belong_to_their_tenant_and_salt(make) -> None:
    setup = make()
    await setup.load(object_ref(picture(), "a"), tenant="t", cache_salt="s")
    assert await setup.load(cached_ref("a"), tenant="t", cache_salt="s")
    for scope in ({}, {"tenant": "t"}, {"cache_salt": "s"}, {"tenant": "s", "cache_salt": "t"}):
        with pytest.raises(MediaNotCachedError) as caught:
            await setup.load(cached_ref("a", "here"), **scope)
        assert caught.value.param == "here"
        assert caught.value.status == 404


async def test_what_is_cached_does_not_change_with_the_callers_memory(make) -> None:
    setup = make(enable_mm_embeds=True)
    array = np.full((2, 3, 3), 7, np.uint8)
    tensor = torch.full((3, 1, 1), 7, dtype=torch.uint8)
    embeds = torch.full((2, 8), 7.0)
    refs = [object_ref(array, "a"), object_ref(tensor, "b"), embeds_ref(embeds, "c")]
    items = await setup.load(*refs)
    for memory in (array, tensor, embeds):
        memory[:] = 0
    for item in items:
        for held in item.features.arrays.values():
            assert (held == 7).all()


async def test_an_id_that_is_not_cached(make) -> None:
    setup = make(cache_bytes=100)
    with pytest.raises(MediaNotCachedError, match="'a'"):
        await setup.load(cached_ref("a"))
    await setup.load(object_ref(picture(5, 6, 1), "a"))
    await setup.load(object_ref(picture(5, 6, 2), "b"))  # evicts a
    with pytest.raises(MediaNotCachedError):
        await setup.load(cached_ref("a"))
    assert await setup.load(cached_ref("b"))


async def test_what_a_request_uses_is_not_evicted_meanwhile(make) -> None:
    """The cache has room for two items.

    The third must not push out one that the request waits with.
    """
    setup = make(cache_bytes=200)
    await setup.load(object_ref(picture(5, 6, 1), "a"))
    refs = [cached_ref("a"), object_ref(picture(5, 6, 2), "b"), object_ref(picture(5, 6, 3), "c")]
    assert len(await setup.load(*refs)) == 3
    assert await setup.load(cached_ref("a"))


async def test_ids_are_ignored_when_there_is_nothing_to_cache(make, caplog) -> None:
    setup = make(cache_bytes=0, ids_matter=False)
    plain = (await setup.load(object_ref(picture())))[0]
    for _ in range(2):
        assert (await setup.load(object_ref(picture(), "a")))[0].digest == plain.digest
    assert caplog.text.count("multi_modal_uuids are ignored") == 1
    with pytest.raises(MediaNotCachedError):
        await setup.load(cached_ref("a"))


async def test_an_id_is_the_identity_even_without_a_processor_cache(make) -> None:
    setup = make(cache_bytes=0)
    one = (await setup.load(object_ref(picture(seed=1), "a")))[0]
    other = (await setup.load(object_ref(picture(seed=2), "a")))[0]
    assert one.digest == other.digest


# --- embeddings -----------------------------------------------------------------------------------
# -------------------


def base64_of(tensor: torch.Tensor) -> str:
    file = io.BytesIO()
    torch.save(tensor, file)
    return base64.b64encode(file.getvalue()).decode()


async def test_embeddings_become_items(make) -> None:
    setup = make(enable_mm_embeds=True)
    tensor = torch.randn(2, 3, 8)
    for source in (tensor, base64_of(tensor), {"image_embeds": tensor}):
        items = await setup.load(embeds_ref(source))
        assert [item.features.num_embeds for item in items] == [3, 3]
        assert all(item.features.precomputed for item in items)
        for i, item in enumerate(items):
            assert np.array_equal(item.features.arrays["embeds"], tensor[i].numpy())
        digests = [item.digest for item in items]
        assert len(set(digests)) == 2
    again = await setup.load(embeds_ref(tensor.clone()[1]))
    assert again[0].digest == digests[1]
    assert (await setup.load(embeds_ref(tensor[1] + 1)))[0].digest not in digests


async def test_embeddings_count_as_items(make) -> None:
    setup = make(enable_mm_embeds=True, limit_mm_per_prompt={"image": 1})
    with pytest.raises(TooManyItemsError):
        await setup.load(embeds_ref(torch.zeros(2, 3, 8)))


async def test_wrong_embeddings_are_refused_with_their_place(make) -> None:
    setup = make(enable_mm_embeds=True)
    for source in (
        torch.zeros(3, 7),
        torch.zeros(3, 8).to_sparse(),
        "AAAA",
        base64_of(torch.zeros(2)),
    ):
        with pytest.raises(InvalidEmbeddingsError) as caught:
            await setup.load(embeds_ref(source, param="here"))
        assert caught.value.param == "here"


async def test_embeddings_with_ids(make) -> None:
    setup = make(enable_mm_embeds=True)
    tensor = torch.randn(2, 3, 8)
    ref = MediaRef("image", "embeds", tensor, None, "p", ("a", None))
    first = await setup.load(ref)
    cached = (await setup.load(cached_ref("a")))[0]
    assert cached.digest == first[0].digest
    assert cached.features.precomputed
    assert (await setup.load(embeds_ref(torch.zeros(3, 8), "a")))[0].features is cached.features
    with pytest.raises(InvalidEmbeddingsError, match="3 ids for the embeddings of 2 images"):
        await setup.load(MediaRef("image", "embeds", tensor, None, "p", ("x", "y", "z")))


async def test_a_name_used_again_for_another_length_is_another_item(make) -> None:
    """Embeddings kept under the name must not be taken for something longer."""
    short, long = make(cache_bytes=0), make(cache_bytes=0)
    long.processor.num_embeds = 5
    first = (await short.load(object_ref(picture(), "name")))[0]
    second = (await long.load(object_ref(picture(), "name")))[0]
    assert first.features.num_embeds != second.features.num_embeds
    assert first.digest != second.digest


async def test_what_came_first_under_an_id_stays_though_other_data_were_on_their_way(make) -> None:
    setup = make()
    released = asyncio.Event()

    async def slow(request: web.Request) -> web.Response:
        await released.wait()
        return web.Response(body=encoded(picture(seed=1)))

    async with media_server() as server:
        server.handlers["/slow"] = slow
        late = asyncio.create_task(setup.load(url_ref(server.url("/slow"), uuid="a")))
        while not server.paths:
            await asyncio.sleep(0)
        (first,) = await setup.load(object_ref(picture(seed=0), uuid="a"))
        released.set()
        (second,) = await late
    assert second.digest == first.digest
    assert second.features is first.features
    assert setup.processor.num_calls == 1
