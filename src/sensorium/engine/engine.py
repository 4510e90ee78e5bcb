"""The engine: one loop of schedule, execute, commit.

``Engine.step`` asks the scheduler for a plan, lets the runner execute it on the device, and commits
the result, which gives updates of sequences. ``LLM`` calls it in the caller's thread; in a server
``engine.serving.worker`` calls it in a process of its own.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from sensorium.core.plan import StepPlan, StepResult
from sensorium.core.request import EngineRequest, SequenceUpdate
from sensorium.core.scheduler import Scheduler
from sensorium.engine.adapters import EngineAdapters, NamedAdapter
from sensorium.engine.grammar.matchers import ConstrainedRequests
from sensorium.engine.iterations import IterationTokens
from sensorium.engine.stations import EngineStations
from sensorium.engine.stats import EngineFacts, EngineStats
from sensorium.errors import InvalidRequestError, SensoriumError
from sensorium.multimodal.items import Features
from sensorium.runtime.encoder import FeatureStore
from sensorium.text.grammar.grammar import Budget, GrammarMatcher

MATCHER_SECONDS = 0.005
"""Most time that a step waits for a grammar matcher when it has nothing to compute."""

LARGEST_COPY = 64 << 20
"""Most bytes of an item's embeddings that are given away: copying them holds steps up."""


class Runner(Protocol):
    """Interface of a model runner."""

    def execute(self, plan: StepPlan) -> StepResult:
        """Execute a plan; failures of single sequences and items are in the result."""
        ...

    def reset(self) -> None:
        """Drop all sequences and encoder outputs."""
        ...

    def encoded(self, digest: bytes) -> torch.Tensor | None:
        """Return the encoder output (num_embeds, H) of an item; None where it is not kept."""
        ...


