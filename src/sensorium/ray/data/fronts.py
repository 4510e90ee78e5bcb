"""Frontends of the two stages: one prepares prompts, the other runs them on an engine.

Both are the server's own. In the first, the engine is a stand-in that answers at once, and what was
prepared is kept. In the second, prompts that come prepared are not prepared again. So a request has
the same limits and errors as on one machine, and media are loaded where no engine is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sensorium.config import GIB, EngineConfig
from sensorium.core.request import EngineRequest, SequenceUpdate
from sensorium.engine.prompts.input_processor import InputProcessor
from sensorium.engine.prompts.types import ChatPrompt, PreparedPrompt, Prompt
from sensorium.engine.serving.client import OutputQueue
from sensorium.engine.serving.frontend import Frontend, started
from sensorium.engine.serving.supervisor import EngineSupervisor
from sensorium.engine.stats import EngineFacts, EngineStats
from sensorium.models.registry import resolve
from sensorium.multimodal.items import Features, MediaItem
from sensorium.ray.media.copies import FeatureCopies

_NO_EMBEDDING = np.ones(1, "<f4").tobytes()


@dataclass(slots=True)
class Prompts:
    """The prepared prompts of one request, by their places in it.

    ``context``: the longest prompt and answer that was assumed.
    """

    context: int = 0
    prepared: dict[str, PreparedPrompt] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of the features of all items."""
        items = (item for prompt in self.prepared.values() for item in prompt.items)
        return sum(item.features.num_bytes for item in items)


_prompts: ContextVar[Prompts] = ContextVar("prompts")


@contextmanager
def prompts_of_request(prompts: Prompts) -> Iterator[Prompts]:
    """Keep what is prepared in this context, or use what is there."""
    token = _prompts.set(prompts)
    try:
        yield prompts
    finally:
        _prompts.reset(token)


class PreparingProcessor(InputProcessor):
    """Keeps the prompts that it prepares, with their media as arrays that can be sent."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config, trust_request_chat_template=True, package_files=True)
        longest = resolve(self._loaded.config).shape(self._loaded).max_position
        self.context = min(config.model.max_model_len or longest, longest)
        self.set_facts(assumed_facts(self.context))

    async def prepare(self, prompt: Prompt) -> PreparedPrompt:
        """See ``InputProcessor.prepare``."""
        prepared = await super().prepare(prompt)
        kept = _prompts.get(None)
        if kept is not None:
            kept.context = self.context
            items = tuple(map(_portable, prepared.items))
            kept.prepared[prompt.param] = dataclasses.replace(prepared, items=items)
        return prepared


class ReadyProcessor(InputProcessor):
    """Takes prompts that come prepared as they are, and prepares others."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config, trust_request_chat_template=True, shared=True, package_files=True)
        self._copies = FeatureCopies(int(config.cache.mm_processor_cache_gb * GIB))

    def close(self) -> None:
        """See ``InputProcessor.close``."""
        super().close()
        self._copies.close()

    async def prepare(self, prompt: Prompt) -> PreparedPrompt:
        """See ``InputProcessor.prepare``."""
        ready = _prompts.get(None)
        prepared = None if ready is None else ready.prepared.pop(prompt.param, None)
        if ready is None or prepared is None:
            return await super().prepare(prompt)
        if ready.context != self._context and _depends_on_context(prompt):
            return await super().prepare(prompt)
        self._room(len(prepared.token_ids), prompt.param)
        items = [await self._shared(item) for item in prepared.items]
        return dataclasses.replace(prepared, items=tuple(items))

    async def _shared(self, item: MediaItem) -> MediaItem:
        """Return an item whose features the engine can open, once by digest."""

        async def own() -> Features:
            return item.features

        features = await self._copies.get(item.digest, own)
        return dataclasses.replace(item, features=features)


def preparing_frontend(config: EngineConfig) -> Frontend:
    """Return a frontend without an engine, whose outputs are empty. Raises ConfigError."""
    processor = PreparingProcessor(config)
    engine: Any = _StandIn(assumed_facts(processor.context))
    return Frontend(config, processor, engine)


async def engine_frontend(config: EngineConfig) -> Frontend:
    """Start an engine, and return its frontend. Raises ConfigError."""
    engine = EngineSupervisor(config)
    processor = await started(engine, lambda: ReadyProcessor(config))
    return Frontend(config, processor, engine)


class _StandIn:
    """Stand-in for an ``EngineSupervisor`` and its client: every request ends at once."""

    alive = True
    num_restarts = 0

    def __init__(self, facts: EngineFacts) -> None:
        self.facts = facts

    def current(self) -> _StandIn:
        """Return the client of the engine."""
        return self

    def submit(
        self, request: EngineRequest, items: Sequence[MediaItem], output_queue: OutputQueue
    ) -> None:
        """End a request without output."""
        embedding = None if request.pooling is None else _NO_EMBEDDING
        update = SequenceUpdate(request.request_id, finish_reason="stop", embedding=embedding)
        output_queue.put_nowait(update)

    def abort(self, request_ids: Sequence[str]) -> None:
        """End requests, which have all ended."""

    async def stats(self) -> EngineStats:
        """Return counters, all 0."""
        return EngineStats()

    async def stop(self) -> None:
        """End nothing."""


def assumed_facts(context: int) -> EngineFacts:
    """Return facts of an engine that is not there, of which requests depend on the context."""
    return EngineFacts(
        max_model_len=context,
        num_kv_blocks=0,
        block_size=1,
        max_num_batched_tokens=0,
        device="cpu",
        dtype="float32",
        num_threads=1,
        load_seconds=0.0,
    )


def _portable(item: MediaItem) -> MediaItem:
    """Return an item whose arrays can be pickled, without a copy of them."""
    arrays = dict(item.features.arrays)
    return dataclasses.replace(item, features=dataclasses.replace(item.features, arrays=arrays))


def _depends_on_context(prompt: Prompt) -> bool:
    """Return True for a prompt that is cut to the context of the engine."""
    if isinstance(prompt, ChatPrompt):
        return prompt.drops_turns
    return prompt.truncation is not None
