"""MiniCPM-V 2.6."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

from tests.checkpoints.common import (
    CHATML,
    TEXT_SIZES,
    VOCAB_SIZE,
    Names,
    new_tokenizer,
    write_model,
    write_tokenizer,
)

TOKENS = (
    *("<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "</image>"),
    *("<slice>", "</slice>", "<image_id>", "</image_id>"),
)


def make_minicpmv(
    folder: Path,
    dtype: str = "float32",
    seed: int = 0,
    sharded: bool = False,
    vision: Mapping[str, Any] | None = None,
    preprocessor: Mapping[str, Any] | None = None,
    template: str | None = CHATML,
    **top: Any,
) -> Path:
    """MiniCPM-V 2.6: 5 embeddings a view of about 56 x 56 pixels, images in at most 4 slices.

    There is one layout only, and no class of ``transformers``. ``vision``, ``preprocessor``,
    ``top``: values of the files; ``template``: None for a tokenizer without one.
    """
    from tests.models.plain_minicpmv import PlainMiniCPMV

    tokenizer = new_tokenizer(last=TOKENS)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, tokenizer.pre_tokenizer])
    config = {
        "architectures": ["MiniCPMV"],
        "model_type": "minicpmv",
        "version": 2.6,
        "auto_map": {"AutoModel": "modeling_minicpmv.MiniCPMV"},
        "vocab_size": VOCAB_SIZE,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "use_sliding_window": False,
        "max_window_layers": 2,
        "hidden_act": "silu",
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        **TEXT_SIZES,
        "hidden_size": 256,
        "batch_vision_input": True,
        "drop_vision_last_layer": False,
        "image_size": 56,
        "patch_size": 14,
        "query_num": 5,
        "slice_mode": True,
        "vision_batch_size": 16,
        "slice_config": {"max_slice_nums": 4, "patch_size": 14, "scale_resolution": 56},
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": 140,
            "patch_size": 14,
            **(vision or {}),
        },
        **top,
    }
    neighbours = {
        "preprocessor_config.json": {
            "image_processor_type": "MiniCPMVImageProcessor",
            "max_slice_nums": 4,
            "scale_resolution": 56,
            "patch_size": 14,
            "use_image_id": True,
            "image_feature_size": config["query_num"],
            "im_start": "<image>",
            "im_end": "</image>",
            "slice_start": "<slice>",
            "slice_end": "</slice>",
            "unk": "<unk>",
            "im_id_start": "<image_id>",
            "im_id_end": "</image_id>",
            "slice_mode": True,
            "norm_mean": [0.5, 0.5, 0.5],
            "norm_std": [0.5, 0.5, 0.5],
            "version": 2.6,
            **(preprocessor or {}),
        },
        "generation_config.json": {
            "bos_token_id": config["bos_token_id"],
            "eos_token_id": config["eos_token_id"],
            "pad_token_id": 0,
        },
    }
    named = {"eos": "<|im_end|>", "pad": "<|endoftext|>", "unk": "<unk>"}
    write_tokenizer(folder, tokenizer, template=template, **named)
    write_model(folder, PlainMiniCPMV(config), config, "hub", seed, sharded, Names(), neighbours)
    return folder
