"""Decoder and tower configurations read from config.json, in deprecated and current spelling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from sensorium.bounds import Bounds
from sensorium.errors import ConfigError
from sensorium.models.interface import TextShape
from sensorium.models.rope import context_length, read_rope, short_context

POSITIVE = Bounds(ge=1)
_COMMON: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "sliding_window": None,
}
_QWEN = _COMMON | {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
    "layer_types": None,
}
_QWEN2_VL = _QWEN | {
    "max_window_layers": 80,
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "mistral": _COMMON
    | {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
    "qwen2_vl": _QWEN2_VL,
    "qwen2_vl_text": _QWEN2_VL,
    "phi3": _COMMON
    | {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
}
"""Values that published files leave out, by ``model_type``: those of the reference
implementation's classes."""

_NULL_MEANS = ("sliding_window",)
_QKV_BIAS = ("qwen2", "qwen2_vl", "qwen2_vl_text")


@dataclass(frozen=True, slots=True)
class TextConfig:
    """Configuration of a decoder of the Llama kind."""

    model_type: str
    hidden_size: int
    inner_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    norm_eps: float
    activation: str
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    fused: bool
    """If true, the checkpoint stores fused QKV and gate-up projections (Phi-3)."""
    rope_theta: float
    rope: Mapping[str, Any]
    """Rotary scaling with ``rope_type``; ``mrope_section`` when there are several axes."""
    rotary_dim: int
    context: int
    """Tokens of the longest sequence: ``max_position`` (``max_position_embeddings``), or what a
    scaling makes of it."""
    windows: tuple[int | None, ...]
    """Tokens that each layer attends to, a row's own among them; None for all before it."""

    @property
    def shape(self) -> TextShape:
        """Sizes that the engine needs."""
        short = short_context(self.rope, self.max_position)
        return TextShape(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            vocab_size=self.vocab_size,
            max_position=self.context,
            short_context=short if short is not None and short < self.context else None,
            rope_grows=self.rope["rope_type"] == "dynamic",
            window=None if None in self.windows else max(size or 0 for size in self.windows),
        )


