"""LLaVA-1.5."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sensorium.models.families import llava
from tests.checkpoints.common import (
    CLIP_MEAN,
    CLIP_STD,
    TEXT_SIZES,
    VOCAB_SIZE,
    Names,
    class_arguments,
    new_tokenizer,
    write_model,
    write_tokenizer,
)

LLAVA_NAMES = Names(
    hub=(
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.", ""),
    ),
    resaved=(("model.vision_tower.", "model.vision_tower.vision_model."),),
    t5=(
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
        ("model.", ""),
    ),
    constants=(
        "vision_tower.vision_model.embeddings.position_ids",
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq",
    ),
)


def make_llava(
    folder: Path,
    layout: str = "hub",
    dtype: str = "float32",
    seed: int = 0,
    sharded: bool = False,
    vision: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    **top: Any,
) -> Path:
    """LLaVA-1.5: an image of 56 x 56 pixels is 16 embeddings.

    ``vision``, ``text``, ``top``: values of config.json.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    tokenizer = new_tokenizer(first=("<unk>", "<s>", "</s>"), last=("<image>", "<pad>"), bos="<s>")
    vision_config = {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
        "projection_dim": 32,
        "vocab_size": 32000,
        **(vision or {}),
    }
    text_config = {
        "model_type": "llama",
        "vocab_size": VOCAB_SIZE,
        "rms_norm_eps": 1e-5,
        **TEXT_SIZES,
        **(text or {}),
    }
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": tokenizer.token_to_id("<image>"),
        "pad_token_id": tokenizer.token_to_id("<pad>"),
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "text_config": text_config,
        "vision_config": vision_config,
        **top,
    }
    model = LlavaForConditionalGeneration(LlavaConfig(**class_arguments(config)))
    size = vision_config["image_size"]
    neighbours = {
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": size},
            "do_center_crop": True,
            "crop_size": {"height": size, "width": size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
            "resample": 3,
        },
        "processor_config.json": {
            "processor_class": "LlavaProcessor",
            "image_token": "<image>",
            "patch_size": vision_config["patch_size"],
            "vision_feature_select_strategy": config["vision_feature_select_strategy"],
            "num_additional_image_tokens": 1,
        },
        "chat_template.json": {"chat_template": llava.FAMILIES[0].chat_template()},
        "generation_config.json": {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    }
    write_tokenizer(folder, tokenizer, bos="<s>", eos="</s>", pad="<pad>", unk="<unk>")
    write_model(folder, model, config, layout, seed, sharded, LLAVA_NAMES, neighbours)
    return folder
