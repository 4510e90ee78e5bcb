"""Text embedding models: a decoder without a language-model head, and the files of the
sentence-transformers layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.checkpoints.common import (
    QWEN_TOKENS,
    TEXT_SIZES,
    VOCAB_SIZE,
    Names,
    class_arguments,
    new_tokenizer,
    write_json,
    write_model,
    write_tokenizer,
)


def make_embedder(
    family: str,
    folder: Path,
    *,
    steps: tuple[str, ...] | None = ("Transformer", "Pooling", "Normalize"),
    pooling: str = "lasttoken",
    dtype: str = "float32",
    seed: int = 0,
    **values: Any,
) -> Path:
    """``llama``, ``qwen2``, ``qwen3`` or ``mistral``, as ``LlamaModel`` and so on.

    ``steps``: those of modules.json, None for a folder without; ``values``: of config.json.
    """
    from transformers import AutoConfig, AutoModel

    tokenizer = new_tokenizer(first=("<unk>", "<s>", "</s>"), last=QWEN_TOKENS[:3], bos="<s>")
    config = {
        "architectures": [f"{family.capitalize()}Model"],
        "model_type": family,
        "vocab_size": VOCAB_SIZE,
        "rms_norm_eps": 1e-6,
        "torch_dtype": dtype,
        "sliding_window": None,
        **({"use_sliding_window": False} if family.startswith("qwen") else {}),
        **({"head_dim": 24} if family == "qwen3" else {}),
        **TEXT_SIZES,
        **values,
    }
    arguments = class_arguments(config)
    known = AutoConfig.for_model(arguments.pop("model_type"), **arguments)
    model = AutoModel.from_config(known, dtype=torch.float32)
    write_tokenizer(folder, tokenizer, bos="<s>", eos="</s>", pad="<|endoftext|>")
    write_model(folder, model, config, "hub", seed, False, Names(), {})
    if steps is not None:
        write_modules(folder, steps, pooling)
    return folder


def write_modules(folder: Path, steps: tuple[str, ...], pooling: str) -> None:
    """modules.json and the settings of its pooling."""
    modules = [
        {
            "idx": index,
            "name": str(index),
            "path": "" if index == 0 else f"{index}_{step}",
            "type": f"sentence_transformers.models.{step}",
        }
        for index, step in enumerate(steps)
    ]
    write_json(folder / "modules.json", modules)
    settings = {
        f"pooling_mode_{mode}": mode == pooling
        for mode in ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
    }
    (folder / "1_Pooling").mkdir(exist_ok=True)
    word_size = {"word_embedding_dimension": TEXT_SIZES["hidden_size"]}
    write_json(folder / "1_Pooling" / "config.json", word_size | settings)
