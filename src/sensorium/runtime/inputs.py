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
        sampled_rows: Rows whose logits are sampled; ``sampled_slots`` are their slots.
        pooled_rows: Rows that become embeddings; ``pooled_slots`` are their slots.
    """

    ids: torch.Tensor
    batch: AttentionBatch
    first_row: list[int]
    sampled_rows: list[int]
    sampled_slots: list[Slot]
    pooled_rows: list[int]
    pooled_slots: list[Slot]


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
    sampled: list[tuple[int, Slot]] = []
    pooled: list[tuple[int, Slot]] = []
    first_row = starts[:-1].tolist()
    for index, (span, slot) in enumerate(pairs):
        row, end = first_row[index], first_row[index] + span.num_tokens
        ids[row:end] = slot.token_ids[span.start : span.start + span.num_tokens]
        slot.rotary_positions(span.start, span.num_tokens, positions[..., row:end])
        block_table[index, : slot.num_blocks] = slot.block_ids[: slot.num_blocks]
        if span.samples:
            sampled.append((end - 1, slot))
        elif span.pools:
            pooled.append((end - 1, slot))
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
        num_decodes=sum(length == 1 for length in query_lens),
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
        sampled_rows=[row for row, _ in sampled],
        sampled_slots=[slot for _, slot in sampled],
        pooled_rows=[row for row, _ in pooled],
        pooled_slots=[slot for _, slot in pooled],
    )
