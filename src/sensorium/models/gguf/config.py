"""``config.json`` of a GGUF file, from its metadata and the shapes of its tensors. No torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from sensorium.errors import ConfigError
from sensorium.models.gguf.architectures import Architecture, architecture_of
from sensorium.models.gguf.reader import GgufFile, TensorInfo

MOST = (1 << 31) - 1
"""Largest number of a size or a length."""
_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_IDS = ("bos", "eos", "eot", "eom", "padding", "unknown")
_SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""Names under ``general.sampling``, and those of generation_config.json."""
_GEMMA2_CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
"""Caps of logits in Gemma 2 where a file does not say. Source: llama.cpp."""

ReadTensor = Callable[[TensorInfo], bytes]
"""The bytes of a tensor of a file. Raises ConfigError."""


def config_of(file: GgufFile, read: ReadTensor | None = None) -> dict[str, Any]:
    """Return the configuration of a file's model, as its config.json would have it.

    read: gives the bytes of a tensor where the file is not here. Raises UnsupportedModelError for
    an architecture that is not run, and ConfigError that names the value for one that is missing,
    impossible, or does not fit the tensors.
    """
    kind = architecture_of(file)
    embedding = _tensor(file, "token_embd.weight")
    hidden_size, num_heads = count(file, "embedding_length"), count(file, "attention.head_count")
    num_kv_heads = count(file, "attention.head_count_kv", num_heads)
    if embedding.shape[1:] != (hidden_size,):
        _bad(file, "embedding_length", f"is {hidden_size}, the embedding is {embedding.shape}")
    head_dim = _head_dim(file, kind, hidden_size, num_heads)
    config: dict[str, Any] = {
        "architectures": [kind.kind],
        "model_type": kind.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": count(file, "feed_forward_length"),
        "num_hidden_layers": _num_layers(file),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": number(file, "attention.layer_norm_rms_epsilon"),
        "rope_theta": number(file, "rope.freq_base", 10000.0),
        "max_position_embeddings": count(file, "context_length"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "torch_dtype": _dtype(file),
        **kind.settings,
    }
    _check_heads(file, kind, config)
    if kind.model_type == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
        config["mlp_bias"] = "blk.0.ffn_down.bias" in file.tensors
    config |= _windows(file, kind) | _rotary(file, config, read) | _caps(file, kind, config)
    ids = token_ids(file)
    names = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    return config | {names[name]: ids[name] for name in names if name in ids}


def token_ids(file: GgufFile) -> dict[str, int]:
    """Return the ids of special tokens that a file names and its vocabulary has."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    size = len(tokens) if isinstance(tokens, list) else 0
    found = {}
    for name in _IDS:
        value = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if type(value) is int and 0 <= value < size:
            found[name] = value
    return found


def sampling_of(file: GgufFile) -> dict[str, Any]:
    """Return the defaults of sampling that a file has, as generation_config.json has them.

    What no request could have is found when that file is read.
    """
    names = {own: file.metadata.get(f"general.sampling.{name}") for name, own in _SAMPLING.items()}
    found = {}
    for name, value in names.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found[name] = _short(value)
    return found


def read_factors(
    file: GgufFile, name: str, size: int, read: ReadTensor | None = None
) -> list[float] | None:
    """Return a tensor of rotary factors, ``size`` float32 numbers; None where there is none.

    read: as in ``config_of``. Raises ConfigError for one of another size or kind, or with numbers
    that are not positive.
    """
    info = file.tensors.get(name)
    if info is None:
        return None
    if info.kind.name != "F32" or info.num_values != size:
        _bad(file, name, f"has {info.num_values} numbers of {info.kind.name}, not {size} of F32")
    data = _bytes_of(file, info) if read is None else read(info)
    if len(data) != info.nbytes:
        _bad(file, name, "is not whole")
    values = np.frombuffer(data, "<f4")
    if not (np.isfinite(values).all() and (values > 0).all()):
        _bad(file, name, "has numbers that are no positive factors")
    return [float(value) for value in values]


def _bytes_of(file: GgufFile, info: TensorInfo) -> bytes:
    try:
        with file.parts[info.part][0].open("rb") as source:
            source.seek(info.start)
            return source.read(info.nbytes)
    except OSError as error:
        raise ConfigError(f"{file.path.name} cannot be read: {error}.", param="model") from error


def _head_dim(file: GgufFile, kind: Architecture, hidden_size: int, num_heads: int) -> int:
    """Return the size of a head: as stored, else from Q's rows, else a share of the whole."""
    if file.own("attention.key_length") is not None:
        head_dim = count(file, "attention.key_length")
        if count(file, "attention.value_length", head_dim) != head_dim:
            _bad(file, "attention.value_length", "differs from that of the keys")
        return head_dim
    rows = file.tensors.get("blk.0.attn_q.weight")
    if rows is not None and rows.shape[0] % num_heads == 0:
        return rows.shape[0] // num_heads
    if hidden_size % num_heads:
        _bad(file, "attention.head_count", f"{num_heads} does not divide {hidden_size}")
    return hidden_size // num_heads


def _num_layers(file: GgufFile) -> int:
    """Return the number of layers, which all have tensors."""
    depth = count(file, "block_count")
    if depth > len(file.tensors) or f"blk.{depth - 1}.attn_norm.weight" not in file.tensors:
        _bad(file, "block_count", f"is {depth}, and the last of so many layers has no tensors")
    return depth


def _check_heads(file: GgufFile, kind: Architecture, config: dict[str, Any]) -> None:
    """Raise ConfigError where the sizes of heads do not fit the first layer's tensors."""
    head_dim, heads, kv = (
        config[name] for name in ("head_dim", "num_attention_heads", "num_key_value_heads")
    )
    q, k = (heads * head_dim, "attn_q"), (kv * head_dim, "attn_k")
    wanted = [((heads + 2 * kv) * head_dim, "attn_qkv")] if kind.fused else [q, k]
    for rows, name in wanted:
        found = _tensor(file, f"blk.0.{name}.weight").shape
        if found != (rows, config["hidden_size"]):
            own = (rows, config["hidden_size"])
            _bad(file, f"blk.0.{name}.weight", f"is {found}, not {own} as the metadata says")


def _windows(file: GgufFile, kind: Architecture) -> dict[str, Any]:
    """Return the sliding windows. Files of Qwen and Llama that have any are not of these."""
    if kind.model_type in ("qwen2", "qwen3"):
        return {"use_sliding_window": False}
    size = file.own("attention.sliding_window", 0)
    if kind.model_type == "llama" or (type(size) is int and size == 0):
        return {"sliding_window": None} if kind.model_type in ("llama", "phi3") else {}
    return {"sliding_window": count(file, "attention.sliding_window")}


def _rotary(file: GgufFile, config: dict[str, Any], read: ReadTensor | None) -> dict[str, Any]:
    """Return the settings of rotary positions.

    Factors of a file divide the frequencies one by one, which is longrope here. Llama 3's are
    such factors, too.
    """
    head_dim = config["head_dim"]
    rotated = count(file, "rope.dimension_count", head_dim)
    if (
        rotated > head_dim
        or rotated % 2
        or (rotated != head_dim and config["model_type"] != "phi3")
    ):
        _bad(file, "rope.dimension_count", f"is {rotated}, and a head has {head_dim} dimensions")
    found: dict[str, Any] = {}
    if rotated != head_dim:
        found["partial_rotary_factor"] = rotated / head_dim
    long = read_factors(file, "rope_factors_long.weight", rotated // 2, read)
    short = read_factors(file, "rope_factors_short.weight", rotated // 2, read)
    if long is not None and short is not None:
        name = "rope.scaling.original_context_length"
        found["original_max_position_embeddings"] = count(file, name)
        factor = number(file, "rope.scaling.attn_factor", 1.0)
        scaling = {"type": "longrope", "long_factor": long, "short_factor": short}
        return found | {"rope_scaling": scaling | {"attention_factor": factor}}
    factors = read_factors(file, "rope_freqs.weight", rotated // 2, read)
    if factors is not None:
        scaling = {"rope_type": "longrope", "long_factor": factors, "short_factor": factors}
        whole = {"original_max_position_embeddings": config["max_position_embeddings"]}
        return found | {"rope_scaling": scaling | whole | {"attention_factor": 1.0}}
    return found | _scaled(file, config)


def _scaled(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """Return the scaling of rotary positions by one factor, if there is any: linear by default."""
    kind = file.own("rope.scaling.type", "linear")
    if not isinstance(kind, str):
        _bad(file, "rope.scaling.type", "is no text")
    factor = number(file, "rope.scaling.factor", number(file, "rope.scale_linear", 1.0))
    if kind == "none" or (factor == 1.0 and kind in ("linear", "yarn", "longrope")):
        return {}
    if kind not in ("linear", "yarn"):
        _bad(file, "rope.scaling.type", f"{kind!r:.40} is not known; linear and yarn are")
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        name = "rope.scaling.original_context_length"
        scaling["original_max_position_embeddings"] = count(file, name)
        return {"rope_scaling": scaling}
    if config["model_type"] == "gemma3_text":  # of its layers without a window
        return {"rope_scaling": scaling}
    # A linear factor is within the file's context length; here it is on top of the original one.
    original = config["max_position_embeddings"] / factor
    return {"rope_scaling": scaling | {"original_max_position_embeddings": original}}


def _caps(file: GgufFile, kind: Architecture, config: dict[str, Any]) -> dict[str, Any]:
    """Return what Gemma 2 and 3 have besides: caps of logits, and the scale of attention."""
    if kind.model_type not in ("gemma2", "gemma3_text"):
        return {}
    found: dict[str, Any] = {}
    for name, usual in _GEMMA2_CAPS.items():
        if file.own(name) is not None:
            found[name] = number(file, name)
        else:
            found[name] = usual if kind.model_type == "gemma2" else None
    # The largest of each has a scale of its own, which files do not hold.
    largest = {"gemma2": 46, "gemma3_text": 62}[kind.model_type]
    found["query_pre_attn_scalar"] = config["head_dim"]
    if config["num_hidden_layers"] == largest:
        share = config["hidden_size"] // config["num_attention_heads"]
        found["query_pre_attn_scalar"] = share
    return found


def _dtype(file: GgufFile) -> str:
    """Return the type that most weights of matrices have; bfloat16 for quantized ones."""
    sizes: Counter[str] = Counter()
    for info in file.tensors.values():
        if len(info.shape) > 1:
            sizes[_PLAIN.get(info.kind.name, "bfloat16")] += info.num_values
    return sizes.most_common(1)[0][0] if sizes else "float32"


def _tensor(file: GgufFile, name: str) -> TensorInfo:
    info = file.tensors.get(name)
    if info is None:
        raise ConfigError(
            f"{file.path.name} has no tensor {name!r}: it is not a whole model.", param="model"
        )
    return info


def count(file: GgufFile, name: str, default: int | None = None) -> int:
    """Return a positive integer under the architecture's name; equal ones of all layers, too."""
    value = file.own(name, default)
    if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
        value = value[0].item()
    if type(value) is not int or not 1 <= value <= MOST:
        missing = (
            "is missing" if value is None else f"must be a positive integer, got {value!r:.60}"
        )
        _bad(file, name, missing)
    return value


def number(file: GgufFile, name: str, default: float | None = None) -> float:
    """Return a positive number under the architecture's name. Raises ConfigError."""
    value = file.own(name, default)
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    if not numeric or not math.isfinite(value) or value <= 0:
        missing = "is missing" if value is None else f"must be a positive number, got {value!r:.60}"
        _bad(file, name, missing)
    return float(_short(value))


def _short(value: float) -> float:
    """Return a number as it was before it was stored in float32: 1e-05, not 9.99999974e-06."""
    short = np.float32(value)
    return value if isinstance(value, int) or short != value else float(str(short))


def _bad(file: GgufFile, name: str, reason: str) -> NoReturn:
    raise ConfigError(f"{file.path.name}: {name} {reason}.", param="model")
