"""The models of a server: the one place where the name in a request becomes a model."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sensorium.config import EngineConfig
from sensorium.errors import InvalidRequestError, ModelNotFoundError, SensoriumError
from sensorium.server.models.facts import ModelFacts
from sensorium.server.models.memory import SharedMemory
from sensorium.server.models.served import ServedModel

if TYPE_CHECKING:
    from sensorium.server.context import ServingContext

logger = logging.getLogger("sensorium.server")

ReadFacts = Callable[[EngineConfig], ModelFacts | None]
"""Returns what a model's files say of it, None where that cannot be told. It may take a while."""

LONGEST_LOOK = 60.0
"""Seconds between two looks for idle models, at most."""


class ServedModels:
    """All models of a server, in the order of its configuration; the first is the default.

    Belongs to one event loop. ``memory``: what the engines may take together; None for no limit.
    ``read_facts``: reads what is known of models that are started on demand.
    """

    def __init__(
        self,
        models: Sequence[ServedModel],
        memory: SharedMemory | None = None,
        *,
        read_facts: ReadFacts | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._models = list(models)
        self._by_name = {name: model for model in models for name in model.names}
        self._memory = memory
        self._read_facts = read_facts
        self._clock = clock
        self._clearing = asyncio.Lock()
        self._reserved: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models)

    def __len__(self) -> int:
        return len(self._models)

    @property
    def names(self) -> tuple[str, ...]:
        """Return all names that requests may use."""
        return tuple(self._by_name)

    @property
    def default(self) -> ServedModel:
        """Return the model of requests that name none."""
        return self._models[0]

    @property
    def is_available(self) -> bool:
        """Return True when at least one model takes requests, perhaps after a load."""
        return any(model.is_available for model in self._models)

    def find(self, name: str | None) -> ServedModel:
        """Return the model of a name. Raises ModelNotFoundError for one that is not served here."""
        if name is None:
            return self.default
        found = self._by_name.get(name) or self._with_adapter(name)
        if found is None:
            adapters = (name for model in self._models for name in model.adapters)
            served = ", ".join(map(repr, (*self._by_name, *adapters)))
            raise ModelNotFoundError(
                f"Model {name[:200]!r} is not served here; this server serves {served}.",
                param="model",
            )
        return found

    def adapter_of(self, name: str | None) -> str:
        """Return the adapter that a name which was found means; empty for a model itself."""
        return "" if name is None or name in self._by_name else name

    @contextmanager
    def reserved(self, adapter: str) -> Iterator[None]:
        """Keep a name for an adapter that is loaded within the block, into whichever model.

        Raises InvalidRequestError for a name that a model or an adapter has, or is to get.
        """
        taken = {name for model in self._models for name in model.adapters}
        if adapter in self._by_name or adapter in taken or adapter in self._reserved:
            raise InvalidRequestError(
                f"The name {adapter!r} is taken: unload the adapter first, or choose another.",
                param="lora_name",
            )
        self._reserved.add(adapter)
        try:
            yield
        finally:
            self._reserved.discard(adapter)

    def attach(self, server: ServingContext) -> None:
        """Make the models those of a server, before anything else is done with them."""
        make_room = self._make_room if self._memory is not None else None
        for model in self._models:
            model.attach(server, server.metrics.for_model(model.name), make_room)

    async def start(self) -> None:
        """Start what is not started on demand: the first such model now, others in the background.

        A model that cannot be loaded does not keep the others from it. Raises the error of the
        first when no model can be used at all.
        """
        waiting = [model for model in self._models if not model.config.on_demand]
        first_error: SensoriumError | None = None
        while waiting and self._all_failed_or_stopped():
            first_error = await self._try_start(waiting.pop(0)) or first_error
        if first_error is not None and all(model.state == "failed" for model in self._models):
            raise first_error
        self._tasks = [
            asyncio.create_task(self._start_all(waiting)),
            asyncio.create_task(self._end_idle_ones()),
            asyncio.create_task(self._read_all_facts()),
        ]

    async def close(self) -> None:
        """End all engines, also those that start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(model.close() for model in self._models))

    async def end_idle(self) -> float:
        """End the models that have been idle for too long; return the seconds until the next look.

        A model without ``--model-idle-timeout`` is never ended here.
        """
        wait = LONGEST_LOOK
        for model in self._models:
            seconds = model.config.model_idle_timeout
            if not seconds:
                continue
            left = model.last_used + seconds - self._clock() if model.is_idle else seconds
            if left <= 0:
                logger.info("ending the model %r, idle for %g s", model.name, seconds)
                await _ended(model)
                left = seconds  # it may come back in the meantime
            wait = min(wait, left)
        return wait

    def _with_adapter(self, name: str) -> ServedModel | None:
        return next((model for model in self._models if name in model.adapters), None)

    def _all_failed_or_stopped(self) -> bool:
        return not any(model.context is not None for model in self._models)

    async def _start_all(self, models: Sequence[ServedModel]) -> None:
        """Start models one after the other."""
        for model in models:
            await self._try_start(model)

    async def _try_start(self, model: ServedModel) -> SensoriumError | None:
        """Start a model; log and return the error when that fails."""
        try:
            await model.start()
        except SensoriumError as error:
            if len(self) > 1:
                logger.error("failed to load the model %r: %s", model.name, error.message)
            return error
        return None

    async def _read_all_facts(self) -> None:
        for model in self._models:
            if self._read_facts is not None and model.facts is None and model.config.on_demand:
                try:
                    facts = await asyncio.to_thread(self._read_facts, model.engine_config)
                except Exception:  # loading it says more
                    logger.exception("failed to read the facts of the model %r", model.name)
                    continue
                model.facts = model.facts or facts

    async def _end_idle_ones(self) -> None:
        while True:
            await asyncio.sleep(await self.end_idle())

    async def _make_room(self, model: ServedModel) -> EngineConfig:
        """Reserve memory for a model; end idle ones, least recently used first, if need be.

        Raises OverloadedError while those that are in use leave too little, ConfigError when the
        model needs more than there is in all.
        """
        assert self._memory is not None
        need = await self._memory.need_of(model.engine_config)
        async with self._clearing:
            for other in self._models:
                if other is not model:
                    await other.ended()  # what it holds is free then
            while (idle := self._memory.next_to_end(need, model, self._models)) is not None:
                logger.info("ending the idle model %r to make room for %r", idle.name, model.name)
                await _ended(idle)
            return self._memory.reserve(need, model, self._models)


async def _ended(model: ServedModel) -> None:
    try:
        await model.end()
    except Exception:
        logger.exception("failed to end the engine of the model %r", model.name)
