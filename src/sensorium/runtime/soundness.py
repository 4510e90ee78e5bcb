"""Whether what a model computed can be used: logits, states and embeddings that are finite, and logits that differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch

INFINITE = "are infinite or undefined"
EQUAL = "are all equal"


def flaws_of_logits(logits: torch.Tensor, hidden: torch.Tensor) -> list[str | None]:
    """What is wrong with each row of logits (N, V), made of hidden states (N, H); None where nothing is.

    Logits may be minus infinity where a model bars tokens, as long as some are left. Costs little beside the product
    that made them: rows are looked at closely only where their sum, or their first and last numbers, give cause.
    """
    finite = torch.isfinite(hidden).all(-1)
    doubtful = ~torch.isfinite(logits.sum(-1)) | (logits[:, 0] == logits[:, -1]) | ~finite
    found: list[str | None] = [None] * logits.shape[0]
    rows = doubtful.nonzero()[:, 0].tolist()
    for row in rows:
        top, bottom = logits[row].amax(), logits[row].amin()
        if not bool(finite[row]) or not bool(torch.isfinite(top)):
            found[row] = INFINITE
        elif logits.shape[1] > 1 and bool(top == bottom):
            found[row] = EQUAL
    return found


def finite_parts(parts: Sequence[torch.Tensor]) -> list[bool]:
    """Whether each of some tensors is finite throughout, asked of the device at once."""
    if not parts:
        return []
    found: list[bool] = torch.stack([torch.isfinite(part).all() for part in parts]).tolist()
    return found
