"""The model of several ranks, as the runner of the first one sees it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sensorium.engine.parallel.group import RankGroup
from sensorium.engine.parallel.messages import Embed, Forward, Logits
from sensorium.kernels.batch import AttentionBatch
from sensorium.models.interface import Model
from sensorium.multimodal.items import Features


class ParallelModel:
    """A model whose decoder all ranks compute together, each its part; see ``Model``.

    Encoders, adapters' lanes, sampling, grammars and the caches of media are the first rank's
    alone: the others get embeddings and give their part of the logits.
    """

    def __init__(self, model: Model, group: RankGroup) -> None:
        self._model, self._group = model, group
        self.shape, self.dtype, self.device = model.shape, model.dtype, model.device

    @property
    def has_encoder(self) -> bool:
        """Return whether ``encode`` takes items of any modality."""
        return self._model.has_encoder

    def encode(self, items: Sequence[Features]) -> list[torch.Tensor]:
        """Return embeddings (num_embeds, shape.embed_size) of each item."""
        return self._model.encode(items)

    def rotary(
        self, positions: torch.Tensor, lengths: Sequence[tuple[int, int]] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos, sin (T, rotary_dim // 2) float32 of positions."""
        return self._model.rotary(positions, lengths)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return token embeddings (T, shape.embed_size) of ids (T,)."""
        self._group.send(Embed(ids.cpu().numpy().tobytes()))
        with self._group.together():
            return self._model.embed(ids)

    def forward(self, embeds: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        """Return hidden states (T, H) after the final norm."""
        message = Forward(
            width=embeds.shape[1],
            rotary_size=batch.cos.shape[1],
            query_lens=batch.query_lens,
            kv_lens=batch.kv_lens,
            num_decodes=batch.num_decodes,
            invariant=batch.invariant,
            block_table=batch.block_table.cpu().numpy().tobytes(),
        )
        self._group.send(message)
        with self._group.together():
            self._group.collectives.broadcast(packed(batch.cos, batch.sin, embeds))
            return self._model.forward(embeds, batch)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits (N, V) of hidden states (N, H)."""
        self._group.send(Logits(hidden.shape[0]))
        with self._group.together():
            hidden = self._group.collectives.broadcast(hidden.contiguous())
            return self._model.logits(hidden)


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
