"""Memory of a model that several processes share, before it is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sensorium.config import GIB, ParallelConfig
from sensorium.distributed.shard import Shard
from sensorium.errors import ConfigError
from sensorium.models.interface import BuildOptions, Family, LoadedConfig, WeightSlot

if TYPE_CHECKING:
    import torch

RANK_PROCESS = int(0.3 * GIB)
"""Memory of the process of a rank without weights and caches, about; the first rank's is one of
those that any engine has."""


@dataclass(frozen=True, slots=True)
class Shares:
    """Parts of the weights that ``size`` ranks hold, of those that one process holds.

    first: that of the first rank, which has encoders in any case. others: that of each other one.
    """

    size: int = 1
    first: float = 1.0
    others: float = 0.0

    @property
    def total(self) -> float:
        """Return the sum of all parts, above 1 where ranks hold the same."""
        return self.first + (self.size - 1) * self.others


def check_divisible(family: Family) -> None:
    """Raise ConfigError where layers are not ours, which ranks could divide."""
    if not family.quantizable:
        raise ConfigError(
            "tensor_parallel_size: this model runs through the code of transformers, whose layers "
            "cannot be divided here: leave it at 1.",
            param="tensor_parallel_size",
        )


def shares_of(
    loaded: LoadedConfig,
    family: Family,
    dtype: torch.dtype,
    device: torch.device,
    parallel: ParallelConfig,
) -> Shares:
    """Return the parts of a model's weights that its ranks will hold.

    Raises ConfigError where it cannot be divided so.
    """
    size = parallel.tensor_parallel_size
    if size == 1:
        return Shares()
    from sensorium.distributed.collectives import Collectives

    check_divisible(family)
    ranks = Collectives(Shard(0, size))
    options = BuildOptions(dtype, device, random_weights=True, collectives=ranks)
    slots = list(family.build_model(loaded, options).slots())
    whole = sum(math.prod(part.shape) for slot in slots for part in slot.parts)
    first = _own(slots) / whole
    others = first
    if parallel.encoder_ranks == "first":
        others -= _own([slot for slot in slots if slot.role == "encoder"]) / whole
    return Shares(size, first, others)


def _own(slots: Sequence[WeightSlot]) -> int:
    """Return the number of weights that the first rank has of slots."""
    return sum(math.prod(part.own_shape) for slot in slots for part in slot.parts)


def cache_share(num_kv_heads: int, size: int) -> float:
    """Return the memory of all ranks' KV caches, of what one process takes for as many tokens.

    It is above 1 where several ranks hold the same heads.
    """
    first, end = Shard(0, size).shared_part(num_kv_heads)
    return size * (end - first) / num_kv_heads
