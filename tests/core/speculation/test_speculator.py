"""How many tokens are tried, by what was right and what it cost."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from sensorium.core.plan import Span, StepPlan, StepResult
from sensorium.core.request import Sequence as RunningSequence
from sensorium.core.speculation.costs import KNOWN, LIFETIME
from sensorium.core.speculation.ngram import NgramIndex
from sensorium.core.speculation.speculator import (
    FIRST_ROWS,
    INDEXED_AT_ONCE,
    MOST_ROWS,
    SpeculationLimits,
    Speculator,
)
from tests.core.driver import item, request

LIMITS = SpeculationLimits(num_tokens=8, shortest=3, longest=16)
REPEATED = list(range(20, 40))
PROPOSED = REPEATED[5:13]
"""What follows the end of ``REPEATED``, another token and the beginning of it."""


def sequence(seq_id: int, token_ids: Sequence[int], **options: object) -> RunningSequence:
    made = request(str(seq_id), list(token_ids), 100, **options)  # type: ignore[arg-type]
    return RunningSequence(
        seq_id,
        made,
        list(token_ids),
        eos_ids=frozenset(made.eos_token_ids),
        stop_ids=frozenset(made.params.stop_token_ids),
    )


def span(seq: RunningSequence) -> Span:
    return Span(seq.seq_id, len(seq.token_ids) - 1, 1, (), True)


class Rig:
    """Steps of some sequences; the time of a step is a function of its rows."""

    def __init__(self, *sequences: RunningSequence) -> None:
        self.speculator = Speculator(LIMITS)
        self.sequences = sequences

    def propose(self, most: int = 8, num_rows: int = 1000) -> dict[int, tuple[int, ...]]:
        pairs = [(seq, span(seq)) for seq in self.sequences]
        return self.speculator.propose(pairs, lambda seq: most, num_rows)

    def step(self, right: int, cost: float = 0.0, factor: float = 1.0) -> list[int]:
        """Run a step in which so many proposed tokens are right; return how many were tried."""
        chosen = self.propose()
        spans = []
        for seq in self.sequences:
            tried = chosen.get(seq.seq_id, ())
            own = span(seq).with_drafts(tried, ())
            spans.append(own)
            tokens = [*PROPOSED[:right], 1000][: len(tried) + 1]
            self.speculator.follow(seq, tried, tokens)
        rows = sum(own.num_tokens for own in spans)
        plan = StepPlan(0, spans=tuple(spans))
        result = StepResult(0, num_drafts={own.seq_id: len(own.draft_ids) for own in spans})
        seconds = 0.010 * factor * (1.0 + cost * (rows - len(spans)))
        self.speculator.observe(plan, result, seconds)
        return [len(own.draft_ids) for own in spans]


def test_what_followed_is_proposed_within_all_limits() -> None:
    rig = Rig(sequence(0, [*REPEATED, 1, *REPEATED[:5]]))
    assert rig.propose() == {0: tuple(PROPOSED)}
    assert rig.propose(most=2) == {0: tuple(REPEATED[5:7])}
    assert rig.propose(num_rows=3) == {0: tuple(REPEATED[5:8])}
    assert rig.propose(most=0) == {}
    assert rig.propose(num_rows=0) == {}


def test_nothing_is_proposed_where_nothing_repeats() -> None:
    rig = Rig(sequence(0, REPEATED))
    assert rig.propose() == {}


def test_placeholders_of_items_are_never_proposed() -> None:
    ids = [20, 21, 22, 23, 9, 9, 9, 24, 20, 21, 22]
    rig = Rig(sequence(0, ids, items=[item("cat", 4, 3)]))
    assert rig.propose() == {0: (23,)}
    rig = Rig(sequence(0, [9, 9, 9, 9, 5, 9, 9, 9], items=[item("cat", 0, 4), item("dog", 5, 3)]))
    assert rig.propose() == {}


def test_tokens_that_end_a_sequence_are_not_tried() -> None:
    ids = [*REPEATED[:9], *REPEATED[:4]]
    assert Rig(sequence(0, ids, eos=(26,))).propose() == {0: (24, 25)}
    assert Rig(sequence(0, ids, stop_token_ids=[24])).propose() == {}


def test_tokens_that_are_never_right_are_soon_not_tried_and_right_ones_are_again() -> None:
    rig = Rig(sequence(0, [*REPEATED, 1, *REPEATED[:5]]))
    assert rig.step(right=0, cost=0.02)[0] > 0
    tried = [rig.step(right=0, cost=0.02)[0] for _ in range(40)]
    assert tried[-10:] == [0] * 10
    # They are compared although none is tried.
    rig.speculator.follow(rig.sequences[0], (), PROPOSED)
    for _ in range(12):
        rig.propose()
        rig.speculator.follow(rig.sequences[0], (), REPEATED[5:6])
    assert len(rig.propose()[0]) >= 4


def test_rows_that_cost_too_much_are_not_tried() -> None:
    sequences = [sequence(number, [*REPEATED, 1, *REPEATED[:5]]) for number in range(4)]
    cheap, dear = Rig(*sequences), Rig(*sequences)
    for _ in range(30):
        few, many = sum(dear.step(right=1, cost=1.0)), sum(cheap.step(right=8, cost=0.01))
    assert many == 4 * 8
    assert few == 0


def eight() -> Rig:
    return Rig(*(sequence(number, [*REPEATED, 1, *REPEATED[:5]]) for number in range(8)))


def test_a_disturbed_moment_is_soon_forgotten() -> None:
    rig = eight()
    disturbed = [sum(rig.step(right=8, cost=0.5)) for _ in range(40)]
    assert disturbed[-10:] == [0] * 10
    calm = [sum(rig.step(right=8, cost=0.05)) for _ in range(LIFETIME + 60)]
    assert sum(calm[-20:]) > 19 * 8, "one of them may try none"


def test_steps_that_are_slow_by_chance_stop_no_trying() -> None:
    rig, draw = eight(), random.Random(4)
    tried = [
        sum(rig.step(right=8, cost=0.06, factor=draw.choice((1.0, 1.0, 1.0, 3.0))))
        for _ in range(200)
    ]
    assert sum(number > 0 for number in tried[10:]) > 0.9 * 190


def test_what_a_row_costs_is_measured_now_and_then_even_where_it_does_not_pay() -> None:
    rig = eight()
    for _ in range(20):
        rig.step(right=8, cost=1.0)
    tried = [sum(rig.step(right=8, cost=1.0)) for _ in range(10 * LIFETIME)]
    assert max(tried) <= FIRST_ROWS
    assert 10 * (KNOWN - 1) <= sum(number > 0 for number in tried) <= 10 * (KNOWN + 1)


def test_what_a_row_costs_is_not_measured_with_tokens_that_gain_nothing() -> None:
    rig = eight()
    for _ in range(20):
        rig.step(right=0, cost=1.0)
    assert not any(any(rig.step(right=0, cost=1.0)) for _ in range(3 * LIFETIME))


def test_sequences_whose_tokens_are_right_are_preferred() -> None:
    good, bad = (sequence(number, [*REPEATED, 1, *REPEATED[:5]]) for number in range(2))
    rig = Rig(good, bad)
    for _ in range(20):
        rig.propose()
        rig.speculator.follow(good, (), PROPOSED)
        rig.speculator.follow(bad, (), [999])
    chosen = rig.propose(num_rows=8)
    assert (len(chosen.get(0, ())), len(chosen.get(1, ()))) == (8, 0)


def test_a_step_tries_a_bounded_number_of_tokens() -> None:
    rig = Rig(*(sequence(number, [*REPEATED, 1, *REPEATED[:5]]) for number in range(60)))
    assert 0 < sum(map(len, rig.propose().values())) <= MOST_ROWS


def test_ended_sequences_leave_nothing() -> None:
    rig = Rig(sequence(0, [*REPEATED, 1, *REPEATED[:5]]))
    rig.propose()
    assert len(rig.speculator) == 1
    rig.speculator.forget(0)
    rig.speculator.forget(0)
    assert len(rig.speculator) == 0
    assert rig.speculator.follow(rig.sequences[0], (), [5]).num_right == 0


def test_costs_are_those_of_rows_that_were_computed() -> None:
    """The runner may compute fewer tried tokens than planned, or some of a step twice."""
    own = span(sequence(0, REPEATED)).with_drafts(tuple(PROPOSED), ())
    plan = StepPlan(0, spans=(own,))

    def known_after(*results: StepResult) -> Speculator:
        speculator = Speculator(LIMITS)
        for result in results * 5:
            speculator.observe(plan, result, 0.010)
        return speculator

    without, all_of_them = StepResult(0), StepResult(0, num_drafts={0: len(PROPOSED)})
    assert known_after(without, all_of_them).costs.is_settled(1)
    assert not known_after(without).costs.is_settled(1), "each had one row"
    twice = known_after(StepResult(0, num_drafts={0: len(PROPOSED)}, repeated=True))
    assert twice.costs.seconds(1, 1) > 1.0, "nothing was noted"


def test_sequences_share_what_a_step_enters_into_their_indexes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entered: dict[int, int] = {}
    catch_up = NgramIndex.catch_up

    def counted(index: NgramIndex, most: int) -> int:
        num = catch_up(index, most)
        entered[len(index)] = entered.get(len(index), 0) + num
        return num

    monkeypatch.setattr(NgramIndex, "catch_up", counted)
    lengths = [11, INDEXED_AT_ONCE // 2, INDEXED_AT_ONCE, 2 * INDEXED_AT_ONCE]
    rig = Rig(*(sequence(number, range(length)) for number, length in enumerate(lengths)))
    rig.propose()
    assert sum(entered.values()) == INDEXED_AT_ONCE
    share = (INDEXED_AT_ONCE - 10) // 3
    assert [entered[length] - share for length in lengths[1:]] == [0, 0, 0]
    assert entered[11] == 10, "a short one need not wait for the long ones"
    for _ in range(3):
        rig.propose()
    assert entered == {length: length - 1 for length in lengths}
