"""Features that come to a replica by references, or embeddings of another replica in their place."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from sensorium.multimodal.items import EMBEDS_DTYPE, Features, MediaItem
from sensorium.ray.media.features import FeaturesIn, FeaturesRef

BITS = np.arange(8, dtype=np.uint8).reshape(2, 4)


class Shared:
    """Embeddings of other replicas: of one item."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []

    async def find(self, item: MediaItem) -> tuple[np.ndarray, str] | None:
        self.asked.append(item.digest)
        return (BITS, "bfloat16") if item.digest == b"known" else None


def reference(
    digest: bytes,
    *,
    precomputed: bool = False,
    value: int = 9,
    space: bytes = b"",
) -> Any:
    arrays = asyncio.get_running_loop().create_future()
    arrays.set_result({"pixels": np.full(4, value, np.uint8)})
    features = Features("image", {}, 2, {"size": 3}, precomputed)
    return FeaturesRef(MediaItem("image", digest, features), arrays, space)


async def test_items_come_from_where_they_are_cheapest() -> None:
    shared: Any = Shared()
    incoming = FeaturesIn(1000, shared)
    references = [reference(b"known"), reference(b"new"), reference(b"given", precomputed=True)]
    known, new, given = await incoming.items(references, [b"known", b"new", b"given"])
    assert (known.digest, known.features.precomputed) == (b"known", True)
    assert known.features.meta == {EMBEDS_DTYPE: "bfloat16"}
    assert known.features.arrays["embeds"].tolist() == BITS.tolist()
    assert (new.features.precomputed, new.features.meta) == (False, {"size": 3})
    assert new.features.arrays["pixels"].tolist() == [9] * 4
    assert given.features.precomputed
    assert shared.asked == [b"known", b"new"]
    await incoming.items(references, [b"known", b"new", b"given"])
    assert shared.asked == [b"known", b"new"], "they are kept"
    incoming.close()


async def test_all_items_are_asked_for_at_once() -> None:
    """Each waits until the others have been asked for, too."""

    class Waiting(Shared):
        def __init__(self) -> None:
            super().__init__()
            self.all_asked = asyncio.Event()

        async def find(self, item: MediaItem) -> tuple[np.ndarray, str] | None:
            self.asked.append(item.digest)
            if len(self.asked) == 3:
                self.all_asked.set()
            await asyncio.wait_for(self.all_asked.wait(), 60)
            return None

    shared: Any = Waiting()
    incoming = FeaturesIn(1000, shared)
    digests = [b"a", b"b", b"c"]
    found = await incoming.items([reference(digest) for digest in digests], digests)
    assert [item.digest for item in found] == digests
    incoming.close()


async def test_embeddings_are_not_those_of_an_adapter_in_the_encoder() -> None:
    shared: Any = Shared()
    incoming = FeaturesIn(1000, shared)
    [plain] = await incoming.items([reference(b"known")], [b"known"])
    [adapted] = await incoming.items([reference(b"known")], [b"known, with an adapter"])
    assert plain.features.precomputed
    assert not adapted.features.precomputed
    assert adapted.features.arrays["pixels"].tolist() == [9] * 4
    incoming.close()


async def test_embeddings_of_an_encoder_do_not_replace_features_of_the_same_item() -> None:
    """Those are wanted where an adapter changes the encoder."""
    incoming = FeaturesIn(1000)
    [made] = await incoming.items([reference(b"known", precomputed=True)], [b"known"])
    [adapted] = await incoming.items([reference(b"known")], [b"known, with an adapter"])
    assert made.features.precomputed
    assert not adapted.features.precomputed
    incoming.close()


async def test_embeddings_of_other_weights_have_keys_of_their_own() -> None:
    incoming = FeaturesIn(1000)
    references = [
        reference(b"a", precomputed=True, value=value, space=space)
        for value, space in ((9, b"weights"), (8, b"other weights"))
    ]
    found = await incoming.items(references, [b"a", b"a"])
    assert [item.features.arrays["pixels"][0] for item in found] == [9, 8]
    incoming.close()


async def test_weights_that_may_have_changed_share_nothing_any_more() -> None:
    incoming = FeaturesIn(1000, Shared())  # type: ignore[arg-type]
    [before] = await incoming.items([reference(b"known")], [b"known"])
    incoming.stop_sharing()
    [after] = await incoming.items([reference(b"known")], [b"known"])
    assert (before.features.precomputed, after.features.precomputed) == (True, False)
    incoming.close()
