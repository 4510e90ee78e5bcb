"""Checks of what a model computed: finite logits, states and embeddings; logits that differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sensorium.kernels import ops

INFINITE = "are infinite or undefined"
EQUAL = "are all equal"


def flaws_of_logits(logits: torch.Tensor, hidden: torch.Tensor) -> list[str | None]:
    """Return the flaw of each row of logits (N, V), of hidden states (N, H); None for no flaw.

    Logits may be minus infinity where a model bars tokens, as long as some are left. One pass over
    all rows finds those that are looked at again.
    """
    found: list[str | None] = [None] * logits.shape[0]
    for row in ops.doubtful_rows(logits, hidden):
        top, bottom = logits[row].amax(), logits[row].amin()
        if not bool(torch.isfinite(hidden[row]).all()) or not bool(torch.isfinite(top)):
            found[row] = INFINITE
        elif logits.shape[1] > 1 and bool(top == bottom):
            found[row] = EQUAL
    return found


def finite_parts(parts: Sequence[torch.Tensor]) -> list[bool]:
    """Return whether each tensor is finite throughout, with one transfer from the device."""
    if not parts:
        return []
    found: list[bool] = torch.stack([torch.isfinite(part).all() for part in parts]).tolist()
    return found
