"""The model of several ranks, as the runner of the first one sees it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from sensorium.engine.parallel import messages
from sensorium.engine.parallel.group import RankGroup
from sensorium.engine.parallel.messages import Embed, Encode, Encoded, Forward, Item, Logits
from sensorium.kernels.adapters import RowAdapters
from sensorium.kernels.batch import AttentionBatch
from sensorium.models.interface import Model
from sensorium.multimodal.items import Features


class ParallelModel:
    """A model whose decoder all ranks compute together, each its part; see ``Model``.

    Sampling, grammars and the caches of media are the first rank's alone: the others get embeddings
    and give their part of the logits. So are encoders, unless ``shares_items``: then each rank has
    them. rows: the lanes of adapters of the rows that are computed; None where there are none.
    """

    def __init__(
        self,
        model: Model,
        group: RankGroup,
        *,
        shares_items: bool = False,
        rows: RowAdapters | None = None,
    ) -> None:
        self._model, self._group, self._rows = model, group, rows
        self._shares_items, self._numbers = shares_items, itertools.count()
        self.shape, self.dtype, self.device = model.shape, model.dtype, model.device

    @property
    def has_encoder(self) -> bool:
        """Return whether ``encode`` takes items of any modality."""
        return self._model.has_encoder

    def encode(self, items: Sequence[Features]) -> list[torch.Tensor]:
        """Return embeddings (num_embeds, shape.embed_size) of each item.

        Several are encoded by all ranks where these have encoders, each a share of them.
        """
        if not self._shares_items or len(items) < 2:
            return self._model.encode(items)
        sizes = [item.num_embeds for item in items]
        own, *others = shares_of(sizes, self._group.collectives.shard.size)
        shares = {rank: share for rank, share in enumerate(others, 1) if share}
        number = next(self._numbers)
        lane = None if self._rows is None else self._rows.lane_of_all
        wanted = {
            rank: messages.encode(Encode(number, [_message(items[index]) for index in share], lane))
            for rank, share in shares.items()
        }
        failed: Exception | None = None
        found: dict[int, torch.Tensor] = {}
        with self._group.together():
            for rank, data in wanted.items():
                self._group.send_to(rank, data)
            try:
                embeds = self._model.encode([items[index] for index in own])
                found |= zip(own, embeds, strict=True)
            except Exception as error:
                failed = error  # the others are waited for all the same
            for rank, share in shares.items():
                embeds = self._received(rank, number, [sizes[index] for index in share])
                found |= zip(share, embeds, strict=False)
        if failed is not None or len(found) < len(items):
            raise failed or RuntimeError("a rank could not encode its items")
        return [found[index] for index in range(len(items))]

    def _received(self, rank: int, number: int, sizes: list[int]) -> list[torch.Tensor]:
        """Return the embeddings of items that another rank encodes; none if it could not.

        Raises RuntimeError for an answer to another message.
        """
        message = self._group.received(rank)
        if not isinstance(message, Encoded) or message.number != number:
            raise RuntimeError(f"a rank answered {message}, not message {number}")
        if message.failed:
            return []
        shape = sum(sizes), self.shape.embed_size
        rows = torch.empty(shape, dtype=self.dtype, device=self.device)
        rows = self._group.collectives.receive(rows, rank)
        return [part.clone() for part in rows.split(sizes)]

    def rotary(
        self, positions: torch.Tensor, lengths: Sequence[tuple[int, int]] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos, sin (T, rotary_dim // 2) float32 of positions."""
        return self._model.rotary(positions, lengths)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return token embeddings (T, shape.embed_size) of ids (T,)."""
        message = Embed(ids.cpu().numpy().tobytes())
        with self._group.together():
            self._group.send(message)
            return self._model.embed(ids)

    def forward(self, embeds: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        """Return hidden states (T, H) after the final norm."""
        rows = self._rows if self._rows is not None and self._rows.active else None
        message = Forward(
            width=embeds.shape[1],
            rotary_size=batch.cos.shape[1],
            query_lens=batch.query_lens,
            kv_lens=batch.kv_lens,
            num_decodes=batch.num_decodes,
            invariant=batch.invariant,
            block_table=batch.block_table.cpu().numpy().tobytes(),
            runs=[] if rows is None else [*rows.runs(len(embeds))],
        )
        step = packed(batch.cos, batch.sin, embeds)
        with self._group.together():
            self._group.send(message)
            self._group.collectives.broadcast(step)
            return self._model.forward(embeds, batch)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits (N, V) of hidden states (N, H)."""
        hidden = hidden.contiguous()
        with self._group.together():
            self._group.send(Logits(hidden.shape[0]))
            hidden = self._group.collectives.broadcast(hidden)
            return self._model.logits(hidden)

    def decode(self, ids: torch.Tensor, batch: AttentionBatch) -> None:
        """Return None: what the ranks exchange is no part of a launch; see ``Model``."""


def shares_of(sizes: Sequence[int], num_ranks: int) -> list[list[int]]:
    """Return the indexes of the items of each rank, so that all have about as much of the sizes.

    The largest come first; of ranks with equally much the first gets the next.
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    sums = [0] * num_ranks
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        rank = sums.index(min(sums))
        shares[rank].append(index)
        sums[rank] += sizes[index]
    return shares


def _message(features: Features) -> Item:
    """Return features as they are sent to another rank."""
    arrays = {name: features.arrays[name] for name in features.arrays}
    return Item(features.modality, features.num_embeds, dict(features.meta), arrays)


def packed(cos: torch.Tensor, sin: torch.Tensor, embeds: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a step's tensors, one behind the other, so that they go at once."""
    parts = (cos, sin, embeds)
    return torch.cat([part.contiguous().view(torch.uint8).flatten() for part in parts])


def unpacked(
    data: torch.Tensor, num_rows: int, rotary_size: int, width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return copies of cos, sin (T, rotary_size) and embeddings (T, width) of what was packed."""
    num_bytes = num_rows * rotary_size * torch.float32.itemsize
    cos, sin, embeds = data.split([num_bytes, num_bytes, num_rows * width * dtype.itemsize])
    return (
        cos.view(torch.float32).view(num_rows, rotary_size).clone(),
        sin.view(torch.float32).view(num_rows, rotary_size).clone(),
        embeds.view(dtype).view(num_rows, width).clone(),
    )
