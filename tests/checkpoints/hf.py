"""Models without a family of their own: they run through the code of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.checkpoints.common import (
    CHATML,
    QWEN_TOKENS,
    TEXT_SIZES,
    VOCAB_SIZE,
    enliven,
    new_tokenizer,
    write_json,
    write_tokenizer,
)

TEXT_EXTRAS: dict[str, dict[str, Any]] = {
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 24,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 5.0,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granite": {
        "embedding_multiplier": 2.0,
        "logits_scaling": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
    },
    "olmo2": {},
    "stablelm": {"partial_rotary_factor": 0.25, "use_qkv_bias": True},
    "cohere": {"logit_scale": 0.25},
    "gpt2": {},
    "gpt_oss": {
        "head_dim": 16,
        "num_local_experts": 4,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mamba": {},
    "gemma3_text": {"head_dim": 16, "sliding_window": 24, "tie_word_embeddings": False},
    "diffllama": {},
    "codegen": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global"], 2]]},
    "deepseek_v3": {
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
}


def make_hf_text(family: str, folder: Path, seed: int = 0, **values: Any) -> Path:
    """A text model of this ``model_type``. ``values``: of config.json."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = new_tokenizer(first=("<unk>", "<s>", "</s>"), last=QWEN_TOKENS[:3])
    ids = {
        "bos_token_id": tokenizer.token_to_id("<s>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
    }
    sizes = {"vocab_size": VOCAB_SIZE, **TEXT_SIZES, **ids, **TEXT_EXTRAS[family], **values}
    if family in ("gpt2", "codegen", "gpt_neo"):
        del sizes["num_key_value_heads"], sizes["intermediate_size"]
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, **sizes), dtype=torch.float32
    )
    write_tokenizer(
        folder, tokenizer, bos="<s>", eos="<|im_end|>", pad="<|endoftext|>", template=CHATML
    )
    save(folder, model, seed)
    write_json(folder / "generation_config.json", ids)
    return folder


def save(folder: Path, model: Any, seed: int) -> None:
    """Fill a model with lively weights and write it as transformers does."""
    enliven(model, seed)
    model.save_pretrained(folder)


