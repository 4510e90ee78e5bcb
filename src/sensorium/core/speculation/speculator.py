"""Chooses tokens to try beside the next one of each sequence, by expected gain and cost.

A proposal comes from the sequence itself (``ngram``), or from a text that the caller expects as the
answer (``prediction``). Its tokens are computed as further rows of the step and kept as far as the
model samples the same ones. How many are tried follows from two measurements: how often such tokens
were right (``odds``), and the time of a step by its number of rows (``costs``). Proposals are
compared with what is sampled even when none of their tokens is tried, so the odds are known without
cost.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sensorium.core.plan import Span, StepPlan, StepResult
from sensorium.core.request import Sequence as RunningSequence
from sensorium.core.speculation.costs import StepCosts
from sensorium.core.speculation.ngram import NOTHING, NgramIndex, Proposal, with_barriers
from sensorium.core.speculation.odds import HIGHEST, Odds
from sensorium.core.speculation.prediction import PredictedText
from sensorium.errors import ConfigError

MOST_ROWS = 128
"""Tokens that a step tries at most: bounds the memory of their logits."""
INDEXED_AT_ONCE = 4096
"""Tokens of all sequences together that a step enters into their indexes at most."""
LEAST_GAIN = 0.05
"""Least probability of a token that is tried."""
MARGIN = 1.08
"""Least ratio by which trying tokens must promise more tokens a second."""
WITHOUT_EVERY = 32
"""Steps that would try tokens of which one tries none, so that it is known what that takes."""
LOOKED_EVERY = 16
"""Steps of which one looks for repetitions even where no token that is right would pay."""
FIRST_ROWS = 8
"""Tokens that are tried at most while costs are not known, or a quarter of the other rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationLimits:
    """Options of speculation.

    Attributes:
        num_tokens: Most tokens that are tried beside the next one.
        shortest: Fewest tokens at the end of a sequence that must have stood there before.
        longest: Most of them that are compared.
    """

    num_tokens: int
    shortest: int
    longest: int

    def __post_init__(self) -> None:
        if self.num_tokens < 1 or not 1 <= self.shortest <= self.longest:
            raise ConfigError(f"{self} makes no sense.")


class _Step(NamedTuple):
    """Sequences and rows of a step without tried tokens, and the most tokens that it may try."""

    num_sequences: int
    num_rows: int
    most: int


class Outcome(NamedTuple):
    """Number of tried tokens that were right, and whether they came from an expected answer."""

    num_right: int
    predicted: bool


@dataclass(slots=True)
class _Tracked:
    """State of speculation of one running sequence."""

    index: NgramIndex
    prediction: PredictedText | None
    shares: list[float]
    """Share of right tokens lately: of those from the sequence, and of those expected."""
    proposal: Proposal = field(default=NOTHING)


