"""Weights of Qwen2-VL's vision encoder in a GGUF file, joined as its checkpoint has them."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import torch

from sensorium.errors import ConfigError
from sensorium.models.gguf.reader import GgufFile, TensorInfo

Numbers = Callable[[TensorInfo], torch.Tensor]
"""The numbers of a tensor of the file."""
Tower = dict[str, tuple[tuple[int, ...], Callable[[], torch.Tensor]]]
"""Shape and reader of each weight, by its name."""

_BLOCK = re.compile(r"v\.blk\.(0|[1-9][0-9]{0,5})\.([a-z0-9_]+)\.(weight|bias)")
_NAMES = {
    "ln1": "norm1",
    "ln2": "norm2",
    "attn_out": "attn.proj",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
_OUTSIDE = {"v.post_ln": "merger.ln_q", "mm.0": "merger.mlp.0", "mm.2": "merger.mlp.2"}
_QKV = ("attn_q", "attn_k", "attn_v")
_PATCHES = ("v.patch_embd.weight", "v.patch_embd.weight.1")


def tower_weights(file: GgufFile, numbers: Numbers) -> Tower:
    """Return shape and reader of each weight by transformers' name, such as ``visual.…``.

    Q, K and V are joined, and the two frames of a patch's convolution stacked. Raises ConfigError
    for a part without the others.
    """
    swapped = _is_swapped(file)
    found: Tower = {}
    for info in file.tensors.values():
        block = _BLOCK.fullmatch(info.name)
        stem, _, end = info.name.rpartition(".")
        if block is not None and block[2] == "attn_q":
            parts = [_part(file, info.name.replace("attn_q", name)) for name in _QKV]
            shape = (sum(part.shape[0] for part in parts), *info.shape[1:])
            name = f"visual.blocks.{block[1]}.attn.qkv.{block[3]}"
            found[name] = shape, partial(_joined, parts, numbers)
        elif block is not None and block[2] in _NAMES:
            own = block[2]
            if swapped and own in ("ffn_up", "ffn_down"):
                own = "ffn_down" if own == "ffn_up" else "ffn_up"
            name = f"visual.blocks.{block[1]}.{_NAMES[own]}.{block[3]}"
            found[name] = info.shape, partial(numbers, info)
        elif stem in _OUTSIDE:
            found[f"visual.{_OUTSIDE[stem]}.{end}"] = info.shape, partial(numbers, info)
        elif info.name == _PATCHES[0]:
            parts = [info, _part(file, _PATCHES[1])]
            shape = (*info.shape[:2], 2, *info.shape[2:])
            found["visual.patch_embed.proj.weight"] = shape, partial(_stacked, parts, numbers)
        elif info.name != _PATCHES[1] and not (block and block[2] in _QKV):
            found[info.name] = info.shape, partial(numbers, info)  # found to have no place
    return found


def _part(file: GgufFile, name: str) -> TensorInfo:
    info = file.tensors.get(name)
    if info is None:
        raise ConfigError(f"{file.path.name} has no tensor {name!r}.", param="mmproj")
    return info


def _joined(parts: list[TensorInfo], numbers: Numbers) -> torch.Tensor:
    return torch.cat([numbers(part).float() for part in parts])


def _stacked(parts: list[TensorInfo], numbers: Numbers) -> torch.Tensor:
    return torch.stack([numbers(part).float() for part in parts], dim=2)


def _is_swapped(file: GgufFile) -> bool:
    """Return whether the two layers of an MLP have each other's name, as in early files."""
    up = file.tensors.get("v.blk.0.ffn_up.weight")
    return up is not None and up.shape[0] < up.shape[1]
