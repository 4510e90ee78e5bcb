"""LLaVA-OneVision."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sensorium.models.families import llava_onevision
from tests.checkpoints.common import (
    TEXT_SIZES,
    VOCAB_SIZE,
    class_arguments,
    new_tokenizer,
    write_model,
    write_tokenizer,
)
from tests.checkpoints.llava import LLAVA_NAMES

NAMES = replace(LLAVA_NAMES, constants=("vision_tower.vision_model.embeddings.position_ids",))
TILE = 44
EDGES = (TILE, 2 * TILE, 3 * TILE, 4 * TILE)
OLDER_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% for kind in ['image', 'video'] %}{% for part in message.content if part.type == kind %}"
    "{{ '<' + kind + '>\n' }}{% endfor %}{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""What the first revision of the published template gives."""


def make_llava_onevision(
    folder: Path,
    layout: str = "hub",
    dtype: str = "float32",
    seed: int = 0,
    sharded: bool = False,
    vision: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
    template: str | None = None,
    **top: Any,
) -> Path:
    """LLaVA-OneVision: tiles of 44 pixels are 9 embeddings, frames 4.

    Past 4 tiles' worth images are scaled down.

    ``vision``, ``text``, ``top``: values of config.json. The decoder alone says that the head is
    tied.
    """
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    tokens = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
    tokenizer = new_tokenizer(last=tokens)
    vision_config = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": TILE,
        "patch_size": 14,
        "vision_use_head": False,
        **(vision or {}),
    }
    text_config = {
        "model_type": "qwen2",
        "vocab_size": VOCAB_SIZE,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        **TEXT_SIZES,
        **(text or {}),
    }
    pinpoints = [[height, width] for height in EDGES for width in EDGES]
    config = {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "model_type": "llava_onevision",
        "ignore_index": -100,
        "image_grid_pinpoints": pinpoints,
        "image_token_index": tokenizer.token_to_id("<image>"),
        "video_token_index": tokenizer.token_to_id("<video>"),
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_image_newline_parameter": True,
        "vision_aspect_ratio": "anyres_max_4",
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "text_config": text_config,
        "vision_config": vision_config,
        **top,
    }
    model = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(**class_arguments(config)))
    size = vision_config["image_size"]
    neighbours = {
        "preprocessor_config.json": {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "processor_class": "LlavaOnevisionProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "do_pad": True,
            "size": {"height": size, "width": size},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "image_grid_pinpoints": model.config.image_grid_pinpoints,
            "resample": 3,
        },
        "processor_config.json": {
            "processor_class": "LlavaOnevisionProcessor",
            "image_token": "<image>",
            "video_token": "<video>",
            "num_image_tokens": (size // vision_config["patch_size"]) ** 2,
            "vision_feature_select_strategy": "full",
        },
        "chat_template.json": {
            "chat_template": template or llava_onevision.FAMILIES[0].chat_template()
        },
        "generation_config.json": {
            "bos_token_id": text_config["bos_token_id"],
            "eos_token_id": text_config["eos_token_id"],
            "pad_token_id": text_config["bos_token_id"],
        },
    }
    write_tokenizer(folder, tokenizer, eos="<|im_end|>", pad="<|endoftext|>")
    if layout == "t5":  # these files leave out a head that is tied
        config["tie_word_embeddings"] = text_config["tie_word_embeddings"]
    write_model(folder, model, config, layout, seed, sharded, NAMES, neighbours)
    return folder
