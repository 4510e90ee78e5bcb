"""Checks of options of adapters at start."""

from __future__ import annotations

from collections.abc import Sequence

from sensorium.config import ServedConfig, ServerConfig
from sensorium.errors import ConfigError


def check_adapters(models: Sequence[ServedConfig], config: ServerConfig) -> None:
    """Check the options of adapters, and that no name means two things. Raises ConfigError."""
    if config.allow_runtime_lora_updating and not any(m.engine.lora.enable_lora for m in models):
        raise ConfigError(
            "allow_runtime_lora_updating needs --enable-lora.", param="allow_runtime_lora_updating"
        )
    taken = {name for model in models for name in model.names}
    for model in models:
        for module in model.engine.lora.modules():
            if module.name in taken:
                raise ConfigError(
                    f"lora_modules has the name {module.name!r:.80}, which another model or "
                    "adapter has.",
                    param="lora_modules",
                )
            taken.add(module.name)
