"""Surroundings of the layers in a decode step, beside the general operations: equal bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from sensorium.kernels import ops
from sensorium.kernels.batch import AttentionBatch
from sensorium.kernels.cpu import graph
from sensorium.kernels.cpu.decoding import lookup
from sensorium.kernels.cpu.linear import floats, integers
from sensorium.kernels.reference import doubtful_rows
from sensorium.kernels.weight import PackedWeight
from sensorium.layers.embedding import Embedding
from sensorium.models.loading import quantize
from tests.kernels.batches import DTYPES
from tests.kernels.test_graph import Layers, Steps

pytestmark = pytest.mark.skipif(
    not floats.available("float16"), reason="this processor has none of the kernels of decode steps"
)
NUM_IDS, SIZE = 37, 45
"""Rows of a table, and elements of one: neither is a multiple of what kernels take at once."""


def packed_tables() -> Iterator[PackedWeight]:
    weight = torch.randn((NUM_IDS, SIZE), generator=torch.Generator().manual_seed(3))
    for dtype in DTYPES:
        yield floats.pack_weight(weight.to(dtype))
        yield floats.pack_weight(weight.to(dtype), torch.float32)
        if integers.forms():
            yield ops.pack_weight(quantize.int8(weight), dtype)


def test_embeddings_of_packed_tables_have_the_bits_of_their_rows() -> None:
    ids = torch.tensor([0, 36, 15, 16, 17, 3, 3, 36])
    for table in packed_tables():
        look_up = ops.bind_look_up(table, NUM_IDS)
        assert look_up is not None
        assert torch.equal(look_up(ids), table.rows(ids)), (type(table), table.dtype)
        last = look_up(torch.tensor([NUM_IDS, 1 << 40]))
        assert torch.equal(last, table.rows(torch.tensor([NUM_IDS - 1] * 2)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_embeddings_of_plain_tables_are_their_rows(dtype: torch.dtype) -> None:
    embedding = Embedding(NUM_IDS, SIZE)
    table = torch.randn((NUM_IDS, SIZE), generator=torch.Generator().manual_seed(4)).to(dtype)
    embedding.load(table)
    assert embedding.is_replayable
    ids = torch.tensor([36, 0, 7, 99])
    assert torch.equal(embedding(ids), F.embedding(ids.clamp(max=NUM_IDS - 1), table))
    with pytest.raises(ValueError, match="to look up"):
        embedding(ids.int())


def test_a_table_without_a_kernel_is_looked_up_by_torch() -> None:
    table = torch.randn((NUM_IDS, SIZE), dtype=torch.float64)
    assert lookup.bind(table, NUM_IDS) is None
    embedding = Embedding(NUM_IDS, SIZE)
    embedding.load(table)
    assert not embedding.is_replayable
    assert torch.equal(embedding(torch.tensor([3])), table[3:4])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 30, 40_000])
def test_the_choice_is_the_argmax_with_the_doubts(dtype: torch.dtype, vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn((7, vocab), generator=generator).to(dtype)
    hidden = torch.randn((7, 24), generator=generator).to(dtype)
    logits[1, vocab // 2] = torch.inf
    logits[2, -1] = torch.nan
    logits[3] = 1.5
    logits[4, : vocab // 2 + 1] = 9.0  # several are the largest
    hidden[5, 11] = torch.nan
    found = ops.choose_tokens(logits, hidden)
    doubtful = doubtful_rows(logits, hidden)
    assert [row for row, token in enumerate(found.tolist()) if token < 0] == doubtful
    assert {1, 2, 3, 5} <= set(doubtful)
    chosen = torch.where(found < 0, -1 - found, found)
    sound = [row for row in range(7) if row != 2]  # the place of a NaN is nobody's token
    assert torch.equal(chosen[sound], ops.argmax(logits)[sound])


class MovedOn:
    """Steps of one batch that is moved on, as the runner does it."""

    def __init__(self, steps: Steps) -> None:
        self.steps = steps
        self.batch: AttentionBatch | None = None
        self.num_moved = 0

    def step(self, number: int) -> tuple[torch.Tensor, AttentionBatch]:
        embeds, fresh = self.steps.step(number)
        known, self.batch = self.batch, fresh
        fresh.block_table = self.steps.first.block_table.clone()  # has room for the next steps
        if known is not None and ops.advance(known):
            self.num_moved += 1
            self.batch = known
            known.cos.copy_(fresh.cos)
            known.sin.copy_(fresh.sin)
            assert (known.kv_lens, known.max_kv_len) == (fresh.kv_lens, fresh.max_kv_len)
            assert torch.equal(known.kv_len, fresh.kv_len)
        return embeds, self.batch


@pytest.mark.parametrize(
    ("lengths", "window", "num_moved"),
    [([5], None, 18), ([510, 3, 253], None, 16), ([3, 30], 40, 10), ([60], 40, 0)],
)
def test_batches_that_move_on_have_the_bits_of_new_ones(
    lengths: list[int], window: int | None, num_moved: int
) -> None:
    """Lengths pass the ends of parts and a window, for which a new plan is made."""
    run = Layers("float32", window)
    graphs = graph.StepGraphs(run)
    moving, other = MovedOn(Steps(lengths, run.dtype)), Steps(lengths, run.dtype)
    for number in range(19):
        same, twin = other.step(number)
        assert torch.equal(graphs(*moving.step(number)), run(same, twin)), number
    assert moving.num_moved == num_moved
    assert list(graphs.captured) == [len(lengths)]


def test_batches_with_other_rows_than_decodes_do_not_move_on() -> None:
    run = Layers("float32")
    embeds, batch = Steps([5, 6], run.dtype, rows=[1, 3]).step(0)
    assert not ops.advance(batch), "it has not run"
    run(embeds, batch)
    assert not ops.advance(batch)
