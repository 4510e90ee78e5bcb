"""Vision encoders of checkpoints written as GGUF files of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file

from tests.checkpoints.gguf import add_tensor

_QWEN = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_CLIP = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}
_OUTSIDE = {
    "visual.merger.ln_q": "v.post_ln",
    "visual.merger.mlp.0": "mm.0",
    "visual.merger.mlp.2": "mm.2",
    "multi_modal_projector.linear_1": "mm.0",
    "multi_modal_projector.linear_2": "mm.2",
    "model.connector.modality_projection.proj": "mm.model.fc",
}
_EMBEDDINGS = {
    "embeddings.patch_embedding": "v.patch_embd",
    "embeddings.position_embedding": "v.position_embd",
    "pre_layrnorm": "v.pre_ln",
    "post_layernorm": "v.post_ln",
}
_TOWERS = ("vision_tower.vision_model.", "model.vision_model.")
_PROJECTORS = {"qwen2_vl": "qwen2vl_merger", "llava": "mlp", "idefics3": "idefics3"}


def write_mmproj(
    folder: Path,
    path: Path,
    kind: str = "F32",
    swapped: bool = False,
    cut: str | None = None,
    **metadata: Any,
) -> None:
    """Write the encoder of a checkpoint of Qwen2-VL, LLaVA or Idefics3.

    ``swapped``: with the early names of the MLPs. ``cut``: a weight of which the last tensor lacks
    half of the rows. ``metadata``: further values under ``clip``; one
    that is None is left out.
    """
    config = json.loads((folder / "config.json").read_text())
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    values = _settings(config, processor) | {
        name.replace("__", "."): value for name, value in metadata.items()
    }
    writer = GGUFWriter(path, "clip")
    for name, value in values.items():
        _add_value(writer, f"clip.{name}", value)
    dropped = _dropped(config)
    for name, weight in load_file(folder / "model.safetensors").items():
        parts = _parts(name, weight.float())
        if name == cut:
            stored, value = parts[-1]
            parts[-1] = stored, value[: len(value) // 2]
        for stored, value in parts:
            if stored.startswith(dropped):
                continue
            own = _swapped(stored) if swapped else stored
            wide = kind if value.dim() == 2 else "F32"
            add_tensor(writer, own, value.contiguous().numpy(), wide, np.random.default_rng(0))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _settings(config: Mapping[str, Any], processor: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of an encoder, by names below ``clip``."""
    family, vision = config["model_type"], config["vision_config"]
    text = config.get("text_config", config)
    is_qwen, is_llava = family == "qwen2_vl", family == "llava"
    depth = vision["depth"] if is_qwen else vision["num_hidden_layers"]
    return {
        "has_vision_encoder": True,
        "projector_type": _PROJECTORS[family],
        "vision.image_size": vision.get("image_size", 560),
        "vision.patch_size": vision.get("patch_size", 14),
        "vision.embedding_length": vision["embed_dim" if is_qwen else "hidden_size"],
        # As the scripts have it: the width of the decoder, of Qwen2-VL.
        "vision.feed_forward_length": vision["hidden_size" if is_qwen else "intermediate_size"],
        "vision.block_count": depth - 1 if is_llava else depth,
        "vision.attention.head_count": vision["num_heads" if is_qwen else "num_attention_heads"],
        "vision.attention.layer_norm_epsilon": vision.get(
            "layer_norm_eps", 1e-5 if is_llava else 1e-6
        ),
        "vision.image_mean": processor.get("image_mean", [0.5] * 3),
        "vision.image_std": processor.get("image_std", [0.5] * 3),
        # That of CLIP, which is not the projector's, in files of LLaVA.
        "vision.projection_dim": vision.get("projection_dim", 0)
        if is_llava
        else text["hidden_size"],
        "use_gelu": not (is_qwen or is_llava),
        **(
            {
                "vision.projector.scale_factor": config["scale_factor"],
                "vision.preproc_image_size": processor["size"]["longest_edge"],
            }
            if family == "idefics3"
            else {}
        ),
    }


def _add_value(writer: GGUFWriter, name: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(name, value)
    elif isinstance(value, str):
        writer.add_string(name, value)
    elif isinstance(value, int):
        writer.add_uint32(name, value)
    elif isinstance(value, float):
        writer.add_float32(name, value)
    elif value is not None:
        writer.add_array(name, value)


def _dropped(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The tensors that conversions leave out: in LLaVA's, the last layer and what is behind it."""
    if config["model_type"] != "llava":
        return ("-",)
    return (f"v.blk.{config['vision_config']['num_hidden_layers'] - 1}.", "v.post_ln.")


def _swapped(stored: str) -> str:
    pair = ("ffn_up", "ffn_down") if "ffn_up" in stored else ("ffn_down", "ffn_up")
    return stored.replace(*pair)


def _parts(name: str, value: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    """The tensors that a weight becomes; none for one of the language model."""
    stem, _, end = name.rpartition(".")
    if stem in _OUTSIDE:
        return [(f"{_OUTSIDE[stem]}.{end}", value)]
    if name.startswith("visual."):
        return _of_qwen(stem.removeprefix("visual."), end, value)
    tower = next((own for own in _TOWERS if name.startswith(own)), None)
    if tower is None or end == "position_ids":
        return []
    own = stem.removeprefix(tower)
    if own == "embeddings":
        return [("v.class_embd", value)]
    if own in _EMBEDDINGS:
        return [(f"{_EMBEDDINGS[own]}.{end}", value)]
    _, _, layer, part = own.split(".", 3)
    return [(f"v.blk.{layer}.{_CLIP[part]}.{end}", value)]


def _of_qwen(stem: str, end: str, value: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
    if stem == "patch_embed.proj":
        first = "v.patch_embd.weight"
        return [(first, value[:, :, 0]), (f"{first}.1", value[:, :, 1])]
    _, layer, own = stem.split(".", 2)
    if own == "attn.qkv":
        return [
            (f"v.blk.{layer}.attn_{part}.{end}", rows)
            for part, rows in zip("qkv", value.chunk(3), strict=True)
        ]
    return [(f"v.blk.{layer}.{_QWEN[own]}.{end}", value)]
