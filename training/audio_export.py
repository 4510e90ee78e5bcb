"""Write the trained model for sounds as an Ultravox checkpoint in the published layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.audio_model import STACK, AudioShape
from training.export import write_json
from training.hearing import AUDIO, lexicon
from training.tokenizer import save_tokenizer

PARTS = ("audio_tower.", "multi_modal_projector.", "language_model.")


def published_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """bf16 tensors under published names."""
    return {
        name: weight.to(torch.bfloat16).contiguous()
        for name, weight in state.items()
        if name.startswith(PARTS)
    }


def audio_config(shape: AudioShape) -> dict[str, Any]:
    """``audio_config``: a Whisper of which the encoder is used."""
    return {
        "model_type": "whisper",
        "activation_function": "gelu",
        "d_model": shape.audio_width,
        "encoder_attention_heads": shape.audio_heads,
        "encoder_ffn_dim": shape.audio_inner,
        "encoder_layers": shape.audio_layers,
        "num_hidden_layers": shape.audio_layers,
        "max_source_positions": shape.positions,
        "num_mel_bins": shape.mels,
        "scale_embedding": False,
        "torch_dtype": "bfloat16",
    }


def text_config(shape: AudioShape, ids: dict[str, int]) -> dict[str, Any]:
    """``text_config``: a Llama with a tied head."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["pad"],
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "max_position_embeddings": 2048,
        "mlp_bias": False,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocab,
    }


def config_of(shape: AudioShape, ids: dict[str, int]) -> dict[str, Any]:
    """config.json of a model of ``shape``; ``ids`` are those of bos, eos, pad and audio."""
    return {
        "architectures": ["UltravoxModel"],
        "model_type": "ultravox",
        "audio_config": audio_config(shape),
        "audio_model_id": None,
        "text_config": text_config(shape, ids),
        "text_model_id": None,
        "audio_latency_block_size": None,
        "audio_token_index": ids["audio"],
        "hidden_size": shape.projector,
        "ignore_index": -100,
        "initializer_range": 0.02,
        "norm_init": 0.4,
        "pad_token_id": ids["pad"],
        "projector_act": "swiglu",
        "projector_ln_mid": True,
        "stack_factor": STACK,
        "torch_dtype": "bfloat16",
        "vocab_size": shape.vocab,
    }


def export(state: dict[str, Tensor], shape: AudioShape, folder: Path) -> None:
    """Write weights, tokenizer, template and configuration files into ``folder``."""
    from safetensors.torch import save

    folder.mkdir(parents=True, exist_ok=True)
    words = lexicon()
    tokenizer = save_tokenizer(folder, words)
    names = {"bos": words.bos or "", "eos": words.eos, "pad": words.pad, "audio": AUDIO}
    ids = {name: tokenizer.token_to_id(text) for name, text in names.items()}
    write_json(folder / "config.json", config_of(shape, ids))
    write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": ids["bos"],
            "do_sample": False,
            "eos_token_id": [ids["eos"], ids["pad"]],
            "pad_token_id": ids["pad"],
        },
    )
    write_json(
        folder / "preprocessor_config.json",
        {
            "chunk_length": 30,
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": shape.mels,
            "hop_length": 160,
            "n_fft": 400,
            "n_samples": 480000,
            "nb_max_frames": 3000,
            "padding_side": "right",
            "padding_value": 0.0,
            "processor_class": "UltravoxProcessor",
            "return_attention_mask": False,
            "sampling_rate": 16000,
        },
    )
    part = folder / "model.safetensors.part"
    part.write_bytes(save(published_weights(state), metadata={"format": "pt"}))
    part.replace(folder / "model.safetensors")