class Engine:
    """A scheduler, a runner, and the features of the requests that have not ended. Not thread-safe.

    Args:
        scheduler: Decides what each step computes.
        runner: Executes plans; any object with the methods of ``Runner``.
        store: Features of admitted requests, from which the runner encodes items.
        facts: What the model and this machine allow, for those who prepare requests.
        new_matcher: Makes the matcher of a grammar, in another thread; requests with a constraint
            are admitted when theirs is there.
        traces: Updates tell when the prompt of a sequence was computed.
        adapters: The adapters of the model, loaded so far.
        release: Ends the processes that compute a part of the model; refers to no engine.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        store: FeatureStore,
        facts: EngineFacts,
        new_matcher: Callable[[str, Budget], GrammarMatcher],
        *,
        traces: bool = False,
        adapters: EngineAdapters | None = None,
        release: Callable[[], object] = lambda: None,
    ) -> None:
        self.release = release
        self._adapters = adapters or EngineAdapters()
        self.facts = dataclasses.replace(facts, adapters=self._adapters.facts)
        self._constrained = ConstrainedRequests(new_matcher)
        self._scheduler = scheduler
        self._runner = runner
        self._store = store
        self._num_prompt_tokens = 0
        self._item_tokens: Counter[str] = Counter()
        self._iterations = IterationTokens()
        self._stations = EngineStations(traces=traces)

    @property
    def has_work(self) -> bool:
        """Return True if a step would do something."""
        return self._scheduler.has_work or len(self._constrained) > 0

    def add(self, request: EngineRequest, features: tuple[Features, ...] = ()) -> None:
        """Admit a request with the features of its items, in order.

        Raises RequestError when it can never be served.
        """
        if len(features) != len(request.items):
            raise ValueError(f"{len(request.items)} items, but {len(features)} features")
        if request.grammar is None:
            self._admit(request, features)
            return
        if request.request_id in self._constrained:
            raise InvalidRequestError(f"Request id {request.request_id!r} is in use.")
        self._scheduler.limits.check(request)
        self._constrained.put(request, features)

    def _admit(self, request: EngineRequest, features: tuple[Features, ...]) -> None:
        self._scheduler.add(request)
        self._store.put(request.request_id, features)
        self._num_prompt_tokens += len(request.token_ids)
        for item in request.items:
            self._item_tokens[item.modality] += item.num_embeds
        self._iterations.admitted(request)

    def abort(self, request_id: str) -> None:
        """End a request; unknown ids are ignored, since it may just have finished."""
        self._constrained.discard(request_id)
        self._scheduler.abort(request_id)
        self._store.discard(request_id)
        self._iterations.discard(request_id)
        self._stations.discard(request_id)

    def step(self) -> list[SequenceUpdate]:
        """Run one step and return the updates of its sequences."""
        refused = self._admit_constrained() if len(self._constrained) else []
        if not self._scheduler.has_work:
            return refused
        plan = self._scheduler.schedule()
        if self._stations.wanted:
            self._stations.scheduled(plan)
        result = self._runner.execute(plan)
        updates = self._scheduler.commit(plan, result)
        if self._stations.wanted:
            updates = self._stations.committed(plan, result.encoded, updates)
        self._iterations.count(updates)
        for update in updates:
            if update.finish_reason is not None:
                self._store.discard(update.request_id)
        return [*refused, *updates]

    def _admit_constrained(self) -> list[SequenceUpdate]:
        """Admit the requests whose matchers are ready; return updates of those that failed."""
        refused = []
        for arrival in self._constrained.take(0 if self._scheduler.has_work else MATCHER_SECONDS):
            error = arrival.error
            if error is None:
                try:
                    self._admit(arrival.request, arrival.features)
                except SensoriumError as refusal:
                    error = refusal.message
            if error is not None:
                request_id = arrival.request.request_id
                refused.append(SequenceUpdate(request_id, finish_reason="error", error=error))
        return refused

    def reset(self) -> None:
        """Drop all requests and caches, whatever state an interrupted call has left."""
        self._constrained.clear()
        self._scheduler.reset()
        self._runner.reset()
        self._store.clear()
        self._iterations.forget()
        self._stations.clear()

    def load_adapter(self, name: str, path: str, folder: str = "") -> None:
        """Load an adapter, which ``facts`` have from then on. Raises ConfigError."""
        self.add_adapter(self.read_adapter(name, path, folder))

    def adapter_bytes(self, name: str, path: str) -> tuple[str, int]:
        """Return the folder of an adapter, and the memory that it will take. Raises ConfigError."""
        return self._adapters.bytes_of(name, path)

    def read_adapter(
        self,
        name: str,
        path: str,
        folder: str = "",
        progress: Callable[[], object] | None = None,
    ) -> NamedAdapter:
        """Read an adapter; any thread may, also during a step. Raises ConfigError.

        progress: called after each of its modules.
        """
        return self._adapters.read(name, path, folder, progress)

    def add_adapter(self, adapter: NamedAdapter) -> None:
        """Take an adapter that was read, as ``load_adapter``. Raises ConfigError."""
        self._adapters.add(adapter)
        self.facts = dataclasses.replace(self.facts, adapters=self._adapters.facts)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter that no request uses. Raises ConfigError for an unknown name."""
        self._adapters.unload(name)
        self.facts = dataclasses.replace(self.facts, adapters=self._adapters.facts)

    def embeddings(self, digest: bytes) -> tuple[np.ndarray | None, str]:
        """Return the bits of an item's encoder output, uint8 (num_embeds, bytes), and its dtype.

        None in place of those that are not kept any more, or are larger than ``LARGEST_COPY``.
        """
        found = self._runner.encoded(digest)
        if found is None or found.nbytes > LARGEST_COPY or not found.is_contiguous():
            return None, ""
        return found.cpu().view(torch.uint8).numpy(), str(found.dtype).removeprefix("torch.")

    def check_integrity(self) -> None:
        """Raise AssertionError when bookkeeping contradicts itself; cheap when idle."""
        self._scheduler.check_integrity()
        if not self._scheduler.has_work and len(self._store):
            raise AssertionError(f"{len(self._store)} requests' features are held without work")

    def stats(self) -> EngineStats:
        """Return a snapshot of gauges and counters."""
        core = self._scheduler.stats()
        return EngineStats(
            num_ranks=self.facts.num_ranks,
            num_running=core.num_running,
            num_waiting=core.num_waiting + len(self._constrained),
            num_deferred=len(self._constrained),
            waiting_tokens=core.num_waiting_tokens,
            block_size=self._scheduler.limits.block_size,
            cache_dtype=self.facts.cache_dtype,
            enable_prefix_caching=self._scheduler.limits.enable_prefix_caching,
            kv_blocks_total=core.num_blocks,
            kv_blocks_used=core.num_used_blocks,
            prefix_queries=core.num_prefix_queries,
            prefix_hits=core.num_prefix_hits,
            encoder_queries=core.num_encoder_queries,
            encoder_hits=core.num_encoder_hits,
            encoder_items=core.num_encoder_queries - core.num_encoder_hits,
            encoder_resident_embeds=core.num_resident_embeds,
            encoder_num_bytes=core.num_resident_embeds * self.facts.embed_bytes,
            encoder_capacity_bytes=core.num_embeds_capacity * self.facts.embed_bytes,
            encoder_evictions=core.num_encoder_evictions,
            encode_items=core.num_encoded_items,
            encode_seconds=core.encode_seconds,
            encode_num_bytes=core.num_encoded_bytes,
            encode_failures=core.num_encode_failures,
            num_unusable=core.num_unusable,
            num_drafts=core.num_drafts,
            num_draft_tokens=core.num_draft_tokens,
            num_accepted_tokens=core.num_accepted_tokens,
            num_accepted_at=core.num_accepted_at,
            num_preemptions=core.num_preemptions,
            computed_tokens=core.num_computed_tokens,
            prompt_tokens=self._num_prompt_tokens,
            generation_tokens=core.num_generated_tokens,
            num_embeddings=core.num_embeddings,
            num_steps=core.num_steps,
            iteration_counts=list(self._iterations.counts),
            iteration_tokens=self._iterations.num_tokens,
            held_features=len(self._store),
            item_tokens=dict(self._item_tokens),
            max_loras=self._adapters.max_loras,
            lora_num_bytes=self._adapters.nbytes,
            lora_capacity_bytes=self._adapters.most_bytes,
            running_adapters=self._adapters.names(core.running_adapters),
            waiting_adapters=self._adapters.names(core.waiting_adapters),
        )