class Speculator:
    """Proposals for running sequences. Not thread-safe."""

    def __init__(self, limits: SpeculationLimits) -> None:
        self.limits = limits
        self.costs = StepCosts()
        self._odds = (Odds(), Odds())
        self._tracked: dict[int, _Tracked] = {}
        self._num_steps = self._num_choices = 0
        self._has_tried = False

    def __len__(self) -> int:
        return len(self._tracked)

    def propose(
        self,
        pairs: Iterable[tuple[RunningSequence, Span]],
        num_left: Callable[[RunningSequence], int],
        num_rows: int,
    ) -> dict[int, tuple[int, ...]]:
        """Return the tokens to try in a step, by sequence id.

        Args:
            pairs: The spans of the step. Tokens are proposed for those of a single token.
            num_left: Returns the most tokens that a sequence may try.
            num_rows: Most tokens to try in all.
        """
        found: list[tuple[int, Proposal]] = []
        candidates: list[tuple[RunningSequence, Span, int]] = []
        num_spans = rows = num_samples = 0
        for seq, span in pairs:
            num_spans += 1
            rows += span.num_tokens
            num_samples += span.samples
            most = min(self.limits.num_tokens, num_left(seq))
            if seq.request.pooling is None and most >= 1:
                candidates.append((seq, span, most))
        step = _Step(num_spans, rows, min(num_rows, MOST_ROWS))
        self._num_steps += 1
        if self._num_steps % LOOKED_EVERY and not self.may_pay(num_samples, step):
            return {}
        tracked = [self._track(seq) for seq, *_ in candidates]
        _catch_up([index for own in tracked for index in _indexes(own)])
        for (seq, span, most), own in zip(candidates, tracked, strict=True):
            if span.num_tokens > 1 or not span.samples:
                continue
            own.proposal = _before_end(self._likeliest(own, most), seq)
            if own.proposal.token_ids:
                found.append((seq.seq_id, own.proposal))
        if not found:
            return {}
        chances = [self._chances(proposal, self._tracked[seq_id]) for seq_id, proposal in found]
        nums = self.choose(step, chances)
        return {
            seq_id: proposal.token_ids[:num]
            for (seq_id, proposal), num in zip(found, nums, strict=True)
            if num
        }

    def follow(
        self, seq: RunningSequence, draft_ids: Sequence[int], token_ids: Sequence[int]
    ) -> Outcome:
        """Compare the tokens that a sequence got in a step with those proposed, tried or not.

        ``draft_ids``: the tokens that were tried.
        """
        tracked, predicted = self._tracked.get(seq.seq_id), False
        if tracked is not None and tracked.proposal.token_ids:
            proposed, length, predicted = tracked.proposal
            tracked.proposal = NOTHING
            num_right = num_equal(proposed, token_ids)
            failed = num_right < min(len(proposed), len(token_ids))
            share = tracked.shares[predicted]
            tracked.shares[predicted] = self._odds[predicted].observe(
                length, share, num_right, failed=failed
            )
        return Outcome(num_equal(draft_ids, token_ids), predicted)

    def observe(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        """Note the time of a step, if it only generates and computed nothing twice."""
        generates = all(
            span.samples and span.num_tokens == 1 + len(span.draft_ids) for span in plan.spans
        )
        if plan.spans and generates and not plan.encode and not result.repeated:
            num_rows = sum(1 + len(result.drafts_of(span)) for span in plan.spans)
            self.costs.observe(len(plan.spans), num_rows, seconds)

    def forget(self, seq_id: int) -> None:
        """Drop a sequence that does not run any more."""
        self._tracked.pop(seq_id, None)

    def _track(self, seq: RunningSequence) -> _Tracked:
        tracked, start = self._tracked.get(seq.seq_id), len(seq.request.token_ids)
        if tracked is None:
            lengths = self.limits.shortest, self.limits.longest
            index = NgramIndex(*lengths)
            index.extend(with_barriers(seq.token_ids, _runs(seq)))
            prediction = None
            if seq.request.predicted_ids:
                answer_ids = seq.token_ids[start:]
                prediction = PredictedText(seq.request.predicted_ids, answer_ids, *lengths)
            tracked = _Tracked(index, prediction, [odds.new_sequence() for odds in self._odds])
            self._tracked[seq.seq_id] = tracked
        elif len(tracked.index) < len(seq.token_ids):
            tracked.index.extend(seq.token_ids[len(tracked.index) :])
            if tracked.prediction is not None:
                tracked.prediction.follow(seq.token_ids, start)
        return tracked

    def _likeliest(self, tracked: _Tracked, most: int) -> Proposal:
        """Return the proposal whose first token has the higher probability."""
        own = tracked.index.propose(most)
        if tracked.prediction is None:
            return own
        expected = tracked.prediction.propose(most)
        if not (own.token_ids and expected.token_ids):
            return own if own.token_ids else expected
        return max(expected, own, key=lambda each: self._chances(each, tracked)[0])

    def _chances(self, proposal: Proposal, tracked: _Tracked) -> list[float]:
        """Return for each token the probability that it and those before it are right."""
        odds, share = self._odds[proposal.predicted], tracked.shares[proposal.predicted]
        chances, chance = [], 1.0
        for index in range(len(proposal.token_ids)):
            chance *= odds.of(proposal.length + index, share)
            chances.append(chance)
        return chances

    def may_pay(self, num_samples: int, step: _Step) -> bool:
        """Return whether it would pay to try tokens of all sequences that are nearly sure."""
        if not self.costs.is_settled(step.num_sequences):
            return True
        least = self._value(step, 0) + step.num_sequences * math.log(MARGIN)
        expected, chance, num, gain = 1.0, 1.0, 0, 0.0
        for _ in range(self.limits.num_tokens):
            more = min(num_samples, step.most - num)
            chance *= HIGHEST
            gain += more * math.log1p(chance / expected)
            expected, num = expected + chance, num + more
            if more and gain + self._value(step, num) > least:
                return True
        return False

    def choose(self, step: _Step, chances: Sequence[Sequence[float]]) -> list[int]:
        """Return how many tokens to try of each proposal, given by their probabilities.

        They are those with which the speeds of all sequences, in tokens a second, have the highest
        geometric mean: a sequence that repeats much slows the others down no more than it gains.
        """
        gains = sorted(_gains(chances), reverse=True)[: step.most]
        if sum(gain for gain, _ in gains) <= step.num_sequences * math.log(MARGIN):
            num_best = 0  # It would not pay even if rows cost nothing.
        elif not self.costs.is_settled(step.num_sequences):
            # With and without, in turn, until it is known what rows cost.
            waits = self._has_tried and self.costs.is_measured(step.num_sequences)
            num_best = 0 if waits else min(len(gains), max(FIRST_ROWS, step.num_rows // 4))
        else:
            num_best = self._best(step, gains)
            self._num_choices += num_best > 0
            if self._num_choices % WITHOUT_EVERY == 0:
                num_best = 0
        self._has_tried = num_best > 0
        chosen = Counter(index for _, index in gains[:num_best])
        return [chosen[index] for index in range(len(chances))]

    def _best(self, step: _Step, gains: Sequence[tuple[float, int]]) -> int:
        """Return how many of the tokens to try, the first ones, which gain the most."""
        best = self._value(step, 0) + step.num_sequences * math.log(MARGIN)
        num_best, total = 0, 0.0
        for num, (gain, _) in enumerate(gains, 1):
            total += gain
            if _is_usual(step.num_rows, num) or num == step.num_sequences * self.limits.num_tokens:
                value = total + self._value(step, num)
                if value > best:
                    best, num_best = value, num
        return num_best

    def _value(self, step: _Step, num: int) -> float:
        """Return what the time of a step that tries so many tokens adds to all logarithms."""
        seconds = self.costs.seconds(step.num_sequences, step.num_rows + num)
        return -step.num_sequences * math.log(seconds)


def _gains(chances: Iterable[Sequence[float]]) -> Iterable[tuple[float, int]]:
    """Yield for each token the logarithm of the ratio by which its sequence gets faster.

    The second number is that of the proposal, within which they fall.
    """
    for index, own in enumerate(chances):
        expected = 1.0
        for chance in own:
            if chance >= LEAST_GAIN:
                yield math.log1p(chance / expected), index
            expected += chance


def num_equal(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens at the beginning are the same."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))


def _is_usual(rows: int, num: int) -> bool:
    """Return whether a step of so many rows may try so many tokens.

    Steps of more than a few rows have one of few numbers of rows, so that each is soon captured.
    """
    total = rows + num
    return total <= 16 or rows > 64 or total % (4 if total <= 32 else 8) == 0


def _before_end(proposal: Proposal, seq: RunningSequence) -> Proposal:
    """Return the proposal up to a token that ends the sequence: nothing follows that."""
    for index, token_id in enumerate(proposal.token_ids):
        if token_id in seq.eos_ids or token_id in seq.stop_ids:
            return proposal._replace(token_ids=proposal.token_ids[:index])
    return proposal


def _runs(seq: RunningSequence) -> Iterable[tuple[int, int]]:
    return (run for item in seq.request.items for run in item.runs)


def _indexes(tracked: _Tracked) -> Iterable[NgramIndex]:
    """Return the indexes of a sequence: of its own tokens, and of an expected answer."""
    yield tracked.index
    if tracked.prediction is not None:
        yield tracked.prediction.index


def _catch_up(indexes: list[NgramIndex]) -> None:
    """Enter ``INDEXED_AT_ONCE`` tokens at most, in equal shares; what one leaves is for others."""
    left = INDEXED_AT_ONCE
    behind = sorted((index for index in indexes if index.num_behind), key=_num_behind)
    for number, index in enumerate(behind):
        left -= index.catch_up(-(-left // (len(behind) - number)))


def _num_behind(index: NgramIndex) -> int:
    return index.num_behind
