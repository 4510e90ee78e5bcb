"""Multi-axis positions of prompts with media, numbered by the modelling code of transformers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from sensorium.errors import UnsupportedModelError
from sensorium.multimodal.items import Modality
from sensorium.multimodal.processor import PlacedItem

TOKEN_TYPES: Mapping[Modality, int] = {"image": 1, "video": 2, "audio": 3}
"""``mm_token_type_ids`` of placeholders; 0 for text."""


def numbered(
    folder: str, architecture: str, token_ids: Sequence[int], items: Sequence[PlacedItem]
) -> tuple[np.ndarray, int]:
    """Return rotary positions (3, num_tokens) int32 of an expanded prompt, and their delta.

    The delta is added to the positions of generated tokens.
    """
    import torch

    index = rope_index(folder, architecture)
    types = np.zeros((1, len(token_ids)), np.int64)
    for item in items:
        for start, length in item.runs:
            types[0, start : start + length] = TOKEN_TYPES[item.features.modality]
    ids = torch.tensor([list(token_ids)])
    found: dict[str, Any] = {
        "input_ids": ids,
        "mm_token_type_ids": torch.from_numpy(types),
        "attention_mask": torch.ones_like(ids),
    }
    known = inspect.signature(index).parameters
    names = {name for item in items for name in item.features.arrays}
    for name in sorted((names & set(known)) - set(found)):
        arrays = [item.features.arrays[name] for item in items if name in item.features.arrays]
        found[name] = torch.from_numpy(np.concatenate(arrays))
    given = {name: value for name, value in found.items() if name in known}
    positions, delta = index(**given)
    rows = positions.reshape(3, -1).numpy().astype(np.int32)
    return np.ascontiguousarray(rows), int(delta.reshape(-1)[0])


@functools.lru_cache(maxsize=4)
def rope_index(folder: str, architecture: str) -> Callable[..., Any]:
    """Return ``get_rope_index`` of a model without weights.

    Raises UnsupportedModelError when it has none.
    """
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    with torch.device("meta"):
        inner = getattr(transformers, architecture)._from_config(config)
    for module in inner.modules():
        if hasattr(module, "get_rope_index"):
            index: Callable[..., Any] = module.get_rope_index
            return index
    raise UnsupportedModelError(
        f"Architecture {architecture!r} has positions of several axes, but no code that numbers "
        "tokens with them.",
        param="model",
    )
