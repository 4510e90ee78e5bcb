"""Inputs of the attention kernels for one step: each sequence's queries, and where its keys are."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from sensorium.kernels.int8_cache import Records


@dataclass(frozen=True, slots=True)
class KVCacheLayout:
    """Shape of the paged cache: one K and one V tensor a layer.

    K is (num_blocks, num_kv_heads, head_dim, block_size): transposed within a block, so that the
    inner loop of decode attention runs over tokens. V is (num_blocks, num_kv_heads, block_size,
    head_dim). With the dtype int8 both are (num_blocks, num_kv_heads, bytes), see ``int8_cache``.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def records(self) -> Records | None:
        """Layout of the blocks of an int8 cache; None for any other."""
        return Records(self.head_dim, self.block_size) if self.dtype == torch.int8 else None

    @property
    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of K and V of one block."""
        heads, dim, size = self.num_kv_heads, self.head_dim, self.block_size
        if self.records is not None:
            return (heads, self.records.key_bytes), (heads, self.records.value_bytes)
        return (heads, dim, size), (heads, size, dim)

    @property
    def bytes_per_block(self) -> int:
        """Bytes of one block over all layers, K and V."""
        return self.num_layers * sum(map(math.prod, self.shapes)) * self.dtype.itemsize


@dataclass(slots=True)
class LayerCache:
    """K and V of one layer, in the layout of ``KVCacheLayout``; ``records`` as there."""

    k: torch.Tensor
    v: torch.Tensor
    records: Records | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Data type of keys and values in the cache."""
        return self.k.dtype

    @property
    def num_kv_heads(self) -> int:
        """Number of heads of keys and values."""
        return self.k.shape[1]

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.k.shape[2] if self.records is None else self.records.head_dim

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.k.shape[3] if self.records is None else self.records.block_size


@dataclass(slots=True)
class AttentionBatch:
    """One step's ragged batch of S sequences and T tokens; the tokens of a sequence are adjacent.

    Sequences with a single query token come first (``num_decodes`` of them), so that decode and
    chunked prefill are two contiguous parts. All tensors are int32 on the device of the model.

    query_start (S+1): first token row of each sequence, and T at the end. kv_len (S): tokens of the
    sequence with KV after this step (cached + this step's). block_table (S, B): block ids, padded
    with 0. Row r of sequence s is the token at index ``kv_len[s] - (query_start[s+1] -
    query_start[s]) + (r - query_start[s])`` and attends to that index and all before. cos, sin (T,
    rotary_dim // 2) float32: rotary factors of each row, computed once a step. caches: one per
    layer.
    """

    query_start: torch.Tensor
    kv_len: torch.Tensor
    block_table: torch.Tensor
    num_decodes: int
    max_query_len: int
    max_kv_len: int
    cos: torch.Tensor
    sin: torch.Tensor
    caches: list[LayerCache]
    query_lens: list[int]
    """Host copy of the query lengths, in order."""
    kv_lens: list[int]
    """Host copy of kv_len."""
    invariant: bool = True
    """If true, a row's result has the same bits whatever else is in the step."""
    adapters: int = 0
    """0: no row has an adapter. Otherwise the version of the adapters that are loaded."""
    scratch: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)
    """Values that kernels derive from the batch once and use in every layer; empty when the
    batch is built."""


@dataclass(frozen=True, slots=True, eq=False)
class AttentionVariant:
    """Deviations of a layer's attention from plain causal attention.

    Attributes:
        window: Tokens that a row attends to, itself among them; None for all.
        softcap: Scores s become ``c * tanh(s / c)``.
        sinks: (num_heads,), a score of each head that takes part in the softmax and adds nothing.
        bidirectional: (2, T) int64, first and last index of the span in which a row attends both
            ways, in any layer and past any window; a row's own index twice outside of spans. All
            rows of a span that are not in the cache yet must be in the batch.
    """

    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    bidirectional: torch.Tensor | None = None

    def is_plain(self, max_kv_len: int) -> bool:
        """Return whether plain attention gives the same for up to ``max_kv_len`` tokens."""
        inside = self.window is None or max_kv_len <= self.window
        return inside and self.softcap is None and self.sinks is None and self.bidirectional is None

    def affected_sequences(self, batch: AttentionBatch) -> list[int]:
        """Return the indexes of the sequences whose attention differs from plain attention."""
        if self.is_plain(batch.max_kv_len):
            return []
        everything = range(len(batch.kv_lens))
        if self.softcap is not None or self.sinks is not None:
            return list(everything)
        found = self._bidirectional(batch) if self.bidirectional is not None else set()
        if self.window is not None:
            found = found | {i for i in everything if batch.kv_lens[i] > self.window}
        return sorted(found)

    def _bidirectional(self, batch: AttentionBatch) -> set[int]:
        """Return the indexes of the sequences with bidirectional rows, the same in all layers."""
        found: set[int] | None = batch.scratch.get("bidirectional")
        if found is None:
            assert self.bidirectional is not None
            rows = (self.bidirectional[0] < self.bidirectional[1]).split(batch.query_lens)
            found = {index for index, own in enumerate(rows) if bool(own.any())}
            batch.scratch["bidirectional"] = found
        return found


PLAIN = AttentionVariant()
