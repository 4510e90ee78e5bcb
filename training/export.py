"""Write the trained model as a Qwen2-VL checkpoint in the published layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.clips import CLIP_MAX_PIXELS, CLIP_MIN_PIXELS, NUM_FRAMES
from training.model import FRAMES, PATCH, Shape
from training.pictures import MAX_PIXELS, MIN_PIXELS
from training.tokenizer import save_tokenizer

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def published_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """bf16 tensors under published names, the patch embedding in its published shape."""
    weights = {}
    for name, weight in state.items():
        if not name.startswith(("visual.", "model.")):
            continue
        if name == "visual.patch_embed.proj.weight":
            weight = weight.view(-1, 3, FRAMES, PATCH, PATCH)
        weights[name] = weight.to(torch.bfloat16).contiguous()
    return weights


def training_weights(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of ``published_weights``, in float32."""
    weights = {name: weight.float() for name, weight in published.items()}
    name = "visual.patch_embed.proj.weight"
    weights[name] = weights[name].flatten(1)
    return weights


def config_of(shape: Shape, ids: dict[str, int]) -> dict[str, Any]:
    """config.json of a model of ``shape``; ``ids`` are the special tokens' ids."""
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "attention_dropout": 0.0,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "hidden_act": "silu",
        "hidden_size": shape.width,
        "initializer_range": 0.02,
        "intermediate_size": shape.inner,
        "max_position_embeddings": 2048,
        "max_window_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": shape.rope_theta,
        "rope_scaling": {"type": "mrope", "mrope_section": list(shape.mrope_section)},
        "sliding_window": 2048,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocab,
        "vision_config": {
            "depth": shape.vision_layers,
            "embed_dim": shape.vision_width,
            "mlp_ratio": 4,
            "num_heads": shape.vision_heads,
            "hidden_act": "quick_gelu",
            "in_chans": 3,
            "in_channels": 3,
            "hidden_size": shape.width,
            "model_type": "qwen2_vl",
            "patch_size": PATCH,
            "spatial_patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": FRAMES,
        },
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object, indented."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def preprocessor_config(kind: str, least: int, most: int) -> dict[str, Any]:
    """The image or video processor's configuration; ``least`` and ``most`` pixels of a frame."""
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(MEAN),
        f"{kind}_processor_type": f"Qwen2VL{kind.capitalize()}Processor",
        "image_std": list(STD),
        "max_pixels": most,
        "merge_size": 2,
        "min_pixels": least,
        "patch_size": PATCH,
        "processor_class": "Qwen2VLProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": most, "shortest_edge": least},
        "temporal_patch_size": FRAMES,
    }


def export(state: dict[str, Tensor], shape: Shape, folder: Path) -> None:
    """Write weights, tokenizer, template and configuration files into ``folder``."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = save_tokenizer(folder)
    names = ("<|endoftext|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
             "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")  # fmt: skip
    ids = {name: tokenizer.token_to_id(name) for name in names}
    write_json(folder / "config.json", config_of(shape, ids))
    write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": ids["<|endoftext|>"],
            "do_sample": False,
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "pad_token_id": ids["<|endoftext|>"],
        },
    )
    write_json(
        folder / "preprocessor_config.json",
        preprocessor_config("image", MIN_PIXELS, MAX_PIXELS),
    )
    video = preprocessor_config("video", CLIP_MIN_PIXELS, CLIP_MAX_PIXELS)
    video |= {"do_sample_frames": True, "num_frames": max(NUM_FRAMES)}
    write_json(folder / "video_preprocessor_config.json", video)
    part = folder / "model.safetensors.part"
    part.write_bytes(save(published_weights(state), metadata={"format": "pt"}))
    part.replace(folder / "model.safetensors")
