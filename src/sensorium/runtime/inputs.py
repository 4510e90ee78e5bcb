"""Builds the tensors of one forward pass from the spans of a plan, or moves those before on.

Most steps of a server, and nearly all of a single conversation, compute one token of the same
sequences as the step before. While a step runs, its weights push all else out of the caches; so
whatever Python, torch and numpy do between two steps runs on cold code, and costs many times what
it costs in a loop of its own (``benchmarks.steps`` measures it). From one such step to the next
little differs, and the tensors may stay where they are: ids, lengths, rotary factors, which are
computed for some steps ahead, and rarely a new block. A captured step then needs no new arguments
either. Any other step is built as usual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sensorium.core.plan import Span
from sensorium.kernels import ops
from sensorium.kernels.batch import AttentionBatch, LayerCache
from sensorium.models.interface import Model
from sensorium.runtime.slots import Slot

AHEAD = 64
"""Most steps for which factors are computed at once, and for whose blocks there is room."""
MOST_ROWS = 64
"""Most sequences of such steps; with more, what is saved is little beside the work."""

Pairs = Sequence[tuple[Span, Slot]]


@dataclass(slots=True)
class StepInputs:
    """T tokens of S sequences.

    Attributes:
        ids: (T,) int64.
        batch: The input of attention.
        first_row: Row of the first token of each sequence, S numbers.
        sampled_rows: Rows whose logits are sampled: of each of ``sampled_slots`` one, and one for
            each of its tried tokens, which are in ``draft_ids``.
        pooled_rows: Rows that become embeddings; ``pooled_slots`` are their slots.
        is_plain: All of ``sampled_slots`` are sampled plainly, as was found before.
    """

    ids: torch.Tensor
    batch: AttentionBatch
    first_row: list[int]
    sampled_rows: list[int]
    sampled_slots: list[Slot]
    draft_ids: list[tuple[int, ...]]
    pooled_rows: list[int]
    pooled_slots: list[Slot]
    is_plain: bool = False


def build(
    pairs: Sequence[tuple[Span, Slot]],
    model: Model,
    caches: list[LayerCache],
    invariant: bool = True,
) -> StepInputs:
    """Concatenate the tokens of all spans; ``invariant`` is that of ``AttentionBatch``.

    Spans of a single token must come first. Positions have three axes if one sequence has them.
    """
    query_lens = [span.num_tokens for span, _ in pairs]
    kv_lens = [span.start + span.num_tokens for span, _ in pairs]
    starts = np.zeros(len(pairs) + 1, np.int32)
    np.cumsum(query_lens, out=starts[1:])
    total = int(starts[-1])
    ids = np.empty(total, np.int64)
    several_axes = any(slot.positions is not None for _, slot in pairs)
    positions = np.empty((3, total) if several_axes else (total,), np.int64)
    block_table = np.zeros((len(pairs), max(slot.num_blocks for _, slot in pairs)), np.int32)
    sampled_rows: list[int] = []
    first_row = starts[:-1].tolist()
    for index, (span, slot) in enumerate(pairs):
        row, end = first_row[index], first_row[index] + span.num_tokens
        known = span.num_tokens - len(span.draft_ids)
        ids[row : row + known] = slot.token_ids[span.start : span.start + known]
        ids[row + known : end] = span.draft_ids
        slot.rotary_positions(span.start, span.num_tokens, positions[..., row:end])
        block_table[index, : slot.num_blocks] = slot.block_ids[: slot.num_blocks]
        if span.samples:
            sampled_rows += range(row + known - 1, end)
    device = model.device
    lengths = [(slot.rope_length, span.num_tokens) for span, slot in pairs]
    cos, sin = model.rotary(
        torch.from_numpy(positions).to(device),
        lengths if any(slot.rope_length for _, slot in pairs) else (),
    )
    batch = AttentionBatch(
        query_start=torch.from_numpy(starts).to(device),
        kv_len=torch.tensor(kv_lens, dtype=torch.int32, device=device),
        block_table=torch.from_numpy(block_table).to(device),
        num_decodes=_num_decodes(pairs, device),
        max_query_len=max(query_lens),
        max_kv_len=max(kv_lens),
        cos=cos,
        sin=sin,
        caches=caches,
        query_lens=query_lens,
        kv_lens=kv_lens,
        invariant=invariant,
    )
    return StepInputs(
        ids=torch.from_numpy(ids).to(device),
        batch=batch,
        first_row=first_row,
        sampled_rows=sampled_rows,
        sampled_slots=[slot for span, slot in pairs if span.samples],
        draft_ids=[span.draft_ids for span, _ in pairs if span.samples],
        pooled_rows=[int(starts[i + 1]) - 1 for i, (span, _) in enumerate(pairs) if span.pools],
        pooled_slots=[slot for span, slot in pairs if span.pools],
    )


def _num_decodes(pairs: Sequence[tuple[Span, Slot]], device: torch.device) -> int:
    """Return the number of sequences whose single rows are prepared by attention itself.

    On a CPU, all rows of steps that try tokens are prepared in the same way, so that such steps
    differ in their number of rows alone, and few of them have to be captured.
    """
    if device.type == "cpu" and any(span.draft_ids for span, _ in pairs):
        return 0
    return sum(span.num_tokens == 1 for span, _ in pairs)


@dataclass(slots=True)
class _Kept:
    """The inputs of the latest step, and what it takes to move them on.

    ids (T,), table (T, B) and factors (2, T, R/2) are the memory of the tensors in ``inputs``.
    """

    inputs: StepInputs
    slots: list[Slot]
    starts: list[int]
    ids: np.ndarray
    table: np.ndarray
    factors: np.ndarray
    ahead: np.ndarray
    """(N, 2, T, R/2): the factors of the step after ``place`` steps, of N."""
    place: int
    num_threads: int

    @property
    def is_unmoved(self) -> bool:
        """Return True where not even the step after it is moved on, with as many threads."""
        return self.place == 0 and self.num_threads == torch.get_num_threads()


class SteadyInputs:
    """The inputs of steps, built or moved on. What it returns is valid until the next step."""

    def __init__(self, model: Model, caches: list[LayerCache], invariant: bool) -> None:
        self._model, self._caches, self._invariant = model, caches, invariant
        self._kept: _Kept | None = None
        self._latest: tuple[list[Slot], list[int]] | None = None
        self._unmoved: list[Slot] | None = None  # whose steps could not be moved on at all

    def clear(self) -> None:
        """Keep nothing of the step before."""
        self._kept = self._latest = self._unmoved = None

    def of(self, pairs: Pairs) -> StepInputs:
        """Return the inputs of any step."""
        kept = self._kept
        if kept is not None and self._advance(kept, pairs):
            return kept.inputs
        latest = self._latest if kept is None else (kept.slots, kept.starts)
        self._kept = self._latest = None
        if latest is not None and _follows(*latest, pairs):
            if kept is not None and kept.is_unmoved:
                self._unmoved = kept.slots  # as beyond a window: the next would not move, either
            elif (num_steps := _num_steps(pairs)) > 1:
                self._kept = self._keep(pairs, num_steps)
                return self._kept.inputs
        return build(pairs, self._model, self._caches, self._invariant)

    def decoded(self, pairs: Pairs) -> None:
        """Note that the step was one of generated tokens, which the next one may follow.

        Only the second step of the same sequences is kept: they may be others in every step.
        Sequences whose steps cannot be moved on are not kept again.
        """
        if self._kept is not None or len(pairs) > MOST_ROWS:
            return
        slots = [slot for _, slot in pairs]
        if slots != self._unmoved:  # slots are equal to themselves alone
            self._latest, self._unmoved = (slots, [span.start for span, _ in pairs]), None

    def _advance(self, kept: _Kept, pairs: Pairs) -> bool:
        """Move the kept inputs on to this step; return False if it is another kind of step."""
        if (
            kept.place + 1 == len(kept.ahead)
            or kept.num_threads != torch.get_num_threads()
            or not _follows(kept.slots, kept.starts, pairs)
            or any(slot.num_blocks > kept.table.shape[1] for slot in kept.slots)
            or not ops.advance(kept.inputs.batch)
        ):
            return False
        kept.place += 1
        kept.factors[...] = kept.ahead[kept.place]
        for row, (span, slot) in enumerate(pairs):
            kept.starts[row] = span.start
            kept.ids[row] = slot.token_ids[span.start]
            if span.new_block_ids:
                kept.table[row, : slot.num_blocks] = slot.block_ids[: slot.num_blocks]
        return True

    def _keep(self, pairs: Pairs, num_steps: int) -> _Kept:
        """Build the inputs with memory for so many steps, of which this is the first."""
        inputs = build(pairs, self._model, self._caches, self._invariant)
        batch, slots = inputs.batch, [slot for _, slot in pairs]
        factors = self._factors(pairs, num_steps)
        current = factors[0].copy()
        batch.cos, batch.sin = torch.from_numpy(current[0]), torch.from_numpy(current[1])
        block_size = self._caches[0].block_size if self._caches else AHEAD
        table = np.zeros(
            (len(pairs), batch.block_table.shape[1] + 1 + AHEAD // block_size), np.int32
        )
        table[:, : batch.block_table.shape[1]] = batch.block_table.numpy()
        batch.block_table = torch.from_numpy(table)
        starts = [span.start for span, _ in pairs]
        threads = torch.get_num_threads()
        return _Kept(inputs, slots, starts, inputs.ids.numpy(), table, current, factors, 0, threads)

    def _factors(self, pairs: Pairs, num_steps: int) -> np.ndarray:
        """Return cos and sin (num_steps, 2, T, R/2) of the sequences' next positions."""
        total = num_steps * len(pairs)
        several_axes = any(slot.positions is not None for _, slot in pairs)
        positions = np.empty((3, total) if several_axes else (total,), np.int64)
        for row, (span, slot) in enumerate(pairs):
            own = positions[..., row * num_steps : (row + 1) * num_steps]
            slot.rotary_positions(span.start, num_steps, own)
        lengths = [(slot.rope_length, num_steps) for _, slot in pairs]
        grown = any(slot.rope_length for _, slot in pairs)
        both = self._model.rotary(torch.from_numpy(positions), lengths if grown else ())
        stacked = torch.stack(both).view(2, len(pairs), num_steps, -1)
        return stacked.permute(2, 0, 1, 3).contiguous().numpy()


def _num_steps(pairs: Pairs) -> int:
    """Return the number of steps from this one on that can be moved on, as far as is known."""
    return min(AHEAD, ops.steps_left(span.start + 1 for span, _ in pairs))


def _follows(slots: list[Slot], starts: list[int], pairs: Pairs) -> bool:
    """Return whether the step has the next token of each of these sequences, in their order."""
    if len(pairs) != len(slots):
        return False
    for (span, slot), known, start in zip(pairs, slots, starts, strict=True):
        if slot is not known or span.start != start + 1 or not is_decode(span, slot):
            return False
    return True


def is_decode(span: Span, slot: Slot) -> bool:
    """Return whether a span is the latest generated token of a sequence alone."""
    return span.num_tokens == 1 and span.samples and span.start >= slot.num_prompt
