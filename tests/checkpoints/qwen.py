"""Qwen2-VL and Qwen2.5-VL."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sensorium.models.families import qwen2_vl
from tests.checkpoints.common import (
    CLIP_MEAN,
    CLIP_STD,
    QWEN_TOKENS,
    TEXT_SIZES,
    VOCAB_SIZE,
    Names,
    class_arguments,
    new_tokenizer,
    write_model,
    write_tokenizer,
)

QWEN2_VL_NAMES = Names(
    hub=(("model.visual.", "visual."), ("model.language_model.", "model.")),
    t5=(("model.visual.", "visual."), ("model.language_model.", "model.")),
)


def make_qwen2_vl(
    folder: Path,
    vision: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Qwen2-VL: at most 48 embeddings an image.

    ``vision``, ``text``, ``options``: values of config.json.
    """
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    own = {
        "model_type": "qwen2_vl",
        "depth": 2,
        "embed_dim": 32,
        "num_heads": 2,
        "hidden_size": (text or {}).get("hidden_size", TEXT_SIZES["hidden_size"]),
        **(vision or {}),
    }
    return make_qwen(
        folder,
        Qwen2VLForConditionalGeneration,
        Qwen2VLConfig,
        "qwen2_vl",
        own,
        text=text,
        **options,
    )


def make_qwen(
    folder: Path,
    model_class: Any,
    config_class: Any,
    model_type: str,
    vision: Mapping[str, Any],
    layout: str = "hub",
    dtype: str = "float32",
    seed: int = 0,
    sharded: bool = False,
    text: Mapping[str, Any] | None = None,
    min_pixels: int = 56 * 56,
    max_pixels: int = 28 * 28 * 48,
    **top: Any,
) -> Path:
    """A checkpoint of the Qwen-VL kind."""
    tokenizer = new_tokenizer(last=QWEN_TOKENS)
    text_config = {
        "vocab_size": VOCAB_SIZE,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "sliding_window": 2048,
        "use_sliding_window": False,
        "max_window_layers": 2,
        "hidden_act": "silu",
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        **TEXT_SIZES,
        **(text or {}),
    }
    config = {
        "architectures": [model_class.__name__],
        "model_type": model_type,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "vision_token_id": tokenizer.token_to_id("<|vision_pad|>"),
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
        **text_config,
        "vision_config": {"in_chans": 3, "spatial_patch_size": 14, **vision},
        **top,
    }
    model = model_class(config_class(**class_arguments(config)))
    neighbours = {
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
            "min_pixels": min_pixels,
            "max_pixels": max_pixels,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
        },
        "chat_template.json": {"chat_template": qwen2_vl.FAMILIES[0].chat_template()},
        "generation_config.json": {
            "bos_token_id": config["bos_token_id"],
            "eos_token_id": [config["eos_token_id"], config["bos_token_id"]],
            "pad_token_id": config["bos_token_id"],
        },
    }
    template = qwen2_vl.FAMILIES[0].chat_template()
    write_tokenizer(folder, tokenizer, eos="<|im_end|>", pad="<|endoftext|>", template=template)
    write_model(folder, model, config, layout, seed, sharded, QWEN2_VL_NAMES, neighbours)
    return folder


def make_qwen2_5_vl(folder: Path, **options: Any) -> Path:
    """Qwen2.5-VL with windows of 2 x 2 merge cells and one block of full attention.

    ``options`` as of Qwen2-VL's.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "model_type": "qwen2_5_vl",
        "depth": 3,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_heads": 2,
        "out_hidden_size": TEXT_SIZES["hidden_size"],
        "window_size": 56,
        "fullatt_block_indexes": [1],
        **(options.pop("vision", None) or {}),
    }
    return make_qwen(
        folder,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLConfig,
        "qwen2_5_vl",
        vision,
        **options,
    )
