"""What the runner keeps of a sequence: positions over any cut, growth, counts after a preemption."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sensorium.core.plan import NewSequence, Span
from sensorium.core.request import EngineRequest
from sensorium.params import SamplingParams
from sensorium.runtime.slots import Slot, SlotTable, single_tokens_first

PROMPT = (5, 6, 7, 8, 9, 10)


def new(
    *generated: int, positions: np.ndarray | None = None, delta: int = 0, **params: float
) -> NewSequence:
    request = EngineRequest(
        "r",
        PROMPT,
        SamplingParams(**params),  # type: ignore[arg-type]
        max_tokens=1000,
        positions=positions,
        position_delta=delta,
    )
    return NewSequence(3, request, (*PROMPT, *generated))


@given(cuts=st.sets(st.integers(1, 11), max_size=5), several_axes=st.booleans())
def test_positions_are_those_of_the_prompt_then_go_on_by_the_delta(
    cuts: set[int], several_axes: bool
) -> None:
    """As after a preemption: chunks may end before, at and behind the end of the prompt."""
    table = np.array([[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]], np.int32)
    given_positions, delta = (table, -2) if several_axes else (None, 0)
    slot = Slot.of(new(*range(20, 26), positions=given_positions, delta=delta))
    out = np.empty((3, 12), np.int64)
    edges = [0, *sorted(cuts), 12]
    for start, end in itertools.pairwise(edges):
        slot.rotary_positions(start, end - start, out[:, start:end])
    after = np.arange(6, 12) + delta
    prompt = table if several_axes else np.arange(6)[None].repeat(3, 0)
    np.testing.assert_array_equal(out, np.concatenate([prompt, after[None].repeat(3, 0)], 1))


def test_tokens_and_blocks_grow() -> None:
    slot = Slot.of(new())
    for token_id in range(700):
        slot.append(token_id)
    assert slot.num_generated == 700
    assert slot.token_ids[: slot.num_tokens].tolist() == [*PROMPT, *range(700)]
    for first in range(0, 100, 10):
        slot.add_blocks(tuple(range(first, first + 10)))
    assert slot.block_ids[: slot.num_blocks].tolist() == list(range(100))


def test_counts_are_of_the_answer_and_survive_a_preemption() -> None:
    assert Slot.of(new(20, 20)).counts is None, "nobody asks for them"
    slot = Slot.of(new(20, 20, 5, frequency_penalty=1.0))
    slot.append(20)
    assert slot.counts == {20: 3, 5: 1}


def test_single_tokens_come_first() -> None:
    table = SlotTable()
    for seq_id in range(4):
        table.add(NewSequence(seq_id, new().request, PROMPT))
    spans = tuple(
        Span(seq_id, 0, num_tokens, (seq_id,), False)
        for seq_id, num_tokens in enumerate((3, 1, 2, 1))
    )
    pairs = single_tokens_first(table.spans_of(spans))
    assert [span.seq_id for span, _ in pairs] == [1, 3, 0, 2]
    table.drop((0, 99))
    assert sorted(table.slots) == [1, 2, 3]
