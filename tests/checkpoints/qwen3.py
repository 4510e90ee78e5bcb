"""Qwen3-VL."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sensorium.models.families import qwen2_vl
from tests.checkpoints.common import (
    QWEN_TOKENS,
    TEXT_SIZES,
    VOCAB_SIZE,
    Names,
    class_arguments,
    new_tokenizer,
    write_model,
    write_tokenizer,
)


def make_qwen3_vl(
    folder: Path,
    layout: str = "hub",
    dtype: str = "float32",
    seed: int = 0,
    sharded: bool = False,
    vision: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    max_pixels: int = 32 * 32 * 48,
    **top: Any,
) -> Path:
    """Qwen3-VL with features of two depths; all layouts have the same names.

    At most 48 embeddings an image.
    """
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokenizer = new_tokenizer(last=QWEN_TOKENS)
    own = {
        "model_type": "qwen3_vl",
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": TEXT_SIZES["hidden_size"],
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [2, 0],
        "hidden_act": "gelu_pytorch_tanh",
        "in_channels": 3,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        **(vision or {}),
    }
    text_config = {
        "model_type": "qwen3_vl_text",
        "vocab_size": VOCAB_SIZE,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000.0,
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": [4, 2, 2],
            "rope_type": "default",
        },
        "head_dim": 16,
        "hidden_act": "silu",
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "tie_word_embeddings": True,
        **TEXT_SIZES,
        **(text or {}),
    }
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
        "text_config": text_config,
        "vision_config": own,
        **top,
    }
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**class_arguments(config)))
    template = qwen2_vl.FAMILIES[0].chat_template()
    neighbours = {
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "processor_class": "Qwen3VLProcessor",
            "size": {"shortest_edge": 64 * 64, "longest_edge": max_pixels},
            "patch_size": 16,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
        "chat_template.json": {"chat_template": template},
        "generation_config.json": {
            "eos_token_id": [text_config["eos_token_id"], text_config["bos_token_id"]],
            "pad_token_id": text_config["bos_token_id"],
        },
    }
    write_tokenizer(folder, tokenizer, eos="<|im_end|>", pad="<|endoftext|>", template=template)
    write_model(folder, model, config, layout, seed, sharded, Names(), neighbours)
    return folder
