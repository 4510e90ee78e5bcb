"""The models of a server: options of each one's engine, and of the server as they hold for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sensorium.config.server import ServerConfig
from sensorium.errors import ConfigError

if TYPE_CHECKING:
    from sensorium.config import EngineConfig

PER_MODEL = frozenset(
    {
        "default_chat_template_kwargs",
        "enable_force_include_usage",
        "model_idle_timeout",
        "on_demand",
        "reasoning_parser",
        "served_model_name",
        "tool_call_parser",
        "trust_request_chat_template",
    }
)
"""Options of the server that each model may have for itself."""


@dataclass(frozen=True, kw_only=True)
class ServedConfig:
    """One model of a server.

    ``server``: of its options, those in ``PER_MODEL`` are the model's own.
    """

    engine: EngineConfig
    server: ServerConfig

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names that requests may use, without repetitions."""
        return tuple(dict.fromkeys(self.server.served_model_name)) or (self.engine.model.model,)


def check_models(models: Sequence[ServedConfig]) -> None:
    """Raise ConfigError when two models have a name in common, or the memory of one is unknown."""
    by_name: dict[str, ServedConfig] = {}
    for model in models:
        for name in model.names:
            other = by_name.setdefault(name, model)
            if other is not model:
                raise ConfigError(
                    f"Two models have the name {name!r}: {other.engine.model.model!r} and "
                    f"{model.engine.model.model!r}. Give each a served-model-name of its own.",
                    param="served_model_name",
                )
    for model in models if len(models) > 1 else ():
        parallel = model.engine.parallel
        all_encode = parallel.tensor_parallel_size > 1 and parallel.encoder_ranks == "all"
        if all_encode and model.engine.cache.max_memory_gb is None:
            raise ConfigError(
                f"encoder_ranks of the model {model.names[0]!r} is all, but several models share "
                "memory by estimates, which count encoders once: give it a max_memory_gb, which "
                "holds for all its processes together, or serve it alone.",
                param="encoder_ranks",
            )


def server_only_options() -> frozenset[str]:
    """Return the names of the options that a server has once, for all models."""
    return frozenset(f.name for f in dataclasses.fields(ServerConfig)) - PER_MODEL
