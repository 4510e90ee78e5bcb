"""One model of a server: its names, its state, and its engine while that runs."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sensorium.config import EngineConfig, ServedConfig
from sensorium.engine.serving.client import STOPPING
from sensorium.engine.stats import EncodersApart, EngineStats
from sensorium.errors import (
    NOT_LOADED,
    EngineDeadError,
    OverloadedError,
    SensoriumError,
    UnavailableError,
)
from sensorium.metrics.prometheus import ServingMetrics
from sensorium.server.admission import Admission
from sensorium.server.context import ModelContext, ServingContext
from sensorium.server.models.facts import ModelFacts
from sensorium.server.models.reasons import UNEXPECTED, without_places
from sensorium.text.detokenizer import TokenSpelling
from sensorium.text.tools.forms import AnswerForms

if TYPE_CHECKING:
    from sensorium.engine.serving.engines import ReplicaStats
    from sensorium.engine.serving.frontend import Frontend

logger = logging.getLogger("sensorium.server")

ModelState = Literal["loading", "ready", "stopped", "failed"]
StartEngine = Callable[[EngineConfig], Awaitable["Frontend"]]
"""Starts an engine and its front; raises ConfigError when the model cannot be loaded."""
MakeRoom = Callable[["ServedModel"], Awaitable[EngineConfig]]
"""Reserves memory for a model, and returns the options that keep its engine within it."""

FIRST_RETRY, LONGEST_RETRY = 10.0, 600.0
"""Seconds after which a model that could not be loaded is tried again, if a request asks for it;
after each failure twice as long."""
USUAL_LOAD = 5
"""Seconds that a client is told to wait for a model whose load has not been timed."""


@dataclass(frozen=True, slots=True)
class _Failure:
    """The reason why a model could not be loaded, for clients, and when it may be tried again."""

    reason: str
    retry_at: float


class ServedModel:
    """A model that requests may name. Belongs to one event loop.

    A request holds the model from its body to the last byte of its answer; a model that is held is
    never ended. ``loaded`` starts the engine if need be.

    Attributes:
        names: Names that requests may use; answers have the first by default.
        config: The server's options as they hold for this model.
        facts: What is known of it; None if nothing is before it is loaded.
        held_bytes: Memory that is reserved for its engine.
        metrics: Where its requests are reported.
        admission: Counts its requests that wait.
    """

    metrics: ServingMetrics
    admission: Admission

    def __init__(
        self,
        config: ServedConfig,
        start: StartEngine,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.names = config.names
        self.config = config.server
        self.engine_config = config.engine
        self.last_used = clock()
        self.facts: ModelFacts | None = None
        self.held_bytes = 0
        self._start = start
        self._clock = clock
        self._make_room: MakeRoom | None = None
        self._server: ServingContext | None = None
        self._context: ModelContext | None = None
        self._starting: asyncio.Task[ModelContext] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._failure: _Failure | None = None
        self._num_failures = 0
        self._num_uses = 0
        self._num_waiting = 0
        self._load_seconds: float = USUAL_LOAD
        self._stats: EngineStats | None = None
        self._is_closed = False

    @property
    def name(self) -> str:
        """Return the first of its names."""
        return self.names[0]

    @property
    def adapters(self) -> tuple[str, ...]:
        """Return the names of its LoRA adapters; while it has no engine, those it starts with."""
        if self._context is not None:
            return tuple(adapter.name for adapter in self._context.frontend.adapters)
        return tuple(module.name for module in self.engine_config.lora.modules())

    @property
    def context(self) -> ModelContext | None:
        """Return what its requests are answered with; None while it has no engine."""
        return self._context

    @property
    def state(self) -> ModelState:
        """Return "loading" also while an engine that has died is being replaced."""
        if self._context is not None:
            return "ready" if self.is_available else "loading"
        if self._starting is not None:
            return "loading"
        return "stopped" if self._failure is None else "failed"

    @property
    def reason(self) -> str | None:
        """Return the reason why the model could not be loaded; None in other states."""
        if self._failure is None or self.state != "failed":
            return None
        return self._failure.reason

    @property
    def is_available(self) -> bool:
        """Return True when a request that came now would be answered, perhaps after a load."""
        try:
            self.check_available()
        except UnavailableError:
            return False
        return True

    @property
    def is_idle(self) -> bool:
        """Return True when it has an engine that no request needs."""
        return self._context is not None and self._num_uses == 0

    def check_available(self) -> None:
        """Raise UnavailableError when a request that came now would not be answered."""
        if self._context is not None:
            self._context.frontend.check_alive()
        elif self._starting is None:
            self._check_retry()

    def attach(
        self, server: ServingContext, metrics: ServingMetrics, make_room: MakeRoom | None = None
    ) -> None:
        """Make the model one of a server, before anything else is done with it."""
        self._server, self._make_room = server, make_room
        self.metrics = metrics
        self.admission = Admission(self.engine_config.scheduler.max_num_waiting, server.arrivals)

    def hold(self) -> None:
        """Count a request that uses the model, until ``release``."""
        self._num_uses += 1
        self.last_used = self._clock()

    def release(self) -> None:
        """Count a request less."""
        self._num_uses -= 1
        self.last_used = self._clock()

    async def loaded(self) -> ModelContext:
        """Return what requests are answered with; start the engine first if it does not run.

        The caller holds the model. Cancelling does not end the start, which others may wait for.

        Raises:
            UnavailableError: The model cannot be loaded, too many requests wait for it already, or
                there is no memory for it as long as others are in use.
        """
        if self._context is not None:
            return self._context
        if self._num_waiting >= self.admission.max_waiting:
            raise self._overloaded()
        self._num_waiting += 1
        try:
            return await self._waited(self.start())
        finally:
            self._num_waiting -= 1

    def start(self) -> asyncio.Task[ModelContext]:
        """Begin to start the engine, unless that has begun, and return the result to come.

        Raises UnavailableError while the next attempt after a failure may not begin yet.
        """
        if self._starting is None:
            if self._is_closed:
                raise EngineDeadError(STOPPING)
            self._check_retry()
            self._starting = asyncio.create_task(self._load())
            self._starting.add_done_callback(_retrieve)
        return self._starting

    def adopt(self, frontend: Frontend) -> ModelContext:
        """Use an engine that runs. Raises ConfigError for unknown parsers."""
        assert self._server is not None
        frontend.metrics = self.metrics
        processor = frontend.input_processor
        self._context = ModelContext(
            server=self._server,
            model=self,
            config=self.config,
            frontend=frontend,
            admission=self.admission,
            spelling=TokenSpelling(processor.tokenizer),
            forms=AnswerForms.of(
                processor.template_text,
                processor.tokenizer,
                calls=self.config.tool_call_parser,
                reasoning=self.config.reasoning_parser,
            ),
        )
        self.facts = ModelFacts.of(frontend)
        self._failure, self._num_failures = None, 0
        self.last_used = self._clock()
        return self._context

    async def end(self) -> None:
        """End the engine; the next request starts another. Only while the model is idle."""
        context, self._context = self._context, None
        if context is None:
            return
        self._ending = asyncio.create_task(self._shut_down(context))
        await asyncio.shield(self._ending)

    async def ended(self) -> None:
        """Wait until an engine that is being ended, if any, is gone with its memory."""
        if self._ending is not None:
            await asyncio.wait((self._ending,))

    def forget_adapter(self, name: str) -> None:
        """Let later engines start without an adapter of ``--lora-modules``."""
        lora = self.engine_config.lora
        modules = zip(lora.lora_modules, lora.modules(), strict=True)
        left = tuple(text for text, module in modules if module.name != name)
        if left != lora.lora_modules:
            lora = dataclasses.replace(lora, lora_modules=left)
            self.engine_config = dataclasses.replace(self.engine_config, lora=lora)

    async def close(self) -> None:
        """End the engine, also one that starts, for good; requests that run get an error."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._starting is not None:
            self._starting.cancel()
        running = [task for task in (self._starting, self._ending) if task is not None]
        await asyncio.gather(*running, return_exceptions=True)
        if self._context is not None:
            await self._context.frontend.shutdown()

    async def stats(self) -> EngineStats | None:
        """Return the engine's counters, the last ones while none runs; None before the first."""
        if self._context is not None:
            self._stats = await self._context.frontend.stats()
        return self._stats

    async def replica_stats(self) -> dict[str, ReplicaStats]:
        """Return the counters of each replica by its name; nothing where there is one engine."""
        return {} if self._context is None else await self._context.frontend.replica_stats()

    def media_stats(self) -> dict[str, float]:
        """Return the counters of the media that this process loads for replicas, by name."""
        return {} if self._context is None else self._context.frontend.media_stats()

    def encoder_stats(self) -> EncodersApart | None:
        """Return the counters of replicas that encode media apart; None where engines do."""
        return None if self._context is None else self._context.frontend.encoder_stats()

    async def _load(self) -> ModelContext:
        began = self._clock()
        try:
            if self._ending is not None:  # the engine before
                await asyncio.wait((self._ending,))
            config = self.engine_config
            if self._make_room is not None:
                config = await self._make_room(self)
            frontend = await self._start(config)
            try:
                context = self.adopt(frontend)
            except BaseException:
                await frontend.shutdown()
                raise
        except OverloadedError:
            raise
        except SensoriumError as error:
            self._fail(error.message)
            raise
        except Exception as error:
            logger.exception("the model %r could not be loaded", self.name)
            self._fail(f"{type(error).__name__}: {error}", UNEXPECTED)
            raise UnavailableError(f"The model {self.name!r} {NOT_LOADED}.") from error
        finally:
            self._starting = None
            if self._context is None:
                self.held_bytes = 0
        self._load_seconds = self._clock() - began
        return context

    def _check_retry(self) -> None:
        """Raise UnavailableError while the next attempt after a failure may not begin yet."""
        if self._failure is not None and self._clock() < self._failure.retry_at:
            raise self._failed()

    def _fail(self, reason: str, shown: str | None = None) -> None:
        """Note a failure; clients see ``shown``, else the reason without places on this machine."""
        if self._num_uses:  # else the start of the server tells of it
            logger.error("failed to load the model %r: %s", self.name, reason)
        if shown is None:
            shown = without_places(reason, self.engine_config.model.model, self.name)
        seconds = min(LONGEST_RETRY, FIRST_RETRY * 2.0 ** min(self._num_failures, 16))
        self._num_failures += 1
        self._failure = _Failure(shown, self._clock() + seconds)

    def _failed(self) -> UnavailableError:
        """Return the error of a request while the model is not tried again."""
        assert self._failure is not None
        error = UnavailableError(
            f"The model {self.name!r} {NOT_LOADED}; GET /v1/models says why. Other models of this "
            "server are not affected."
        )
        error.retry_after = max(1, math.ceil(self._failure.retry_at - self._clock()))
        return error

    async def _waited(self, starting: asyncio.Task[ModelContext]) -> ModelContext:
        """Return the result of a start; raise an error of its own for each request that waits."""
        await asyncio.wait((starting,))
        if starting.cancelled():
            raise EngineDeadError(STOPPING)
        error = starting.exception()
        if error is None:
            return starting.result()
        if isinstance(error, OverloadedError) or self._failure is None:
            raise copy.copy(error)
        raise self._failed()

    def _overloaded(self) -> OverloadedError:
        error = OverloadedError(
            f"{self._num_waiting} requests wait for the model {self.name!r} to load; at most "
            f"{self.admission.max_waiting} may (--max-num-waiting). Try again later."
        )
        error.retry_after = max(1, math.ceil(self._load_seconds))
        return error

    async def _shut_down(self, context: ModelContext) -> None:
        try:
            self._stats = (await context.frontend.stats()).at_rest()  # for /metrics
            await context.frontend.shutdown()
        finally:
            self.held_bytes = 0


def _retrieve(starting: asyncio.Task[ModelContext]) -> None:
    """Look at the error of a start: nobody else may be waiting for it any more."""
    if not starting.cancelled():
        starting.exception()


def entry(model: ServedModel) -> dict[str, Any]:
    """Return the facts of a model that lists show, whatever its state."""
    facts = model.facts
    return {
        "state": model.state,
        "reason": model.reason,
        "max_model_len": facts.max_model_len if facts is not None else None,
        "modalities": ["text", *facts.modalities] if facts is not None else None,
    }
