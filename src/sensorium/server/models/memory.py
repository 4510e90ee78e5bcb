"""Memory that the engines of all models share: what each may take, and what makes room for it."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sensorium.config import GIB, EngineConfig
from sensorium.errors import ConfigError, OverloadedError
from sensorium.server.models.served import ServedModel

logger = logging.getLogger("sensorium.server")

FRONT_BYTES = GIB // 8
"""Memory that a model takes outside its engine's process: its tokenizer and its media workers."""
RETRY_SECONDS = 5


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of memory: without ``least`` a model cannot run, with ``wanted`` it runs well."""

    least: int
    wanted: int


class SharedMemory:
    """A number of bytes for all engines of a server.

    Each model gets an equal part, or more where it needs more. It is reserved when the engine
    starts and free again when it ends, so more models than fit may be served one after the other.

    Args:
        total: Bytes for all of them.
        num_models: Models of the server.
        estimate: Returns about the bytes that a model takes at least. It may take a while.
    """

    def __init__(
        self, total: int, num_models: int, estimate: Callable[[EngineConfig], int]
    ) -> None:
        self.total = total
        self._part = total // num_models
        self._estimate = estimate

    async def need_of(self, config: EngineConfig) -> Need:
        """Return what a model needs: as configured, else as its files say. Raises ConfigError."""
        configured = config.cache.max_memory_gb
        if configured is not None:
            num_bytes = int(configured * GIB) + FRONT_BYTES
            return Need(num_bytes, num_bytes)
        least = await asyncio.to_thread(self._estimate, config) + FRONT_BYTES
        return Need(least, max(least, self._part))

    def next_to_end(
        self, need: Need, model: ServedModel, models: Sequence[ServedModel]
    ) -> ServedModel | None:
        """Return the idle model that must be ended next for ``model``; None when there is room.

        Raises:
            ConfigError: The model needs more than all models may have.
            OverloadedError: The models that are in use leave too little.
        """
        if need.least > self.total:
            raise ConfigError(
                f"The model {model.name!r} needs about {_size(need.least)} of memory; all models "
                f"together may take {_size(self.total)}. Raise --models-memory-gb, or use "
                "--quantization int8 or int4, or a shorter --max-model-len."
            )
        free = self._free(model, models)
        if need.least <= free:
            return None
        idle = [other for other in models if other is not model and other.is_idle]
        if need.least > free + sum(other.held_bytes for other in idle):
            error = OverloadedError(
                f"The models in use leave too little memory for {model.name!r}. Try again later."
            )
            error.retry_after = RETRY_SECONDS
            raise error
        return min(idle, key=lambda other: other.last_used)

    def reserve(
        self, need: Need, model: ServedModel, models: Sequence[ServedModel]
    ) -> EngineConfig:
        """Reserve memory for a model that ``next_to_end`` says there is room for.

        Returns the options that keep its engine within that.
        """
        config = model.engine_config
        model.held_bytes = min(need.wanted, self._free(model, models))
        logger.info("the model %r may take %s of memory", model.name, _size(model.held_bytes))
        if config.cache.max_memory_gb is not None:
            return config
        limit = (model.held_bytes - FRONT_BYTES) / GIB
        return dataclasses.replace(
            config, cache=dataclasses.replace(config.cache, max_memory_gb=limit)
        )

    def _free(self, model: ServedModel, models: Sequence[ServedModel]) -> int:
        """Return the bytes that no other model has."""
        return self.total - sum(other.held_bytes for other in models if other is not model)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB"
