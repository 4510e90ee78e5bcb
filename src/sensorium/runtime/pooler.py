"""Pools hidden states to embeddings: the state of the last token, cut and normalised."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from sensorium.core.plan import unusable
from sensorium.runtime.slots import Slot
from sensorium.runtime.soundness import INFINITE


def pool(hidden: torch.Tensor, slots: Sequence[Slot]) -> tuple[dict[int, bytes], dict[int, str]]:
    """Return the embedding of each row of ``hidden`` (N, H), the last tokens of ``slots``.

    ``hidden`` are states after the final norm. They are taken as float32, cut to the first
    ``dimensions`` numbers, and only then scaled to length 1, so that embeddings of a Matryoshka
    model (Kusupati et al., 2022) have that length at every size. Returns the numbers as
    little-endian float32 and, for rows that are not finite, messages; both by sequence id.
    """
    rows = hidden.to(device="cpu", dtype=torch.float32)
    usable = torch.isfinite(rows).all(-1).tolist()
    embeddings: dict[int, bytes] = {}
    failed: dict[int, str] = {}
    for row, good, slot in zip(rows, usable, slots, strict=True):
        params = slot.request.pooling
        if params is None:
            raise ValueError(f"sequence {slot.seq_id} generates: it has no embedding")
        if not good:
            dtype = str(hidden.dtype).removeprefix("torch.")
            failed[slot.seq_id] = unusable(
                "this input", f"its embedding's numbers {INFINITE}", dtype
            )
            continue
        embedding = row[: params.dimensions]
        if params.normalize:
            embedding = F.normalize(embedding, dim=-1)
        embeddings[slot.seq_id] = embedding.numpy().astype("<f4", copy=False).tobytes()
    return embeddings, failed
