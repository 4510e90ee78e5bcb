"""The vision encoder of Qwen2-VL. Source: ``conversion/qwenvl.py`` of llama.cpp. No torch."""

from __future__ import annotations

from typing import Any

from sensorium.models.gguf.config import count
from sensorium.models.gguf.encoders.stored import (
    BLOCK,
    Configured,
    Encoder,
    TowerWeight,
    bad,
    check_width,
    colours,
    inner_size,
    is_swapped,
    num_layers,
    unswapped,
)
from sensorium.models.gguf.reader import GgufFile, TensorInfo, integers
from sensorium.models.gguf.tokens import acting_tokens

_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
_MERGE, _FRAMES = 2, 2
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


def configure(file: GgufFile, encoder: GgufFile, config: dict[str, Any]) -> Configured:
    """Return the configuration of a model with its encoder, and that of its image processor."""
    vision = _vision(encoder)
    check_width(encoder, vision["hidden_size"], config)
    tokens = acting_tokens(file, tuple(_TOKENS.values()))
    missing = [token for token in _TOKENS.values() if token not in tokens]
    if missing:
        bad(file, f"has no tokens {', '.join(missing)}")
    sections = (integers(file.own("rope.dimension_sections")) or [])[:3]
    size = config["head_dim"] // 2
    if len(sections) < 3 or min(sections) < 0 or sum(sections) != size:
        bad(file, f"has no three sections of {size} rotary positions (rope.dimension_sections)")
    whole = config | {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "rope_scaling": {"type": "mrope", "mrope_section": sections},
        "vision_config": vision,
        **{name: tokens[token] for name, token in _TOKENS.items()},
    }
    return whole, {"preprocessor_config.json": _processor(encoder, vision)}


def _vision(encoder: GgufFile) -> dict[str, Any]:
    """Return ``vision_config``. The width of the MLP is that of its weights: files misstate it."""
    width = count(encoder, "vision.embedding_length")
    inner = inner_size(encoder, width)
    if inner % width:
        bad(encoder, f"has an MLP of {inner}, no multiple of {width}")
    return {
        "depth": num_layers(encoder),
        "embed_dim": width,
        "hidden_size": count(encoder, "vision.projection_dim"),
        "mlp_ratio": inner // width,
        "num_heads": count(encoder, "vision.attention.head_count"),
        "patch_size": count(encoder, "vision.patch_size"),
        "spatial_merge_size": _MERGE,
        "temporal_patch_size": _FRAMES,
        "hidden_act": "quick_gelu",
        "in_channels": 3,
    }


def _processor(encoder: GgufFile, vision: dict[str, Any]) -> dict[str, Any]:
    """Return the image processor's configuration; files hold its means, and no range of pixels."""
    return colours(encoder) | {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 56 * 56,
        "max_pixels": 16384 * 28 * 28,
        "patch_size": vision["patch_size"],
        "temporal_patch_size": _FRAMES,
        "merge_size": _MERGE,
    }


def weights(encoder: GgufFile) -> dict[str, TowerWeight]:
    """Return each weight by transformers' name, such as ``visual.…``.

    Q, K and V are joined, and the two frames of a patch's convolution stacked. Raises ConfigError
    for a part without the others.
    """
    swapped = is_swapped(encoder)
    found = {}
    for info in encoder.tensors.values():
        block = BLOCK.fullmatch(info.name)
        stem, _, end = info.name.rpartition(".")
        if block is not None and block[2] == "attn_q":
            parts = [_part(encoder, info.name.replace("attn_q", name), info) for name in _QKV]
            shape = (sum(part.shape[0] for part in parts), *info.shape[1:])
            name = f"visual.blocks.{block[1]}.attn.qkv.{block[3]}"
            found[name] = TowerWeight(shape, tuple(parts))
        elif block is not None and block[2] in _NAMES:
            own = unswapped(block[2]) if swapped else block[2]
            name = f"visual.blocks.{block[1]}.{_NAMES[own]}.{block[3]}"
            found[name] = TowerWeight(info.shape, (info,))
        elif stem in _OUTSIDE:
            found[f"visual.{_OUTSIDE[stem]}.{end}"] = TowerWeight(info.shape, (info,))
        elif info.name == _PATCHES[0]:
            parts = [info, _part(encoder, _PATCHES[1], info)]
            shape = (*info.shape[:2], 2, *info.shape[2:])
            name = "visual.patch_embed.proj.weight"
            found[name] = TowerWeight(shape, tuple(parts), "frames")
        elif info.name != _PATCHES[1] and not (block and block[2] in _QKV):
            found[info.name] = TowerWeight(info.shape, (info,))  # found to have no place
    return found


def _part(file: GgufFile, name: str, like: TensorInfo) -> TensorInfo:
    """Return a tensor that is joined with another of the same shape. Raises ConfigError."""
    info = file.tensors.get(name)
    if info is None or info.shape != like.shape:
        found = "none" if info is None else str(info.shape)
        bad(file, f"must have a tensor {name!r:.80} of the shape {like.shape}, and has {found}")
    return info


ENCODER = Encoder("qwen2vl_merger", "Qwen2-VL", ("qwen2vl",), configure, weights)
