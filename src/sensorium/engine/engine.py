"""The loop: schedule, run, commit."""

from __future__ import annotations

from typing import Protocol

from sensorium.core.plan import StepPlan, StepResult
from sensorium.core.request import EngineRequest, SequenceUpdate
from sensorium.core.scheduler import Scheduler
from sensorium.engine.stats import EngineFacts, EngineStats
from sensorium.runtime.encoder import FeatureSource, FeatureStore


class Runner(Protocol):
    """What the engine asks of a model runner."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one plan."""
        ...

    def reset(self) -> None:
        """Forget all sequences and encoder outputs."""
        ...


class Engine:
    """One scheduler, one runner, and the features that admitted requests still need. Not thread-safe."""

    def __init__(
        self, scheduler: Scheduler, runner: Runner, store: FeatureStore, facts: EngineFacts
    ) -> None:
        self.facts = facts
        self._scheduler = scheduler
        self._runner = runner
        self._store = store
        self._num_prompt_tokens = 0

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return self._scheduler.has_work

    def add(self, request: EngineRequest, features: tuple[FeatureSource, ...] = ()) -> None:
        """Admit a request. Raises RequestError when it can never be served."""
        if len(features) != len(request.items):
            raise ValueError(f"{len(request.items)} items, but {len(features)} features")
        self._scheduler.add(request)
        self._store.put(request.request_id, features)
        self._num_prompt_tokens += len(request.token_ids)

    def abort(self, request_id: str) -> None:
        """End a request; unknown ids are ignored, for it may just have finished."""
        self._scheduler.abort(request_id)
        self._store.discard(request_id)

    def step(self) -> list[SequenceUpdate]:
        """Compute one step and return the news of every sequence that moved."""
        plan = self._scheduler.schedule()
        result = self._runner.execute(plan)
        updates = self._scheduler.commit(plan, result)
        for update in updates:
            if update.finish_reason is not None:
                self._store.discard(update.request_id)
        return updates

    def reset(self) -> None:
        """Forget all requests and all that is cached, whatever state an interrupted call has left."""
        self._scheduler.reset()
        self._runner.reset()
        self._store.clear()

    def check_integrity(self) -> None:
        """Raise AssertionError when the books do not balance; cheap enough to call when idle."""
        self._scheduler.check_integrity()
        if not self._scheduler.has_work and len(self._store):
            raise AssertionError(f"{len(self._store)} requests' features are held without work")

    def stats(self) -> EngineStats:
        """A snapshot of the counters."""
        core = self._scheduler.stats()
        return EngineStats(
            num_running=core.num_running,
            num_waiting=core.num_waiting,
            kv_blocks_total=core.num_blocks,
            kv_blocks_used=core.num_used_blocks,
            prefix_queries=core.num_prefix_queries,
            prefix_hits=core.num_prefix_hits,
            encoder_queries=core.num_encoder_queries,
            encoder_hits=core.num_encoder_hits,
            encoder_items=core.num_encoder_queries - core.num_encoder_hits,
            encoder_resident_embeds=core.num_resident_embeds,
            num_preemptions=core.num_preemptions,
            computed_tokens=core.num_computed_tokens,
            prompt_tokens=self._num_prompt_tokens,
            generation_tokens=core.num_generated_tokens,
            num_vectors=core.num_vectors,
            num_steps=core.num_steps,
            held_features=len(self._store),
        )
