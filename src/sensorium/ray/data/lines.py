"""Lines of batches in both stages: the application answers them, first without an engine."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from sensorium.config import EngineConfig, ServedConfig
from sensorium.engine.serving.frontend import Frontend
from sensorium.ray.data.fronts import (
    Prompts,
    engine_frontend,
    preparing_frontend,
    prompts_of_request,
)
from sensorium.server.app import build_app
from sensorium.server.batches.calls import AppCaller, Reply
from sensorium.server.batches.isolation import Deaths, Gate, Patience, error_reply, in_turn
from sensorium.server.batches.lines import Line
from sensorium.server.batches.runner import Outcome, answered
from sensorium.server.models.facts import read_facts
from sensorium.server.models.lookup import ServedModels
from sensorium.server.models.served import ServedModel

_LEAST_OWN_FAULT, _LEAST_OTHER_FAULT, _UNKNOWN = 400, 500, 404


class Stage(Protocol):
    """Work of one of the two stages on rows. Belongs to one event loop."""

    async def start(self) -> None:
        """Get ready. Raises ConfigError."""
        ...

    async def run(self, work: Any, prompts: Prompts) -> Any:
        """Return what becomes of a row; None for nothing yet, or nothing any more."""
        ...

    def failed(self, work: Any, code: str, message: str) -> Any:
        """Return what becomes of a row that ``run`` cannot run."""
        ...

    async def close(self) -> None:
        """Free everything."""
        ...


class LineStage:
    """Caller of the application of one model: a ``Stage`` of lines, see the two below."""

    def __init__(self, config: ServedConfig) -> None:
        self._config = config
        self._gate, self._patience = Gate(), Patience()

    async def start(self) -> None:
        """See ``Stage.start``."""
        model = ServedModel(self._config, self._frontend)
        self._models = ServedModels([model], None, read_facts=read_facts)
        app = build_app(self._models, self._config.server)
        self._caller = AppCaller(app, "", below=False)
        await self._models.start()

    async def close(self) -> None:
        """See ``Stage.close``."""
        await self._models.close()

    def failed(self, work: Line, code: str, message: str) -> Outcome:
        """See ``Stage.failed``."""
        return answered(work, error_reply(code, message))

    async def _frontend(self, config: EngineConfig) -> Frontend:
        raise NotImplementedError

    async def _reply(self, line: Line, prompts: Prompts) -> Reply | None:
        """Return the answer to a line; None when it was refused for now, for too long."""
        deaths = Deaths()
        with prompts_of_request(prompts):
            return await self._patience.repeat(
                lambda: in_turn(self._caller, self._gate, deaths, line.url, line.body)
            )


class LinePreparation(LineStage):
    """First stage: prepares the prompts of a line, and answers what cannot be served."""

    async def run(self, work: Line, prompts: Prompts) -> Outcome | None:
        """Return the error of a line; None for one whose prompts are ready, or left to the next."""
        reply = await self._reply(work, prompts)
        if reply is None or not _LEAST_OWN_FAULT <= reply.status < _LEAST_OTHER_FAULT:
            return None
        if reply.status == _UNKNOWN and self._config.engine.lora.enable_lora:
            return None  # adapters are known where the engine is
        return answered(work, reply)

    async def _frontend(self, config: EngineConfig) -> Frontend:
        return await asyncio.to_thread(preparing_frontend, config)


class LineAnswer(LineStage):
    """Second stage: answers a line whose prompts are ready."""

    async def run(self, work: Line, prompts: Prompts) -> Outcome | None:
        """Return the output of a line; None when the engine was away for too long."""
        reply = await self._reply(work, prompts)
        return None if reply is None else answered(work, reply)

    async def _frontend(self, config: EngineConfig) -> Frontend:
        return await engine_frontend(config)
