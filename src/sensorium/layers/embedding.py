"""Token embeddings and the language-model head."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sensorium.layers.linear import Linear


class Embedding:
    """Embedding table (num_rows, size), set by ``load``."""

    __slots__ = ("num_rows", "size", "weight")

    def __init__(self, num_rows: int, size: int) -> None:
        self.num_rows = num_rows
        self.size = size
        self.weight = torch.empty(0)

    def load(self, weight: torch.Tensor) -> None:
        """Set the table (num_rows, size). Raises ValueError for another shape."""
        if tuple(weight.shape) != (self.num_rows, self.size):
            raise ValueError(
                f"embedding has shape {tuple(weight.shape)}, expected ({self.num_rows}, "
                f"{self.size})"
            )
        self.weight = weight.contiguous()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up rows (T, size) of the table for ids (T,), in new memory.

        Ids past the table's end, as some placeholders are, give an arbitrary row: embeddings of
        items replace these.
        """
        return F.embedding(ids.clamp(max=self.num_rows - 1), self.weight)

    __call__ = forward


class LMHead:
    """Language-model head: logits over the vocabulary.

    Tied heads are loaded with the embedding's tensor: they keep a packed copy of it.
    """

    __slots__ = ("linear",)

    def __init__(self, vocab_size: int, hidden_size: int, bias: bool = False) -> None:
        self.linear = Linear(hidden_size, vocab_size, bias)

    def load(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Set the weight (vocab_size, hidden_size) and, if there is one, the bias (vocab_size,)."""
        self.linear.load(weight, bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits (N, vocab_size) of hidden states (N, hidden_size), in their dtype."""
        return self.linear(hidden)

    __call__ = forward