MEDIA_TOKENS: dict[str, tuple[str, ...]] = {
    "idefics3": (
        *("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"),
        *(f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)),
    ),
    "internvl": ("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
    "gemma3": (
        *("<start_of_image>", "<end_of_image>", "<image_soft_token>"),
        *("\n\n", "\n\n\n", "\n\n\n\n"),
    ),
    "paligemma": ("<image>",),
    "llava_next": ("<image>",),
    "mistral3": ("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
    "glm4v": ("<|begin_of_image|>", "<|image|>", "<|end_of_image|>", "<|video|>"),
    "qwen2_audio": ("<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"),
    "voxtral": ("[BEGIN_AUDIO]", "[AUDIO]", "[INST]", "[/INST]", "[TRANSCRIBE]"),
}
FILL_TOKENS = {
    "idefics3": "<image>",
    "internvl": "<IMG_CONTEXT>",
    "gemma3": "<image_soft_token>",
    "paligemma": "<image>",
    "glm4v": "<|image|>",
    "llava_next": "<image>",
    "mistral3": "[IMG]",
    "qwen2_audio": "<|AUDIO|>",
    "voxtral": "[AUDIO]",
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 14,
}
EAR = {
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "d_model": 16,
    "num_mel_bins": 16,
    "max_source_positions": 1500,
}
GRIDS = [[56, 112], [112, 56], [112, 112]]
CONFIGS: dict[str, dict[str, Any]] = {
    "llava_next": {
        "image_grid_pinpoints": GRIDS,
        "vision_feature_layer": -1,
        "text_config": {"model_type": "llama"},
        "vision_config": {"model_type": "clip_vision_model", **TOWER, "image_size": 56},
    },
    "mistral3": {
        "spatial_merge_size": 2,
        "text_config": {"model_type": "mistral"},
        "vision_config": {
            "model_type": "pixtral",
            **TOWER,
            "image_size": 112,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "glm4v": {
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "glm4v_text",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "mrope_section": [1, 1, 2],
            },
        },
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "out_hidden_size": 64,
            "intermediate_size": 48,
        },
    },
    "gemma3": {
        "mm_tokens_per_image": 4,
        "tie_word_embeddings": False,
        "text_config": {
            "tie_word_embeddings": False,
            "model_type": "gemma3_text",
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "vision_config": {"model_type": "siglip_vision_model", **TOWER, "image_size": 56},
    },
    "internvl": {
        "image_seq_length": 4,
        "text_config": {"model_type": "qwen2"},
        "vision_config": {**TOWER, "image_size": [56, 56], "patch_size": [14, 14]},
    },
    "paligemma": {
        "projection_dim": 64,
        "tie_word_embeddings": False,
        "text_config": {"model_type": "gemma", "head_dim": 16, "tie_word_embeddings": False},
        "vision_config": {"model_type": "siglip_vision_model", **TOWER, "image_size": 56},
    },
    "qwen2_audio": {"text_config": {"model_type": "qwen2"}, "audio_config": EAR},
    "voxtral": {
        "text_config": {
            "model_type": "llama",
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        "audio_config": {
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
            "hidden_size": 16,
            "num_mel_bins": 16,
            "max_source_positions": 1500,
        },
    },
    "idefics3": {
        "scale_factor": 2,
        "text_config": {"model_type": "llama"},
        "vision_config": {**TOWER, "image_size": 56},
    },
}
WHISPER = {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": 16}
PREPROCESSORS: dict[str, dict[str, Any]] = {
    "llava_next": {
        "image_processor_type": "LlavaNextImageProcessor",
        "size": {"shortest_edge": 56},
        "crop_size": {"height": 56, "width": 56},
        "image_grid_pinpoints": GRIDS,
    },
    "mistral3": {
        "image_processor_type": "PixtralImageProcessor",
        "size": {"longest_edge": 112},
        "patch_size": 28,
    },
    "glm4v": {
        "image_processor_type": "Glm4vImageProcessor",
        "size": {"shortest_edge": 784, "longest_edge": 9408},
        "patch_size": 14,
        "merge_size": 2,
    },
    "gemma3": {
        "image_processor_type": "Gemma3ImageProcessor",
        "size": {"height": 56, "width": 56},
        "image_seq_length": 4,
    },
    "internvl": {
        "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": True,
        "size": {"height": 56, "width": 56},
        "min_patches": 1,
        "max_patches": 4,
    },
    "paligemma": {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": 56, "width": 56},
        "image_seq_length": 16,
    },
    "qwen2_audio": WHISPER,
    "voxtral": WHISPER,
    "idefics3": {
        "image_processor_type": "Idefics3ImageProcessor",
        "do_image_splitting": True,
        "size": {"longest_edge": 112},
        "max_image_size": {"longest_edge": 56},
    },
}
PROCESSORS: dict[str, dict[str, Any]] = {
    "llava_next": {
        "processor_class": "LlavaNextProcessor",
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    },
    "mistral3": {
        "processor_class": "PixtralProcessor",
        "patch_size": 14,
        "spatial_merge_size": 2,
    },
    "glm4v": {"processor_class": "Glm4vProcessor"},
    "gemma3": {"processor_class": "Gemma3Processor", "image_seq_length": 4},
    "internvl": {"processor_class": "InternVLProcessor", "image_seq_length": 4},
    "paligemma": {"processor_class": "PaliGemmaProcessor"},
    "qwen2_audio": {"processor_class": "Qwen2AudioProcessor"},
    "voxtral": {"processor_class": "VoxtralProcessor"},
    "idefics3": {"processor_class": "Idefics3Processor", "image_seq_len": 4},
}
EXTRA_TOKENS: dict[str, dict[str, str]] = {
    "gemma3": {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    },
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
}
"""Further tokens that a tokenizer has names for."""


def make_hf(family: str, folder: Path, seed: int = 0) -> Path:
    """A model of this ``model_type`` that takes images or sounds."""
    import transformers

    tokenizer = new_tokenizer(first=("<unk>", "<s>", "</s>"), last=MEDIA_TOKENS[family], bos="<s>")
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    values = dict(CONFIGS[family])
    values["text_config"] = {"vocab_size": VOCAB_SIZE, **TEXT_SIZES, **ids, **values["text_config"]}
    modality = "audio" if "audio_config" in values else "image"
    values[f"{modality}_token_id"] = tokenizer.token_to_id(FILL_TOKENS[family])
    config = transformers.AutoConfig.for_model(family, **values)
    model = transformers.AutoModelForMultimodalLM.from_config(config, dtype=torch.float32)
    write_tokenizer(folder, tokenizer, bos="<s>", eos="</s>", pad="<unk>", unk="<unk>")
    path = folder / "tokenizer_config.json"
    extra = EXTRA_TOKENS.get(family, {})
    write_json(path, json.loads(path.read_text()) | {"extra_special_tokens": extra})
    save(folder, model, seed)
    write_json(folder / "preprocessor_config.json", PREPROCESSORS[family])
    write_json(folder / "processor_config.json", PROCESSORS[family])
    write_json(folder / "generation_config.json", ids)
    return folder
