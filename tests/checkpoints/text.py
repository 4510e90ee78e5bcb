"""Text models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.checkpoints.common import (
    CHATML,
    QWEN_TOKENS,
    TEXT_SIZES,
    VOCAB_SIZE,
    Names,
    class_arguments,
    new_tokenizer,
    write_model,
    write_tokenizer,
)

TEXT_NAMES = Names(constants=("model.layers.0.self_attn.rotary_emb.inv_freq",))


def make_text(
    family: str,
    folder: Path,
    layout: str = "hub",
    dtype: str = "float32",
    seed: int = 0,
    sharded: bool = False,
    **sizes: Any,
) -> Path:
    """A text model: ``llama``, ``qwen2``, ``qwen3``, ``mistral`` or ``phi3``.

    ``sizes``: values of config.json.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = new_tokenizer(first=("<unk>", "<s>", "</s>"), last=QWEN_TOKENS[:3])
    extras: dict[str, dict[str, Any]] = {
        "llama": {"rope_theta": 500000.0},
        "qwen2": {"use_sliding_window": False, "tie_word_embeddings": True},
        "qwen3": {"use_sliding_window": False, "head_dim": 24},
        "mistral": {"sliding_window": None},
        "phi3": {"sliding_window": None, "original_max_position_embeddings": 2048},
    }
    ids = {
        "bos_token_id": tokenizer.token_to_id("<s>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
    }
    architecture = {"phi3": "Phi3ForCausalLM"}.get(family, f"{family.capitalize()}ForCausalLM")
    config = {
        "architectures": [architecture],
        "model_type": family,
        "vocab_size": VOCAB_SIZE,
        "rms_norm_eps": 1e-6,
        "torch_dtype": dtype,
        "tie_word_embeddings": False,
        **ids,
        **TEXT_SIZES,
        **extras[family],
        **sizes,
    }
    arguments = class_arguments(config)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(arguments.pop("model_type"), **arguments), dtype=torch.float32
    )
    write_tokenizer(
        folder, tokenizer, bos="<s>", eos="<|im_end|>", pad="<|endoftext|>", template=CHATML
    )
    neighbours = {"generation_config.json": ids}
    write_model(folder, model, config, layout, seed, sharded, TEXT_NAMES, neighbours)
    return folder
