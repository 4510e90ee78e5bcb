"""Paged attention as an attention function of transformers, for the running step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from sensorium.kernels import ops
from sensorium.kernels.batch import AttentionBatch, AttentionVariant

NAME = "sensorium_paged"
"""The value of ``attn_implementation`` under which the function is registered."""


class UnfitError(Exception):
    """The modelling code needs attention that paged attention does not support.

    The text names it.
    """


@dataclass(slots=True)
class Step:
    """State that the layers of one forward pass share.

    Attributes:
        batch: None for a dry run that only records the calls of attention.
        bidirectional: As in ``AttentionVariant``, for the rows of the step.
        layers: The layers that have called so far.
        shapes: Their (KV heads, size of keys, size of values).
    """

    batch: AttentionBatch | None
    bidirectional: torch.Tensor | None = None
    layers: list[int] = field(default_factory=list)
    shapes: list[tuple[int, int, int]] = field(default_factory=list)


_RUNNING: ContextVar[Step] = ContextVar("sensorium_step")


@contextmanager
def running(step: Step) -> Iterator[Step]:
    """Direct attention within the context to the caches of this step."""
    token = _RUNNING.set(step)
    try:
        yield step
    finally:
        _RUNNING.reset(token)


def register() -> str:
    """Register the function with transformers and return its name."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    return NAME


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **unused: Any,
) -> tuple[torch.Tensor, None]:
    """Paged attention in the layout of transformers.

    query (1, num_heads, T, D), key and value (1, num_kv_heads, T, D) -> (1, T, num_heads, D). The
    arguments are those of the attention interface of transformers; its mask is not used. Raises
    UnfitError for attention that is not causal self-attention of a decoder.
    """
    step = _RUNNING.get()
    layer = getattr(module, "layer_idx", None)
    if not isinstance(layer, int):
        raise UnfitError("an attention layer that does not know its number")
    if attention_mask is not None:
        raise UnfitError("an attention mask of its own")
    if query.shape[2] != key.shape[2]:
        raise UnfitError("attention to other tokens than those of the text (cross-attention)")
    num_rows, size, value_size = key.shape[2], key.shape[3], value.shape[3]
    if step.batch is None:
        step.layers.append(layer)
        step.shapes.append((key.shape[1], size, value_size))
        return query.new_zeros((1, num_rows, query.shape[1], value_size)), None
    held = step.batch.caches[layer].head_dim
    num_tokens = sum(step.batch.query_lens)
    mixed = ops.paged_attention(
        _padded(query[:, :, :num_tokens], held),
        _padded(key[:, :, :num_tokens], held),
        _padded(value[:, :, :num_tokens], held),
        step.batch,
        layer,
        size**-0.5 if scaling is None else float(scaling),
        AttentionVariant(sliding_window or None, softcap or None, s_aux, step.bidirectional),
    )
    # Rows behind the tokens are there for the linear layers alone.
    mixed = torch.nn.functional.pad(mixed, (0, 0, 0, 0, 0, num_rows - num_tokens))
    return mixed[None, :, :, :value_size], None


def _padded(heads: torch.Tensor, size: int) -> torch.Tensor:
    """Pad (1, heads, T, D) to (T, heads, size) with zeros, which change no result."""
    rows = heads[0].transpose(0, 1)
    missing = size - rows.shape[2]
    return torch.nn.functional.pad(rows, (0, missing)) if missing else rows
