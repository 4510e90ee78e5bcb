"""Phi-3.5-Vision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sensorium.models.families import phi3_v
from tests.checkpoints.common import (
    CLIP_MEAN,
    CLIP_STD,
    TEXT_SIZES,
    VOCAB_SIZE,
    Names,
    new_tokenizer,
    write_model,
    write_tokenizer,
)

PHI3_V_NAMES = Names(
    constants=(
        "model.vision_embed_tokens.img_processor.vision_model.embeddings.position_ids",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
    ),
)
PHI_TOKENS = (
    *("<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>", "<|image|>"),
)
SHORT_FACTORS = [1.05, 1.1, 1.3, 1.5, 2.0, 2.5, 4.0, 6.0]
LONG_FACTORS = [1.1, 1.3, 2.0, 4.0, 9.0, 15.0, 30.0, 60.0]


def make_phi3_v(
    folder: Path,
    layout: str = "hub",
    dtype: str = "float32",
    seed: int = 0,
    sharded: bool = False,
    vision: Mapping[str, Any] | None = None,
    **top: Any,
) -> Path:
    """Phi-3.5-Vision with tiles of 56 x 56 pixels, 2 x 2 embeddings each.

    ``layout``: ``hub`` with the second name of the table of embeddings, ``resaved`` without it.
    ``vision``: values of ``img_processor.vision_config``; ``top``: values of config.json.
    """
    from tests.models.plain_phi3_v import published_module

    tokenizer = new_tokenizer(first=("<unk>", "<s>", "</s>"), last=PHI_TOKENS, bos="<s>")
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 56,
        "patch_size": 14,
        **(vision or {}),
    }
    num = (tower["image_size"] // tower["patch_size"] // 2) ** 2
    config = {
        "architectures": ["Phi3VForCausalLM"],
        "model_type": "phi3_v",
        "vocab_size": VOCAB_SIZE,
        "rms_norm_eps": 1e-5,
        **TEXT_SIZES,
        "original_max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "su",
            "short_factor": SHORT_FACTORS,
            "long_factor": LONG_FACTORS,
        },
        "sliding_window": 262144,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "image_token_id": tokenizer.token_to_id("<|image|>"),
        "embd_layer": {
            "embedding_cls": "image",
            "hd_transform_order": "sub_glb",
            "projection_cls": "mlp",
            "use_hd_transform": True,
            "with_learnable_separator": True,
        },
        "img_processor": {
            "image_dim_out": tower["hidden_size"],
            "model_name": "openai/clip-vit-large-patch14-336",
            "name": "clip_vision_model",
            "num_img_tokens": num,
            "vision_config": tower,
        },
        **top,
    }
    model = published_module(config)
    if layout == "hub":
        model.model.vision_embed_tokens.wte = model.model.embed_tokens
    neighbours = {
        "preprocessor_config.json": {
            "image_processor_type": "Phi3VImageProcessor",
            "processor_class": "Phi3VProcessor",
            "do_convert_rgb": True,
            "image_mean": CLIP_MEAN,
            "image_std": CLIP_STD,
            "num_crops": 4,
            "num_img_tokens": num,
        },
        "generation_config.json": {
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": config["pad_token_id"],
        },
    }
    write_tokenizer(
        folder,
        tokenizer,
        template=phi3_v.FAMILIES[0].chat_template(),
        bos="<s>",
        eos="<|endoftext|>",
        pad="<|endoftext|>",
        unk="<unk>",
    )
    write_model(folder, model, config, layout, seed, sharded, PHI3_V_NAMES, neighbours)
    return folder
