"""Division of a decoder between the ranks that share it."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from sensorium.distributed.collectives import Collectives
from sensorium.distributed.shard import Cut, Range, sizes_that_fit
from sensorium.errors import ConfigError
from sensorium.models.configs import TextConfig


class Division:
    """Part of a decoder that one rank holds: heads, numbers inside MLPs, rows of the vocabulary.

    Attributes:
        own: The configuration of the rank's layers.
        vocabulary: Its rows of the embedding and of the head.

    Raises ConfigError where the decoder cannot be divided so.
    """

    def __init__(self, config: TextConfig, collectives: Collectives) -> None:
        self.collectives = collectives
        self._whole, shard = config, collectives.shard
        try:
            self._heads = shard.equal_part(config.num_heads)
            self._kv_heads = shard.shared_part(config.num_kv_heads)
            self._inner = shard.equal_part(config.inner_size)
        except ValueError:
            raise _indivisible(config, shard.size) from None
        self.vocabulary = shard.part(config.vocab_size)
        self.own = replace(
            config,
            num_heads=_length(self._heads),
            num_kv_heads=_length(self._kv_heads),
            inner_size=_length(self._inner),
        )

    @property
    def vocabulary_cut(self) -> Cut:
        """Cut of the embedding and of the head."""
        return Cut(rows=(self.vocabulary,))

    def qkv(self) -> list[Cut]:
        """Return the cuts of the weights of Q, K and V, or of the fused one."""
        dim, whole = self._whole.head_dim, self._whole
        q, kv = _times(self._heads, dim), _times(self._kv_heads, dim)
        if not whole.fused:
            return [Cut(rows=(q,)), Cut(rows=(kv,)), Cut(rows=(kv,))]
        k = whole.num_heads * dim
        v = k + whole.num_kv_heads * dim
        return [Cut(rows=(q, _moved(kv, k), _moved(kv, v)))]

    def o(self) -> list[Cut]:
        """Return the cut of the projection behind attention."""
        return [Cut(columns=_times(self._heads, self._whole.head_dim))]

    def gate_up(self) -> list[Cut]:
        """Return the cuts of gate and up, or of the fused one."""
        if not self._whole.fused:
            return [Cut(rows=(self._inner,))] * 2
        return [Cut(rows=(self._inner, _moved(self._inner, self._whole.inner_size)))]

    def down(self) -> list[Cut]:
        """Return the cut of the projection at the end of the MLP."""
        return [Cut(columns=self._inner)]

    def join_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the logits (N, V) of all ranks on the first, of this rank's (N, part of V).

        The others get their own back.
        """
        size, shard = self._whole.vocab_size, self.collectives.shard
        longest = shard.longest_part(size)
        parts = self.collectives.gather(F.pad(logits, (0, longest - logits.shape[1])))
        if not parts:
            return logits
        ends = [size * rank // shard.size for rank in range(shard.size + 1)]
        own = [
            part[:, : end - first] for part, first, end in zip(parts, ends, ends[1:], strict=False)
        ]
        return torch.cat(own, dim=1)


def _indivisible(config: TextConfig, size: int) -> ConfigError:
    fit = sizes_that_fit(config.num_heads, config.num_kv_heads, config.inner_size)
    advice = f"use {' or '.join(map(str, fit))}" if fit else "leave it at 1"
    return ConfigError(
        f"tensor_parallel_size is {size}, but the model has {config.num_heads} heads, "
        f"{config.num_kv_heads} of keys and values, and {config.inner_size} inner numbers in its "
        f"MLPs, which cannot be divided so: {advice}.",
        param="tensor_parallel_size",
    )


def _length(own: Range) -> int:
    return own[1] - own[0]


def _times(own: Range, factor: int) -> Range:
    return own[0] * factor, own[1] * factor


def _moved(own: Range, by: int) -> Range:
    return own[0] + by, own[1] + by
