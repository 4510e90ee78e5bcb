"""Architectures of transformers that can run here, and the sizes that the engine needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from sensorium.errors import ConfigError, UnsupportedModelError
from sensorium.models.interface import LoadedConfig, TextShape
from sensorium.models.rope import context_length

LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
"""Kinds of decoder layers that can run."""
_OTHER_STATE = {
    "ssm_state_size": "state-space layers",
    "state_size": "state-space layers",
    "mamba_d_state": "state-space layers",
    "conv_kernel": "state-space layers",
    "linear_num_value_heads": "linear attention",
    "block_types": "recurrent layers",
    "num_kv_shared_layers": "layers that share their keys and values",
    "cross_attention_layers": "cross-attention to the encoder's output",
    "hidden_size_per_layer_input": "embeddings of its own for every layer",
    "index_topk": "attention to a selection of tokens only",
}
"""Fields that tell of something besides keys and values of every layer, when they are set."""


ENCODER_DECODER = "encoder-decoder"


def known_architectures() -> dict[str, str]:
    """Return the architectures of transformers that turn text, with or without media, into text.

    Name -> model type, or for encoder-decoders ``ENCODER_DECODER``.
    """
    from transformers.models.auto import modeling_auto as auto

    found: dict[str, str] = {}
    for mapping in (
        auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    ):
        found |= {name: ENCODER_DECODER for _, name in _named(mapping)}
    for mapping in (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    ):
        found |= {name: model_type for model_type, name in _named(mapping)}
    return found


def _named(mapping: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for model_type, value in mapping.items():
        for name in (value,) if isinstance(value, str) else value:
            yield model_type, name


def read_hf_config(config: Mapping[str, Any]) -> Any:
    """Return the configuration object of transformers.

    Raises ConfigError when its class does not take the values.
    """
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"config.json: the installed transformers has no model_type {model_type!r}.",
            param="model",
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(_plain(config))
    except Exception as error:
        raise ConfigError(
            f"config.json does not fit model_type {model_type!r}: {error}", param="model"
        ) from error


def _plain(value: Any) -> Any:
    """Copy JSON values, and read numbers that transformers writes as mappings.

    JSON has no way to write these, such as infinity.
    """
    if isinstance(value, Mapping):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: _plain(member) for key, member in value.items()}
    return [_plain(member) for member in value] if isinstance(value, list) else value


def text_shape(loaded: LoadedConfig) -> TextShape:
    """Return the sizes of the decoder.

    Raises UnsupportedModelError for a decoder that keeps more than keys and values.
    """
    config = read_hf_config(loaded.config)
    if getattr(config, "is_encoder_decoder", False):
        refuse(config, "it is an encoder-decoder: its decoder attends to the encoder's output")
    text = config.get_text_config(decoder=True)
    refuse_other_state(text)
    num_heads = _count(text, "num_attention_heads")
    hidden_size = _count(text, "hidden_size")
    return TextShape(
        num_layers=_count(text, "num_hidden_layers"),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=_value(text, "num_key_value_heads") or num_heads,
        head_dim=_value(text, "head_dim") or hidden_size // num_heads,
        vocab_size=_count(text, "vocab_size"),
        max_position=_max_position(text),
    )


def _max_position(text: Any) -> int:
    """Return the tokens of the longest context."""
    declared = _count(text, "max_position_embeddings")
    rope = _value(text, "rope_parameters") or {}
    if rope.get("rope_type") == "longrope":
        # Past the original length its code takes other factors, for which what is in the cache is
        # wrong.
        return int(rope.get("original_max_position_embeddings") or declared)
    # With dynamic scaling, likewise: there it ends at the declared length.
    return declared if rope.get("rope_type") == "dynamic" else context_length(rope, declared)


def has_axes(text: Any) -> bool:
    """Return whether the positions of a decoder have several axes (multimodal rotary embedding)."""
    return bool((_value(text, "rope_parameters") or {}).get("mrope_section"))


def refuse_other_state(text: Any) -> None:
    """Raise UnsupportedModelError for a decoder with layers that are no plain attention."""
    kinds = set(_value(text, "layer_types") or ()) - LAYER_TYPES
    if kinds:
        refuse(text, f"it has layers of the kind {', '.join(sorted(map(str, kinds)))}")
    if _value(text, "attention_chunk_size"):
        refuse(text, "its attention goes by chunks (attention_chunk_size)")
    for name, what in _OTHER_STATE.items():
        if _value(text, name):
            refuse(text, f"it has {what} ({name})")


def refuse(config: Any, reason: str) -> NoReturn:
    """Raise UnsupportedModelError with the reason."""
    raise UnsupportedModelError(
        f"Models of type {getattr(config, 'model_type', '?')!r} cannot run here: {reason}. Of the "
        "models of transformers those can whose decoder keeps keys and values of every token in "
        "every layer, and nothing else.",
        param="model",
    )


def _value(config: Any, name: str) -> Any:
    """Return a field; None when there is none.

    Raises UnsupportedModelError when it differs from layer to layer.
    """
    try:
        return getattr(config, name, None)
    except Exception as error:  # the class that transformers raises is not public
        refuse(config, f"its layers differ ({name}: {error})")


def _count(config: Any, name: str) -> int:
    value = _value(config, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        refuse(config, f"its configuration has no usable {name} ({value!r})")
    return value
