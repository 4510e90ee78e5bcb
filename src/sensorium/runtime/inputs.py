"""Builds the tensors of one forward pass from the spans of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from sensorium.core.plan import Span
from sensorium.kernels.batch import AttentionBatch, LayerCache
from sensorium.models.interface import Model
from sensorium.runtime.slots import Slot


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
