"""Text-only families, all on the shared decoder: Llama, Qwen2, Qwen3, Mistral, Phi-3."""

from __future__ import annotations

from sensorium.models.configs import read_text_config
from sensorium.models.interface import (
    BuildOptions,
    Family,
    LoadableModel,
    LoadedConfig,
    TextShape,
)

_RENAMES = ((r"^model\.", ""),)


def _shape(loaded: LoadedConfig) -> TextShape:
    return read_text_config(loaded.config).shape


def _build_model(loaded: LoadedConfig, options: BuildOptions) -> LoadableModel:
    from sensorium.models.parts.decoder import DecoderModel

    return DecoderModel(read_text_config(loaded.config), options)


def _no_processor(loaded: LoadedConfig) -> None:
    """Return None: text models take no media."""


def _family(name: str, checkpoint: str, kind: str, stop_tokens: tuple[str, ...] = ()) -> Family:
    return Family(
        name=name,
        checkpoint=checkpoint,
        architectures=(f"{kind}ForCausalLM",),
        modalities=(),
        shape=_shape,
        build_processor=_no_processor,
        build_model=_build_model,
        renames=_RENAMES,
        stop_tokens=stop_tokens,
        embedders=(f"{kind}Model",),
        model_types=(kind.lower(),),
    )


FAMILIES = (
    _family("Llama", "meta-llama/Llama-3.2-1B-Instruct", "Llama"),
    _family("Qwen2", "Qwen/Qwen2.5-0.5B-Instruct", "Qwen2"),
    _family("Qwen3", "Qwen/Qwen3-0.6B", "Qwen3"),
    _family("Mistral", "mistralai/Mistral-7B-Instruct-v0.3", "Mistral"),
    _family(
        "Phi-3",
        "microsoft/Phi-3.5-mini-instruct",
        "Phi3",
        stop_tokens=(
            "<|end|>",
            "<|endoftext|>",
        ),  # generation_config.json of some releases lacks them
    ),
)
