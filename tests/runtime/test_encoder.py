"""Features in, embeddings kept.

One bad item harms no other, and embeddings land on their positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from sensorium.core.plan import EncodeJob, EncodeReport, NewSequence, StepPlan
from sensorium.core.request import EngineRequest, ItemSpan
from sensorium.multimodal.items import EMBEDS_DTYPE, Features
from sensorium.params import SamplingParams
from sensorium.runtime.encoder import EncoderCache, FeatureStore
from sensorium.runtime.runner import NO_ADAPTER, ModelRunner
from sensorium.runtime.slots import Slot

HIDDEN = 3


class FakeModel:
    """Each embedding is the item's number.

    An item below zero breaks its whole batch, 100 has one too few.
    """

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self) -> None:
        self.batches: list[int] = []

    def encode(self, items: Sequence[Features]) -> list[torch.Tensor]:
        self.batches.append(len(items))
        numbers = [int(item.arrays["number"][0]) for item in items]
        if min(numbers) < 0:
            raise RuntimeError("broken")
        return [
            torch.full((item.num_embeds - (number == 100), HIDDEN), float(number))
            for item, number in zip(items, numbers, strict=True)
        ]


def features(number: int, num_embeds: int = 2) -> Features:
    return Features("image", {"number": np.array([number])}, num_embeds, {})


def digest(index: int) -> bytes:
    return f"item {index}".encode()


def slot_of(num_items: int, num_embeds: int = 2) -> Slot:
    spans = tuple(
        ItemSpan(digest(i), "image", ((1 + i * num_embeds, num_embeds),)) for i in range(num_items)
    )
    ids = tuple(range(2 + num_items * num_embeds))
    request = EngineRequest("r", ids, SamplingParams(), 4, items=spans)
    return Slot.of(NewSequence(0, request, ids))


def encode(numbers: Sequence[int]) -> tuple[EncoderCache, tuple[bytes, ...], FakeModel]:
    model, store = FakeModel(), FeatureStore()
    store.put("r", tuple(map(features, numbers)))
    cache = EncoderCache(model, store)  # type: ignore[arg-type]
    jobs = [EncodeJob(digest(i), 0, i, 2) for i in range(len(numbers))]
    return cache, cache.encode(jobs, {0: slot_of(len(numbers))}), model


def test_items_are_encoded_in_one_batch() -> None:
    cache, failed, model = encode([1, 2, 3])
    assert (len(cache), failed, model.batches) == (3, (), [3])
    cache.evict([digest(0), b"never there"])
    assert len(cache) == 2
    cache.clear()
    assert len(cache) == 0


@pytest.mark.parametrize("bad", [-1, 100])
def test_one_bad_item_harms_no_other(bad: int) -> None:
    cache, failed, _ = encode([1, bad, 3])
    assert failed == (digest(1),)
    embeds = torch.zeros(8, HIDDEN)
    slot = slot_of(3)
    cache.merge(embeds, 0, 0, 3, slot)
    assert embeds[:, 0].tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    with pytest.raises(KeyError):
        cache.merge(embeds, 0, 0, 8, slot)


def test_embeddings_that_cannot_be_read_fail_alone() -> None:
    model, store = FakeModel(), FeatureStore()
    texts = Features("image", {"embeds": np.array(["no number"])}, 1, {}, precomputed=True)
    good = Features("image", {"embeds": np.ones((2, HIDDEN), np.float32)}, 2, {}, precomputed=True)
    store.put("r", (texts, good))
    cache = EncoderCache(model, store)  # type: ignore[arg-type]
    jobs = [EncodeJob(digest(i), 0, i, 2) for i in range(3)]
    assert cache.encode(jobs, {0: slot_of(3)}) == (digest(0), digest(2)), "the third was never put"
    assert len(cache) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_embeddings_of_another_engine_have_the_same_bits(dtype: torch.dtype) -> None:
    """They come as bits, since numpy has no bfloat16."""
    model, store = FakeModel(), FeatureStore()
    model.dtype = dtype
    made = torch.randn(2, HIDDEN, generator=torch.Generator().manual_seed(0)).to(dtype)
    meta = {EMBEDS_DTYPE: str(dtype).removeprefix("torch.")}
    given = Features("image", {"embeds": made.view(torch.uint8).numpy()}, 2, meta, precomputed=True)
    store.put("r", (given,))
    cache = EncoderCache(model, store)  # type: ignore[arg-type]
    assert cache.encode([EncodeJob(digest(0), 0, 0, 2)], {0: slot_of(1)}) == ()
    kept = cache.get(digest(0))
    assert kept is not None
    assert kept.dtype == dtype
    assert torch.equal(kept, made)
    assert cache.get(b"never there") is None
    assert model.batches == []


def test_any_cut_of_the_prompt_gets_the_same_embeddings() -> None:
    """Chunk borders inside runs, between the runs of an item, and between items."""
    model, store = FakeModel(), FeatureStore()
    embeds = np.arange(10, dtype=np.float32)[:, None].repeat(HIDDEN, 1)
    sources = [
        Features("image", {"embeds": part}, len(part), {}, precomputed=True)
        for part in (embeds[:6], embeds[6:])
    ]
    store.put("r", tuple(sources))
    spans = (
        ItemSpan(digest(0), "image", ((2, 3), (7, 3))),
        ItemSpan(digest(1), "image", ((10, 4),)),
    )
    ids = tuple(range(16))
    request = EngineRequest("r", ids, SamplingParams(), 4, items=spans)
    slot = Slot.of(NewSequence(0, request, ids))
    cache = EncoderCache(model, store)  # type: ignore[arg-type]
    assert not cache.encode([EncodeJob(digest(i), 0, i, 4) for i in range(2)], {0: slot})
    expected = [-1, -1, 0, 1, 2, -1, -1, 3, 4, 5, 6, 7, 8, 9, -1, -1]
    for first in range(1, 16):
        for second in range(first, 17):
            rows = torch.full((20, HIDDEN), -1.0)
            for start, end in ((0, first), (first, second), (second, 16)):
                cache.merge(rows, start + 2, start, end, slot)
            assert rows[2:18, 0].tolist() == expected
            assert rows[:2].eq(-1).all()
            assert rows[18:].eq(-1).all()


def test_a_report_says_what_was_encoded_since_the_one_before() -> None:
    cache, _, _ = encode([1, 2, 3])
    report = cache.pop_report()
    assert (report.num_items, report.num_bytes, report.num_failed) == (3, 3 * 2 * HIDDEN * 4, 0)
    assert report.seconds > 0
    assert cache.pop_report() == EncodeReport()


@pytest.mark.parametrize("bad", [-1, 100])
def test_what_failed_is_counted_apart(bad: int) -> None:
    cache, _, model = encode([1, bad, 3])
    report = cache.pop_report()
    assert (report.num_items, report.num_bytes, report.num_failed) == (2, 2 * 2 * HIDDEN * 4, 1)
    assert model.batches == [3, 1, 1, 1]
    assert encode([bad])[0].pop_report() == EncodeReport(num_failed=1), "no time, no bytes"


def test_embeddings_that_came_with_a_request_are_not_counted() -> None:
    model, store = FakeModel(), FeatureStore()
    given = Features("image", {"embeds": np.ones((2, HIDDEN), np.float32)}, 2, {}, precomputed=True)
    store.put("r", (given,))
    cache = EncoderCache(model, store)  # type: ignore[arg-type]
    assert not cache.encode([EncodeJob(digest(0), 0, 0, 2)], {0: slot_of(1)})
    assert (len(cache), cache.pop_report()) == (1, EncodeReport())


def test_items_of_a_sequence_whose_adapter_is_gone_are_not_encoded() -> None:
    """Its items would be kept under the adapter's digests, with the model's own embeddings."""
    model, store = FakeModel(), FeatureStore()
    plain = slot_of(2).request
    gone = dataclasses.replace(plain, request_id="s", adapter=b"gone")
    for request in (plain, gone):
        store.put(request.request_id, (features(1), features(2)))
    runner = ModelRunner(model, [], store)  # type: ignore[arg-type]
    sequences = [NewSequence(i, r, r.token_ids) for i, r in enumerate((plain, gone))]
    jobs = (EncodeJob(digest(0), 0, 0, 2), EncodeJob(digest(1), 1, 1, 2))
    result = runner.execute(StepPlan(1, new=tuple(sequences), encode=jobs))
    assert result.failed == {1: NO_ADAPTER}
    assert result.failed_items == (digest(1),)
    assert (len(runner.encoder), model.batches) == (1, [1])
