"""Configuration of Ultravox, read from config.json and from those of its backbones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sensorium.models.configs import (
    TextConfig,
    WhisperConfig,
    bad,
    count,
    filled,
    read_text_config,
    read_whisper_config,
    section,
)
from sensorium.models.interface import LoadedConfig, TextShape

TEXT_PART, AUDIO_PART = "text_model_id", "audio_model_id"
"""Fields that name the checkpoints of the backbones, where these are not embedded."""


@dataclass(frozen=True, slots=True)
class UltravoxConfig:
    """Configuration of Ultravox: a Whisper encoder, a stacking projector and a decoder."""

    text: TextConfig
    audio: WhisperConfig
    stack_factor: int
    inner_size: int
    """Width after the projector's first linear layer; its SwiGLU halves it."""
    activation: str
    norm_between: bool
    """If true, the projector's second norm comes before its second linear layer (from v0.5 on),
    else after it."""

    @property
    def frames_per_embed(self) -> int:
        """Number of mel frames per embedding."""
        return 2 * self.stack_factor

    def chunks(self, num_frames: int) -> list[int]:
        """Return the lengths in mel frames of the chunks in which an audio item is encoded.

        Full chunks come first, then the rest.
        """
        whole, rest = divmod(num_frames, self.audio.max_frames)
        return [self.audio.max_frames] * whole + [rest] * (rest > 0)

    def num_embeds(self, num_frames: int) -> int:
        """Return the number of embeddings of an audio item of so many mel frames."""
        return sum(-(-length // self.frames_per_embed) for length in self.chunks(num_frames))

    @property
    def shape(self) -> TextShape:
        """Sizes that the engine needs."""
        return self.text.shape


def read_ultravox_config(loaded: LoadedConfig) -> UltravoxConfig:
    """Interpret config.json.

    Raises ConfigError naming the field for values that are impossible or not supported.
    """
    config = filled({}, loaded.config)
    text = read_text_config(
        filled({"model_type": "llama"}, _backbone(loaded, TEXT_PART, "text_config"))
    )
    audio = read_whisper_config(_backbone(loaded, AUDIO_PART, "audio_config"))
    activation = str(config.get("projector_act", "swiglu"))
    inner_size = count(config, "hidden_size", 4096)
    if activation == "swiglu" and inner_size % 2:
        bad("hidden_size", f"{inner_size} must be even for a SwiGLU projector")
    if config.get("audio_latency_block_size") is not None:
        bad("audio_latency_block_size", "is not supported: audio is encoded as a whole")
    if config.get("num_projector_layers"):
        bad("num_projector_layers", "is not supported: the projector has linear layers only")
    for name in ("text_model_lora_config", "audio_model_lora_config"):
        adapter = config.get(name)
        if isinstance(adapter, Mapping) and adapter.get("r"):
            bad(name, f"has rank {adapter['r']}: merge the adapter into the weights first")
    return UltravoxConfig(
        text=text,
        audio=audio,
        stack_factor=count(config, "stack_factor", 8),
        inner_size=inner_size,
        activation=activation,
        norm_between=bool(config.get("projector_ln_mid", False)),
    )


def _backbone(loaded: LoadedConfig, part: str, embedded: str) -> dict[str, Any]:
    """Return the configuration of a backbone: of the checkpoint it names, else the embedded one."""
    if part in loaded.parts:
        return dict(loaded.parts[part].config)
    return section(loaded.config, embedded)
