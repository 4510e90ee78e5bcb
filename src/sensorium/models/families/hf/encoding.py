"""Embeddings of media, captured where a model of transformers calls its decoder with them.

So no knowledge is needed of how its encoders are called, what they return and how that is split:
the model's own forward pass runs until its decoder is called, and no further.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from sensorium.models.families.hf.attention import UnfitError

_EXPECTED = frozenset(
    {
        *("inputs_embeds", "attention_mask", "position_ids", "past_key_values", "use_cache"),
        *("cache_position", "input_ids", "output_attentions", "output_hidden_states"),
    }
)
"""Arguments of a decoder besides settings; anything else would be lost."""


class _ReachedDecoderError(Exception):
    """Stop of a forward pass whose decoder would run next."""


def embed_items(
    inner: Any, decoder: Any, items: Sequence[Mapping[str, np.ndarray]], dtype: torch.dtype
) -> torch.Tensor:
    """Return embeddings (items, n, H) of the ids of each item, with those of the media merged in.

    ``items``: the processor's results, of equal shapes. Raises UnfitError when the model gives its
    decoder something besides embeddings.
    """
    inputs = inputs_of(items, next(decoder.parameters()).device, dtype)
    found: dict[str, Any] = {}

    def stop(module: Any, args: Any, kwargs: Any) -> None:
        found.update(kwargs)
        raise _ReachedDecoderError

    hook = decoder.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        inner(**inputs, use_cache=False)
    except _ReachedDecoderError:
        pass
    finally:
        hook.remove()
    embeds = found.pop("inputs_embeds", None)
    if embeds is None:
        raise UnfitError("it does not hand merged embeddings to its decoder")
    more = [name for name, value in found.items() if name not in _EXPECTED and _holds(value)]
    if more:
        raise UnfitError(f"it hands {', '.join(more)} to its decoder besides the embeddings")
    merged_embeds: torch.Tensor = embeds
    return merged_embeds


def inputs_of(
    items: Sequence[Mapping[str, np.ndarray]], device: torch.device, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Return a model's arguments for a batch of items: arrays joined along the first axis."""
    joined = {name: np.concatenate([item[name] for item in items]) for name in items[0]}
    tensors = {name: torch.from_numpy(array).to(device) for name, array in joined.items()}
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}


def _holds(value: Any) -> bool:
    """Return whether a value contains tensors."""
    if isinstance(value, list | tuple):
        return any(map(_holds, value))
    return isinstance(value, torch.Tensor)
