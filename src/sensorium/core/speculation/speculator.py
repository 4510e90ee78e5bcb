"""Chooses tokens to try beside the next one of each sequence, by expected gain and cost.

A proposal comes from the sequence itself (``ngram``). Its tokens are computed as further rows of
the step and kept as far as the model samples the same ones. How many are tried follows from two
measurements: the share of proposed tokens that proved right, of this sequence and of all, and the
time of a step by its number of rows. Proposals are compared with what is sampled even when none of
their tokens is tried, so the share is known without cost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from sensorium.core.plan import Span, StepPlan, StepResult
from sensorium.core.request import Sequence as RunningSequence
from sensorium.core.speculation.costs import StepCosts
from sensorium.core.speculation.ngram import NOTHING, NgramIndex, Proposal, with_barriers
from sensorium.errors import ConfigError

MOST_ROWS = 128
"""Tokens that a step tries at most: bounds the memory of their logits."""
INDEXED_AT_ONCE = 4096
"""Tokens of all sequences together that a step enters into their indexes at most."""
FIRST_RATE = 0.7
"""Share of right tokens that is assumed before any proposal was compared."""
OWN_WEIGHT, COMMON_WEIGHT = 0.15, 0.02
"""Weights of a token in the shares of a sequence and of all sequences."""
HIGHEST_RATE = 0.98
LEAST_GAIN = 0.05
"""Least probability of a token that is tried."""
MARGIN = 1.05
"""Least ratio by which trying tokens must promise more tokens a second."""
WITHOUT_EVERY = 32
"""Steps of which one tries nothing, so that times without trying are known, too; until they are, of
two."""
LONG, LONGER = 6, 12
"""Repetitions of at least so many tokens have shares of their own."""


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


class _Rates:
    """Shares of proposed tokens that were right, by the length of the repetition."""

    def __init__(self, rates: Sequence[float], weight: float) -> None:
        self.values = list(rates)
        self._weight = weight

    def of(self, length: int) -> float:
        return self.values[_kind(length)]

    def observe(self, length: int, num_right: int, *, failed: bool) -> None:
        kind = _kind(length)
        for outcome in (*(1.0,) * num_right, *(0.0,) * failed):
            self.values[kind] += self._weight * (outcome - self.values[kind])


def _kind(length: int) -> int:
    return (length >= LONG) + (length >= LONGER)


@dataclass(slots=True)
class _Tracked:
    """State of speculation of one running sequence."""

    index: NgramIndex
    rates: _Rates
    proposal: Proposal = field(default=NOTHING)


class Speculator:
    """Proposals for running sequences. Not thread-safe."""

    def __init__(self, limits: SpeculationLimits) -> None:
        self.limits = limits
        self.costs = StepCosts()
        self._rates = _Rates((FIRST_RATE,) * 3, COMMON_WEIGHT)
        self._tracked: dict[int, _Tracked] = {}
        self._num_choices = 0
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
        found: list[tuple[int, Proposal, float]] = []
        candidates: list[tuple[RunningSequence, Span, int, _Tracked]] = []
        rows = num_samples = 0
        for seq, span in pairs:
            rows += span.num_tokens
            num_samples += span.samples
            most = min(self.limits.num_tokens, num_left(seq))
            if seq.request.pooling is None and most >= 1:
                candidates.append((seq, span, most, self._track(seq)))
        _catch_up([tracked.index for *_, tracked in candidates])
        for seq, span, most, tracked in candidates:
            if span.num_tokens > 1 or not span.samples:
                continue
            tracked.proposal = _before_end(tracked.index.propose(most), seq)
            if tracked.proposal.token_ids:
                rate = min(tracked.rates.of(tracked.proposal.length), HIGHEST_RATE)
                found.append((seq.seq_id, tracked.proposal, rate))
        if not found:
            return {}
        lengths = [(rate, len(proposal.token_ids)) for _, proposal, rate in found]
        nums = self.choose(num_samples, rows, lengths, min(num_rows, MOST_ROWS))
        return {
            seq_id: proposal.token_ids[:num]
            for (seq_id, proposal, _), num in zip(found, nums, strict=True)
            if num
        }

    def follow(
        self, seq: RunningSequence, draft_ids: Sequence[int], token_ids: Sequence[int]
    ) -> int:
        """Compare the tokens that a sequence got in a step with those proposed, tried or not.

        ``draft_ids``: the tokens that were tried. Returns how many of them were right.
        """
        tracked = self._tracked.get(seq.seq_id)
        if tracked is not None and tracked.proposal.token_ids:
            proposed, length = tracked.proposal
            tracked.proposal = NOTHING
            num_right = num_equal(proposed, token_ids)
            failed = num_right < min(len(proposed), len(token_ids))
            for rates in (tracked.rates, self._rates):
                rates.observe(length, num_right, failed=failed)
        return num_equal(draft_ids, token_ids)

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
        tracked = self._tracked.get(seq.seq_id)
        if tracked is None:
            limits = self.limits
            index = NgramIndex(limits.shortest, limits.longest)
            index.extend(with_barriers(seq.token_ids, _runs(seq)))
            tracked = _Tracked(index, _Rates(self._rates.values, OWN_WEIGHT))
            self._tracked[seq.seq_id] = tracked
        elif len(tracked.index) < len(seq.token_ids):
            tracked.index.extend(seq.token_ids[len(tracked.index) :])
        return tracked

    def choose(
        self, num_samples: int, rows: int, found: Sequence[tuple[float, int]], most: int
    ) -> list[int]:
        """Return how many tokens to try of each proposal, given as (rate, length).

        The likeliest come first, as many as promise the most tokens a second.
        """
        gains = [
            (rate**num, index)
            for index, (rate, length) in enumerate(found)
            for num in range(1, length + 1)
            if rate**num >= LEAST_GAIN
        ]
        gains.sort(reverse=True)
        del gains[most:]
        expected = float(num_samples)
        best, num_best = expected / self.costs.seconds(num_samples, rows) * MARGIN, 0
        stride = max(1, len(gains) // 16)
        for num, (gain, _) in enumerate(gains, 1):
            expected += gain
            if num % stride == 0 or num == len(gains):
                value = expected / self.costs.seconds(num_samples, rows + num)
                if value > best:
                    best, num_best = value, num
        self._num_choices += num_best > 0
        # What a step without them takes must be known.
        known = self.costs.is_known(num_samples)
        if self._num_choices % WITHOUT_EVERY == 0 if known else self._has_tried:
            num_best = 0
        self._has_tried = num_best > 0
        chosen = Counter(index for _, index in gains[:num_best])
        return [chosen[index] for index in range(len(found))]


def num_equal(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens at the beginning are the same."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))


def _before_end(proposal: Proposal, seq: RunningSequence) -> Proposal:
    """Return the proposal up to a token that ends the sequence: nothing follows that."""
    for index, token_id in enumerate(proposal.token_ids):
        if token_id in seq.eos_ids or token_id in seq.stop_ids:
            return Proposal(proposal.token_ids[:index], proposal.length)
    return proposal


def _runs(seq: RunningSequence) -> Iterable[tuple[int, int]]:
    return (run for item in seq.request.items for run in item.runs)


def _catch_up(indexes: list[NgramIndex]) -> None:
    """Enter ``INDEXED_AT_ONCE`` tokens at most, in equal shares; what one leaves is for others."""
    left = INDEXED_AT_ONCE
    behind = sorted((index for index in indexes if index.num_behind), key=_num_behind)
    for number, index in enumerate(behind):
        left -= index.catch_up(-(-left // (len(behind) - number)))


def _num_behind(index: NgramIndex) -> int:
    return index.num_behind
