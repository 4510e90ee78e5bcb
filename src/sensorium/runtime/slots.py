"""Slots: the runner's state of each sequence between steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from sensorium.core.plan import NewSequence, Span

if TYPE_CHECKING:
    from sensorium.core.request import EngineRequest
    from sensorium.text.grammar.grammar import GrammarMatcher


@dataclass(slots=True, eq=False)
class Slot:
    """One sequence in the runner, which is its only writer.

    Attributes:
        token_ids: (capacity,) int64, of which ``num_tokens`` are known.
        block_ids: (capacity,) int32, of which ``num_blocks`` are filled.
        positions: (3, num_prompt) int32 for models with several position axes, else None.
        counts: How often each token was generated; None when no penalty needs it.
        rope_length: The request's when the sequence was added; it is added again when that changes.
        lane: That of its adapter; -1 for none.
    """

    seq_id: int
    request: EngineRequest
    token_ids: np.ndarray
    num_tokens: int
    block_ids: np.ndarray
    num_blocks: int = 0
    positions: np.ndarray | None = None
    counts: dict[int, int] | None = None
    grammar: GrammarMatcher | None = None
    rope_length: int = 0
    lane: int = -1

    @classmethod
    def of(cls, new: NewSequence) -> Slot:
        """Make the slot of a sequence that is new, or was preempted before."""
        known = len(new.token_ids)
        capacity = len(new.request.token_ids) + new.request.max_tokens
        token_ids = np.empty(max(known, min(capacity, known + 256)), np.int64)
        token_ids[:known] = new.token_ids
        slot = cls(
            seq_id=new.seq_id,
            request=new.request,
            token_ids=token_ids,
            num_tokens=known,
            block_ids=np.zeros(16, np.int32),
            positions=new.request.positions,
            rope_length=new.request.rope_length_at(known),
        )
        params = new.request.params
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0:
            slot.counts = {}
            for token_id in new.token_ids[len(new.request.token_ids) :]:
                slot.counts[token_id] = slot.counts.get(token_id, 0) + 1
        return slot

    @property
    def num_prompt(self) -> int:
        """Return the number of tokens of the prompt."""
        return len(self.request.token_ids)

    @property
    def num_generated(self) -> int:
        """Return the number of tokens generated so far."""
        return self.num_tokens - len(self.request.token_ids)

    def append(self, token_id: int) -> None:
        """Add a sampled token."""
        if self.num_tokens == len(self.token_ids):
            self.token_ids = np.concatenate([self.token_ids, np.empty_like(self.token_ids)])
        self.token_ids[self.num_tokens] = token_id
        self.num_tokens += 1
        if self.counts is not None:
            self.counts[token_id] = self.counts.get(token_id, 0) + 1

    def add_blocks(self, block_ids: tuple[int, ...], first: int | None = None) -> None:
        """Append blocks of the KV cache to the first ``first`` ones; None: to all."""
        if first is not None:
            self.num_blocks = first
        needed = self.num_blocks + len(block_ids)
        if needed > len(self.block_ids):
            grown = np.zeros(max(needed, 2 * len(self.block_ids)), np.int32)
            grown[: self.num_blocks] = self.block_ids[: self.num_blocks]
            self.block_ids = grown
        self.block_ids[self.num_blocks : needed] = block_ids
        self.num_blocks = needed

    def rotary_positions(self, start: int, num_tokens: int, out: np.ndarray) -> None:
        """Write the positions of tokens ``start`` … into ``out``.

        (num_tokens,) or (3, num_tokens) int64.

        A generated token i has position i + delta on every axis.
        """
        end = start + num_tokens
        inside = 0
        if self.positions is not None:
            prompt_end = min(end, self.positions.shape[1])
            inside = max(0, prompt_end - start)
            if inside:
                out[..., :inside] = self.positions[:, start:prompt_end]
        if inside < num_tokens:
            delta = self.request.position_delta
            out[..., inside:] = np.arange(start + inside + delta, end + delta)


@dataclass(slots=True)
class SlotTable:
    """The slots by sequence id."""

    slots: dict[int, Slot] = field(default_factory=dict)

    def drop(self, seq_ids: tuple[int, ...]) -> None:
        """Drop sequences; unknown ids are ignored: a sequence may end before its first span."""
        for seq_id in seq_ids:
            self.slots.pop(seq_id, None)

    def add(self, new: NewSequence) -> Slot:
        """Add a sequence, and return its slot."""
        slot = self.slots[new.seq_id] = Slot.of(new)
        return slot

    def spans_of(self, spans: tuple[Span, ...]) -> list[tuple[Span, Slot]]:
        """Return each span with its slot.

        The new blocks of the spans are added to their slots.
        """
        for span in spans:
            self.slots[span.seq_id].add_blocks(span.new_block_ids, span.first_block)
        return [(span, self.slots[span.seq_id]) for span in spans]


def single_tokens_first(pairs: list[tuple[Span, Slot]]) -> list[tuple[Span, Slot]]:
    """Return spans of a single token before the others, as kernels need it.

    Within both parts those with one adapter are adjacent.
    """
    return sorted(pairs, key=lambda pair: (pair[0].num_tokens > 1, pair[1].lane))
