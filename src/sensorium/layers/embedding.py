"""Token embeddings and the language-model head."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from sensorium.kernels import ops
from sensorium.kernels.weight import PackedWeight, QuantizedTensor
from sensorium.layers.linear import Linear


class Embedding:
    """Embedding table (num_rows, size), set by ``load``, or that of a head that it is tied to.

    Of a larger table that ranks share, it may hold the rows from ``first`` on; see ``divide``.
    """

    __slots__ = (
        "_look_up",
        "_weight",
        "dtype",
        "first",
        "num_ids",
        "num_rows",
        "quantize",
        "reduce",
        "size",
    )

    _weight: torch.Tensor | QuantizedTensor | PackedWeight
    dtype: torch.dtype
    """Type of the rows that are looked up."""
    quantize: Callable[[torch.Tensor], QuantizedTensor] | None
    """Quantizes the table that ``load`` is given, where the loader has set it."""
    reduce: Callable[[torch.Tensor], torch.Tensor] | None
    """Sums the rows (T, size) of all ranks, where each holds a part of the table."""

    def __init__(self, num_rows: int, size: int) -> None:
        self.num_rows = num_rows
        self.size = size
        self._weight = torch.empty(0)
        self._look_up: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.dtype = torch.float32
        self.quantize = None
        self.first, self.num_ids = 0, num_rows
        self.reduce = None

    @property
    def weight(self) -> torch.Tensor | QuantizedTensor | PackedWeight:
        """The table."""
        return self._weight

    @weight.setter
    def weight(self, table: torch.Tensor | QuantizedTensor | PackedWeight) -> None:
        self._weight = table
        self._look_up = ops.bind_look_up(table, min(self.num_ids, self.num_rows))

    @property
    def is_replayable(self) -> bool:
        """Return whether the look-up is a kernel's work alone, which can be captured."""
        return self._look_up is not None and self.reduce is None

    def divide(
        self, first: int, num_ids: int, reduce: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        """Make this the rows from ``first`` on of a table of ``num_ids`` rows.

        The others' rows are zeros here, and come with ``reduce``.
        """
        self.first, self.num_ids, self.reduce = first, num_ids, reduce

    def load(self, weight: torch.Tensor) -> None:
        """Set the table (num_rows, size). Raises ValueError for another shape."""
        if tuple(weight.shape) != (self.num_rows, self.size):
            raise ValueError(
                f"embedding has shape {tuple(weight.shape)}, expected ({self.num_rows}, "
                f"{self.size})"
            )
        self.dtype = weight.dtype
        if self.quantize is None:
            self.weight = weight.contiguous()
            return
        packed = ops.quantize_and_pack(weight, self.quantize, weight.dtype)
        readable = packed.has_rows and packed.is_copy
        self.weight = packed if readable else self.quantize(weight)

    def load_packed(self, weight: PackedWeight) -> None:
        """Set a table that is packed already. Raises ValueError for another shape."""
        if weight.shape != (self.num_rows, self.size):
            raise ValueError(
                f"embedding has shape {weight.shape}, expected ({self.num_rows}, {self.size})"
            )
        self.dtype = weight.dtype
        self.weight = weight

    def share(self, weight: PackedWeight) -> None:
        """Look rows up in the packed weight of a head, and keep no table besides."""
        self.weight = weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up rows (T, size) of the table for ids (T,), in new memory.

        Ids past the table's end, as some placeholders are, give an arbitrary row: embeddings of
        items replace these.
        """
        if self.reduce is None and self._look_up is not None:
            return self._look_up(ids)
        ids = ids.clamp(max=self.num_ids - 1)
        if self.reduce is None:
            return self._rows(ids)
        ids = ids - self.first
        missing = (ids < 0) | (ids >= self.num_rows)
        rows = self._rows(ids.masked_fill(missing, 0))
        return self.reduce(rows.masked_fill_(missing[:, None], 0))

    def _rows(self, ids: torch.Tensor) -> torch.Tensor:
        table = self.weight
        if isinstance(table, torch.Tensor):
            return F.embedding(ids, table)
        if isinstance(table, QuantizedTensor):
            return table.rows(ids).to(self.dtype)
        return table.rows(ids)

    __call__ = forward


class LMHead:
    """Language-model head: logits over the vocabulary.

    Tied heads are loaded with the embedding's table and pack it; see ``tie``.
    """

    __slots__ = ("join", "linear")

    join: Callable[[torch.Tensor], torch.Tensor] | None
    """Makes (N, vocab_size) of the logits of all ranks, where each has those of some tokens."""

    def __init__(self, vocab_size: int, hidden_size: int, bias: bool = False) -> None:
        self.linear = Linear(hidden_size, vocab_size, bias)
        self.join = None

    def load(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """Set the weight (vocab_size, hidden_size) and, if there is one, the bias (vocab_size,)."""
        self.linear.load(weight, bias)

    def tie(self, embedding: Embedding) -> None:
        """Load the table of an embedding, which from then on looks up rows in the packed weight.

        It keeps its own where the packed one has no rows. A table that is packed already serves the
        head as it is.
        """
        table = embedding.weight
        if isinstance(table, PackedWeight):
            self.linear.load_packed(table)
            return
        self.linear.load(table, dtype=embedding.dtype)
        packed = self.linear.weight
        if packed is not None and packed.has_rows and packed.is_copy:
            embedding.share(packed)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits (N, vocab_size) of hidden states (N, hidden_size), in their dtype."""
        logits = self.linear(hidden)
        return logits if self.join is None else self.join(logits)

    __call__ = forward
