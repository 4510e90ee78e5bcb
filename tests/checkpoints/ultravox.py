"""Ultravox, with its backbones inside its file or in folders beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints.common import enliven, new_tokenizer, write_json, write_tokenizer
from tests.checkpoints.text import make_text

LLAMA_3 = ("<|begin_of_text|>", "<|end_of_text|>")
LLAMA_3_TURNS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LAYOUTS = ("hub", "embedded", "ids")
AUDIO_SIZES = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "max_source_positions": 100,
    "max_target_positions": 16,
    "vocab_size": 64,
}
"""An encoder that takes two seconds at once, in place of thirty."""


def make_ultravox(
    folder: Path,
    layout: str = "hub",
    dtype: str = "float32",
    seed: int = 0,
    newer: bool = True,
    text_family: str = "llama",
    tower: str = "audio_tower.",
    audio: Mapping[str, Any] | None = None,
    **top: Any,
) -> Path:
    """Ultravox: from v0.5 on if ``newer``, else v0.3.

    ``audio``, ``top``: values of the configurations.

    ``hub``: the encoder in the file and the text backbone named, as v0.5 is published;
    ``embedded``: all in the file, as v0.3 (8B); ``ids``: both backbones named, as v0.3 (1B) and
    v0.4. The folders ``text`` and ``whisper`` hold the whole backbones in each case. ``tower``:
    what the encoder's names begin with in the file.
    """
    text = json.loads(
        (
            make_text(text_family, folder / "text", dtype=dtype, seed=seed) / "config.json"
        ).read_text()
    )
    whisper = make_whisper(
        folder / "whisper", dtype, seed, num_mel_bins=128 if newer else 80, **(audio or {})
    )
    tokenizer = new_tokenizer(first=LLAMA_3, last=LLAMA_3_TURNS, bos=LLAMA_3[0])
    eos = tokenizer.token_to_id("<|eot_id|>")
    config = {
        "architectures": ["UltravoxModel"],
        "model_type": "ultravox",
        "hidden_size": 48,
        "stack_factor": 8,
        "norm_init": 0.4,
        "projector_act": "swiglu",
        "ignore_index": -100,
        "audio_token_index": 32000,
        "vocab_size": text["vocab_size"],
        "torch_dtype": dtype,
        "text_model_lora_config": {"r": 0, "lora_alpha": 8},
        "audio_model_id": None,
        "text_model_id": None,
        **({"projector_ln_mid": True, "audio_latency_block_size": None} if newer else {}),
        **top,
    }
    tensors = projector(config, whisper["d_model"], text["hidden_size"], seed)
    if layout == "embedded":
        config["text_config"] = text
        own = load_file(folder / "text" / "model.safetensors").items()
        tensors |= {
            f"language_model.{name}": value for name, value in own if value.is_floating_point()
        }
    else:
        config["text_model_id"] = "text"
    if layout == "ids":
        config["audio_model_id"] = "whisper"
    else:
        config["audio_config"] = whisper
        own = load_file(folder / "whisper" / "model.safetensors").items()
        encoder = "model.encoder."
        tensors |= {
            name.replace(encoder, tower, 1): value
            for name, value in own
            if name.startswith(encoder)
        }
    write_tokenizer(folder, tokenizer, bos=LLAMA_3[0], eos="<|eot_id|>", pad="<|eot_id|>")
    listed = {str(eos): {"content": "<|eot_id|>", "special": True}}
    file = folder / "tokenizer_config.json"
    write_json(file, json.loads(file.read_text()) | {"added_tokens_decoder": listed})
    ends = [tokenizer.token_to_id(LLAMA_3[1]), eos]
    write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": ends})
    write_json(folder / "config.json", config)
    weights = {name: value.to(getattr(torch, dtype)) for name, value in tensors.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def make_whisper(folder: Path, dtype: str, seed: int, **sizes: Any) -> dict[str, Any]:
    """A whole Whisper, as openai publishes it; its configuration."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    values = {**AUDIO_SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **sizes}
    model = WhisperForConditionalGeneration(
        WhisperConfig(**values, decoder_start_token_id=1, suppress_tokens=None)
    )
    enliven(model, seed + 1)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: value.detach().to(getattr(torch, dtype)).clone()
        for name, value in model.state_dict().items()
        if name != "proj_out.weight"
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "activation_function": "gelu",
        "torch_dtype": dtype,
        **values,
    }
    write_json(folder / "config.json", config)
    preprocessor = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": config["num_mel_bins"],
        "sampling_rate": 16000,
        "hop_length": 160,
        "n_fft": 400,
        "chunk_length": 30,
    }
    write_json(folder / "preprocessor_config.json", preprocessor)
    return config


def projector(
    config: Mapping[str, Any], audio_size: int, text_size: int, seed: int
) -> dict[str, torch.Tensor]:
    """Random weights of the projector under their published names."""
    generator = torch.Generator().manual_seed(seed + 2)
    stacked, inner = audio_size * config["stack_factor"], config["hidden_size"]
    middle = inner // 2 if config["projector_act"] == "swiglu" else inner
    newer = config.get("projector_ln_mid", False)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    norm = ("ln_mid", middle) if newer else ("ln_post", text_size)
    shapes = {"linear_1": (inner, stacked), "linear_2": (text_size, middle)}
    found = {f"{name}.weight": 1.5 * normal(*s) / math.sqrt(s[1]) for name, s in shapes.items()}
    for name, size in (("ln_pre", stacked), norm):
        found[f"{name}.weight"] = 0.4 + 0.05 * normal(size)
    return {f"multi_modal_projector.{name}": value for name, value in found.items()}