def read_text_config(config: Mapping[str, Any], *, tied: bool | None = None) -> TextConfig:
    """Interpret a decoder's configuration; ``tied`` overrides its ``tie_word_embeddings``.

    Raises ConfigError naming the field for values that are impossible or not supported.
    """
    model_type = config.get("model_type")
    if model_type not in DEFAULTS:
        known = ", ".join(sorted(DEFAULTS))
        raise ConfigError(
            f"config.json: no decoder for model_type {model_type!r}; there are {known}.",
            param="model",
        )
    values = filled(DEFAULTS[model_type], config)
    hidden_size = count(values, "hidden_size")
    num_heads = count(values, "num_attention_heads")
    kv_heads = values["num_key_value_heads"]
    num_kv_heads = num_heads if kv_heads is None else count(values, "num_key_value_heads")
    if num_heads % num_kv_heads:
        bad("num_key_value_heads", f"{num_kv_heads} does not divide {num_heads} heads")
    if values["head_dim"] is None and hidden_size % num_heads:
        bad("hidden_size", f"{hidden_size} is not a multiple of {num_heads} heads")
    head_dim = hidden_size // num_heads if values["head_dim"] is None else count(values, "head_dim")
    rope = read_rope(values, model_type)
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor")) or 1.0
    bias = bool(values["attention_bias"])
    declared = count(values, "max_position_embeddings")
    context = context_length(rope, declared)
    return TextConfig(
        model_type=model_type,
        hidden_size=hidden_size,
        inner_size=count(values, "intermediate_size"),
        num_layers=count(values, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=count(values, "vocab_size"),
        max_position=declared,
        norm_eps=float(values["rms_norm_eps"]),
        activation=str(values["hidden_act"]),
        tied=bool(values["tie_word_embeddings"] if tied is None else tied),
        qkv_bias=model_type in _QKV_BIAS or (model_type in ("llama", "qwen3") and bias),
        o_bias=model_type in ("llama", "qwen3") and bias,
        mlp_bias=model_type == "llama" and bool(values["mlp_bias"]),
        qk_norm=model_type == "qwen3",
        fused=model_type == "phi3",
        rope_theta=float(rope.get("rope_theta") or values["rope_theta"]),
        rope=rope,
        rotary_dim=int(head_dim * float(partial)),
        context=context,
        windows=_windows(values, context),
    )


@dataclass(frozen=True, slots=True)
class ClipConfig:
    """Configuration of a CLIP vision tower, or of a SigLIP one, which has the same sizes."""

    hidden_size: int
    inner_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    activation: str
    norm_eps: float

    @property
    def num_patches(self) -> int:
        """Number of patches of one square image, without a class token."""
        return (self.image_size // self.patch_size) ** 2


CLIP_LARGE_336: Mapping[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
"""Sizes of CLIP ViT-L/14 at 336 pixels, which published files of families that have it leave
out."""
_CLIP = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_SIGLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}


def read_clip_config(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> ClipConfig:
    """Interpret a CLIP vision configuration; ``defaults`` stand in for what it leaves out.

    Raises ConfigError naming the field for values that are impossible.
    """
    return _read_tower(config, "clip_vision_model", _CLIP | dict(defaults))


def read_siglip_config(config: Mapping[str, Any]) -> ClipConfig:
    """Interpret a SigLIP vision configuration.

    Raises ConfigError naming the field for values that are impossible.
    """
    return _read_tower(config, "siglip_vision_model", _SIGLIP)


def _read_tower(
    config: Mapping[str, Any], expected: str, defaults: Mapping[str, Any]
) -> ClipConfig:
    model_type = config.get("model_type") or expected
    if model_type != expected:
        bad("vision_config.model_type", f"{model_type!r} is not supported, only {expected!r}")
    values = filled(defaults, config)
    hidden_size, num_heads = count(values, "hidden_size"), count(values, "num_attention_heads")
    if hidden_size % num_heads:
        bad("vision_config.hidden_size", f"{hidden_size} is not a multiple of {num_heads} heads")
    if count(values, "num_channels", 3) != 3:
        bad("vision_config.num_channels", f"must be 3, got {values['num_channels']}")
    return ClipConfig(
        hidden_size=hidden_size,
        inner_size=count(values, "intermediate_size"),
        num_layers=count(values, "num_hidden_layers"),
        num_heads=num_heads,
        image_size=count(values, "image_size"),
        patch_size=count(values, "patch_size"),
        activation=str(values["hidden_act"]),
        norm_eps=float(values["layer_norm_eps"]),
    )


@dataclass(frozen=True, slots=True)
class WhisperConfig:
    """Configuration of a Whisper audio encoder.

    ``num_positions``: the largest number of rows at once, of two mel frames each.
    """

    hidden_size: int
    inner_size: int
    num_layers: int
    num_heads: int
    num_bins: int
    num_positions: int
    activation: str

    @property
    def max_frames(self) -> int:
        """Largest number of mel frames at once."""
        return 2 * self.num_positions


_WHISPER = {
    "d_model": 384,
    "encoder_ffn_dim": 1536,
    "encoder_layers": 4,
    "encoder_attention_heads": 6,
    "num_mel_bins": 80,
    "max_source_positions": 1500,
    "activation_function": "gelu",
}


def read_whisper_config(config: Mapping[str, Any]) -> WhisperConfig:
    """Interpret a Whisper configuration.

    Raises ConfigError naming the field for values that are impossible.
    """
    model_type = config.get("model_type") or "whisper"
    if model_type != "whisper":
        bad("audio_config.model_type", f"{model_type!r} is not supported, only 'whisper'")
    values = filled(_WHISPER, config)
    hidden_size, num_heads = count(values, "d_model"), count(values, "encoder_attention_heads")
    if hidden_size % num_heads:
        bad("audio_config.d_model", f"{hidden_size} is not a multiple of {num_heads} heads")
    return WhisperConfig(
        hidden_size=hidden_size,
        inner_size=count(values, "encoder_ffn_dim"),
        num_layers=count(values, "encoder_layers"),
        num_heads=num_heads,
        num_bins=count(values, "num_mel_bins"),
        num_positions=count(values, "max_source_positions"),
        activation=str(values["activation_function"]),
    )


def feature_layers(value: Any, num_layers: int) -> tuple[int, ...]:
    """Return the numbers of layers of a tower after which features are taken.

    ``value``: an index into its hidden states, or a list of them, where 0 is before the first layer
    and -1 after the last. Raises ConfigError for one outside.
    """
    found = []
    for index in value if isinstance(value, list) and value else [value]:
        if isinstance(index, bool) or not isinstance(index, int):
            bad("vision_feature_layer", f"must be an integer or a list of them, got {value!r}")
        number = index + num_layers + 1 if index < 0 else index
        if not 0 <= number <= num_layers:
            bad("vision_feature_layer", f"{index} is outside a tower of {num_layers} layers")
        found.append(number)
    return tuple(found)


def filled(defaults: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a configuration, with defaults for what it leaves out or sets to null.

    A null stays where it has a meaning: that a decoder has no sliding window.
    """
    given = {k: v for k, v in config.items() if v is not None or k in _NULL_MEANS}
    return {**defaults, **given}


def count(values: Mapping[str, Any], name: str, default: Any = None) -> int:
    """Return a positive integer of a configuration, ``default`` where it is absent or null.

    Raises ConfigError naming the field for anything else.
    """
    value: Any = default if values.get(name) is None else values[name]
    problem = POSITIVE.problem(value, int)
    if problem is not None:
        bad(name, problem)
    return int(value)


def section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a nested mapping of a configuration, such as ``vision_config``.

    Raises ConfigError when it is missing.
    """
    value = config.get(name)
    if not isinstance(value, Mapping):
        bad(name, f"must be a mapping, got {value!r}")
    return dict(value)


def bad(name: str, reason: str) -> NoReturn:
    """Raise the ConfigError for a field of config.json."""
    raise ConfigError(f"config.json: {name} {reason}.", param="model")


def ties_head(config: Mapping[str, Any]) -> bool:
    """Return whether the configuration ties the output head to the embedding.

    Either the whole configuration or its text part may say so.
    """
    text = config.get("text_config")
    nested = isinstance(text, Mapping) and bool(text.get("tie_word_embeddings"))
    return bool(config.get("tie_word_embeddings")) or nested


def declared_dtype(config: Mapping[str, Any]) -> str | None:
    """Return ``dtype`` or ``torch_dtype`` (deprecated), without a ``torch.`` prefix.

    The top level takes precedence over the text part. None where there is none.
    """
    text = config.get("text_config")
    for source in (config, text if isinstance(text, Mapping) else {}):
        for key in ("dtype", "torch_dtype"):
            value = source.get(key)
            if isinstance(value, str) and value != "auto":
                return value.removeprefix("torch.")
    return None


def _windows(values: Mapping[str, Any], context: int) -> tuple[int | None, ...]:
    """Return the window of each layer, where it is shorter than ``context``.

    Qwen's layers have one by ``layer_types``, or from ``max_window_layers`` on; those of other
    families all.
    """
    num_layers, kinds = count(values, "num_hidden_layers"), values.get("layer_types")
    everywhere: tuple[int | None, ...] = (None,) * num_layers
    if values.get("sliding_window") is None or not values.get("use_sliding_window", True):
        return everywhere
    size = count(values, "sliding_window")
    if size >= context:
        return everywhere
    if kinds is None:
        first = count(values, "max_window_layers") if values.get("max_window_layers") else 0
        return tuple(size if layer >= first else None for layer in range(num_layers))
    known = {"full_attention": None, "sliding_attention": size}
    if not (
        isinstance(kinds, list) and len(kinds) == num_layers and known.keys() >= {*map(str, kinds)}
    ):
        bad("layer_types", f"must name {num_layers} layers of {', '.join(known)}, got {kinds!r}")
    return tuple(known[kind] for kind in kinds)
