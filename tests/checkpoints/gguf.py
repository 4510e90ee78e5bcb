"""Checkpoints of a folder written as GGUF files, as the scripts of llama.cpp convert them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from safetensors.torch import load_file, save_file

QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
"""Kinds that the package writes; those that it only reads get random blocks."""
K_KINDS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
PLAIN = {"F32": np.float32, "F16": np.float16}
_HALVES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
"""Where a block has numbers of float16."""
_RANGES = {"Q3_K": 100, "Q4_K": 900, "Q5_K": 1900, "Q6_K": 3000, "Q2_K": 40, "IQ4_NL": 100}

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3", "qwen2_vl": "qwen2vl"}
_LANGUAGE = (("language_model.", ""), ("model.text_model.", "model."))
"""Beginnings of the names of a language model's weights inside larger models."""


def blocks(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Random blocks of a kind whose numbers are about as large as weights are."""
    size, num_bytes = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    rows = (*shape[:-1], shape[-1] // size)
    raw = rng.integers(0, 256, (*rows, num_bytes), dtype=np.uint8)
    for place in _HALVES[kind]:
        numbers = rng.uniform(0.5, 1.5, (*rows, 1)) * 0.2 / _RANGES.get(kind, 3000)
        raw[..., place : place + 2] = numbers.astype(np.float16).view(np.uint8)
    return raw.reshape(*shape[:-1], -1)


def write_gguf(
    folder: Path,
    path: Path,
    kind: str = "F32",
    seed: int = 0,
    norms: str = "F32",
    others: Mapping[str, str] | None = None,
    pieces: bool = False,
    without: Collection[str] = (),
    per_part: int = 0,
    general: Mapping[str, Any] | None = None,
    **metadata: Any,
) -> dict[str, torch.Tensor]:
    """Write the checkpoint of a folder, or its language model, as a GGUF file of ``kind``.

    ``norms``: the kind of what has one dimension. ``others``: those of some matrices, by a part of
    their names. ``pieces``: with a SentencePiece vocabulary in place of the checkpoint's.
    ``without``: tokens that the vocabulary lacks. ``per_part``: tensors of each part of a file in
    several, which are named after ``path``. ``metadata``: further values under the architecture's
    name, ``general``: under that. Returns the weights as the file has them, in float32, by the names of the folder.
    """
    config = json.loads((folder / "config.json").read_text())
    config |= config.get("text_config", {})
    family = config["model_type"]
    architecture = _ARCHITECTURES.get(family, family)
    writer = GGUFWriter(path, architecture, split_max_tensors=per_part)
    _write_config(writer, config, metadata, general or {})
    if pieces:
        _write_pieces(writer, config["vocab_size"])
    else:
        _write_tokenizer(writer, folder, config, without)
    rng = np.random.default_rng(seed)
    written: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        stored = stored_name(language_name(name), family)
        if stored is None:
            continue
        value, is_norm = weight.float(), name.endswith("norm.weight")
        heads = heads_of(stored, config) if architecture == "llama" else None
        if heads is not None:
            value = permuted(value, heads)
        if is_norm and family.startswith("gemma"):
            value = value + 1
        own = next((k for part, k in (others or {}).items() if part in stored), kind)
        found = add_tensor(writer, stored, value.numpy(), own if value.dim() > 1 else norms, rng)
        if is_norm and family.startswith("gemma"):
            found = found - 1
        written[name] = found if heads is None else unpermuted(found, heads)
    scaling = config.get("rope_scaling") or {}
    if "mrope_section" in scaling and "rope__dimension_sections" not in metadata:
        writer.add_rope_dimension_sections([*scaling["mrope_section"], 0])
    if scaling.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config, scaling))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def as_folder(source: Path, folder: Path, weights: Mapping[str, torch.Tensor]) -> Path:
    """Write a checkpoint with other weights beside the files of ``source``."""
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    contiguous = {name: value.contiguous() for name, value in weights.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def language_name(name: str) -> str:
    """The name that a weight of the language model of a larger model has by itself."""
    for old, new in _LANGUAGE:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def stored_name(name: str, family: str) -> str | None:
    """The name of a weight in a GGUF file; None for a constant."""
    stem, _, end = name.rpartition(".")
    if stem in _OUTSIDE:
        return f"{_OUTSIDE[stem]}.{end}"
    if not stem.startswith("model.layers.") or end == "inv_freq":  # a tower has a file of its own
        return None
    _, _, layer, own = stem.split(".", 3)
    names = _LAYER | (_GEMMA if family in ("gemma2", "gemma3_text") else {})
    return f"blk.{layer}.{names[own]}.{end}"


def heads_of(stored: str, config: Mapping[str, Any]) -> int | None:
    """The heads of a projection whose rows a conversion of Llama permutes."""
    if ".attn_q." in stored:
        return int(config["num_attention_heads"])
    return int(config["num_key_value_heads"]) if ".attn_k." in stored else None


def permuted(value: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of Q or K with the two halves of each head interleaved."""
    halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
    return halves.transpose(1, 2).reshape(value.shape)


def unpermuted(value: torch.Tensor, heads: int) -> torch.Tensor:
    pairs = value.reshape(heads, value.shape[0] // heads // 2, 2, *value.shape[1:])
    return pairs.transpose(1, 2).reshape(value.shape)


def theta_of(config: Mapping[str, Any]) -> float:
    """The base of rotary frequencies, of layers without a window where there are two."""
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention", rope)
    return float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)


def llama3_factors(config: Mapping[str, Any], scaling: Mapping[str, Any]) -> np.ndarray:
    """What each rotary frequency is divided by: 1 for high ones, the factor for low ones."""
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    waves = 2 * np.pi * theta_of(config) ** (np.arange(0, dim, 2) / dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = scaling["original_max_position_embeddings"] / waves
    smooth = np.clip((share - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / scaling["factor"] + smooth)).astype(np.float32)


def add_tensor(
    writer: GGUFWriter, name: str, value: np.ndarray, kind: str, rng: np.random.Generator
) -> torch.Tensor:
    """Add a tensor, and return its numbers."""
    own = GGMLQuantizationType[kind]
    if kind in PLAIN:
        stored = value.astype(PLAIN[kind])
        writer.add_tensor(name, stored)
        return torch.from_numpy(stored.astype(np.float32))
    if kind == "BF16":
        raw = torch.from_numpy(value).bfloat16().contiguous()
        writer.add_tensor(name, raw.view(torch.uint8).numpy(), raw_dtype=own)
        return raw.float()
    raw = gguf.quants.quantize(value, own) if kind in QUANTIZED else blocks(kind, value.shape, rng)
    writer.add_tensor(name, raw, raw_dtype=own)
    return torch.from_numpy(gguf.quants.dequantize(raw, own).reshape(value.shape).copy())


def _write_config(
    writer: GGUFWriter,
    config: Mapping[str, Any],
    metadata: Mapping[str, Any],
    general: Mapping[str, Any],
) -> None:
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(theta_of(config))
    writer.add_rope_dimension_count(head_dim)
    if "head_dim" in config:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    own = {f"{writer.arch}.{name.replace('__', '.')}": metadata[name] for name in metadata}
    for key, value in (own | {f"general.{name}": general[name] for name in general}).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
            add(key, value)


def _write_tokenizer(
    writer: GGUFWriter, folder: Path, config: Mapping[str, Any], without: Collection[str]
) -> None:
    whole = json.loads((folder / "tokenizer.json").read_text())
    tokens: dict[int, str] = {place: token for token, place in whole["model"]["vocab"].items()}
    added = {
        token["id"]: token for token in whole["added_tokens"] if token["content"] not in without
    }
    tokens |= {place: token["content"] for place, token in added.items()}
    texts = [tokens.get(place, f"[PAD{place}]") for place in range(config["vocab_size"])]
    types = [
        TokenType.UNUSED if place not in tokens else TokenType.NORMAL for place in range(len(texts))
    ]
    for place, token in added.items():
        types[place] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in whole["model"]["merges"]])
    around = whole["post_processor"] or {}
    ids = {key: config.get(f"{key}_token_id") for key in ("bos", "eos", "pad")}
    if around.get("type") == "TemplateProcessing":
        writer.add_add_bos_token(True)
        (ids["bos"],) = next(iter(around["special_tokens"].values()))["ids"]
    for key, place in ids.items():
        if place is not None:
            getattr(writer, f"add_{key}_token_id")(place)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    if "chat_template" in settings:
        writer.add_chat_template(settings["chat_template"])


def _write_pieces(writer: GGUFWriter, size: int) -> None:
    """Special tokens, bytes, runs of spaces, letters and pairs of them, the likely ones first."""
    letters = ["\u2581", *"etaonisrhldu"]
    special, runs = ["<unk>", "<s>", "</s>", "<end_of_turn>"], ["  ", "   "]
    octets = [f"<0x{byte:02X}>" for byte in range(256)]
    pairs = [first + second for first in letters for second in letters]
    texts = [*special, *octets, *runs, *letters, *pairs][:size]
    types = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 3, *[TokenType.BYTE] * 256]
    types += [TokenType.USER_DEFINED] * len(runs)
    types += [TokenType.NORMAL] * (len(texts) - len(types))
    padding = range(len(texts), size)
    texts += [f"[PAD{place}]" for place in padding]
    types += [TokenType.UNUSED] * len(padding)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores([float(-place) for place in range(size)])
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
