"""A scheduler and a ``FakeRunner`` driven step by step, with every check after every operation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from sensorium.core.limits import SchedulerLimits
from sensorium.core.plan import StepPlan, StepResult
from sensorium.core.request import EngineRequest, ItemSpan, SequenceUpdate
from sensorium.core.scheduler import Scheduler
from sensorium.params import PoolingParams, SamplingParams
from tests.fakes import FakeRunner, ManualClock

PLACEHOLDER = 9


@dataclass
class Outcome:
    """What a request has got so far."""

    token_ids: list[int] = field(default_factory=list)
    updates: list[SequenceUpdate] = field(default_factory=list)

    @property
    def last(self) -> SequenceUpdate:
        return self.updates[-1]

    @property
    def finish_reason(self) -> str | None:
        return self.updates[-1].finish_reason if self.updates else None


class Driver:
    """Runs plans as the engine would. ``limits`` override those of a roomy little engine."""

    def __init__(self, *, vocab_size: int = 64, **limits: Any) -> None:
        roomy = {
            "max_num_seqs": 8,
            "max_num_batched_tokens": 64,
            "max_model_len": 256,
            "num_blocks": 64,
            "block_size": 4,
            "encode_budget": 32,
            "encoder_cache_size": 64,
        }
        self.limits = SchedulerLimits(**(roomy | limits))
        self.clock = ManualClock()
        self.scheduler = Scheduler(self.limits, clock=self.clock)
        self.runner = FakeRunner(
            block_size=self.limits.block_size,
            num_blocks=self.limits.num_blocks,
            vocab_size=vocab_size,
            encoder_cache_size=self.limits.encoder_cache_size,
            encode_budget=self.limits.encode_budget,
            window=self.limits.window,
        )
        self.outcomes: dict[str, Outcome] = {}
        self.num_steps = 0

    def add(self, *requests: EngineRequest) -> None:
        for request in requests:
            self.scheduler.add(request)
            self.outcomes[request.request_id] = Outcome()
            self.scheduler.check_integrity()

    def abort(self, request_id: str) -> None:
        self.scheduler.abort(request_id)
        self.scheduler.check_integrity()

    def schedule(self) -> StepPlan:
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        assert plan.num_tokens <= self.limits.max_num_batched_tokens
        assert len(plan.spans) <= self.limits.max_num_seqs
        return plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[SequenceUpdate]:
        updates = self.scheduler.commit(plan, result)
        self.scheduler.check_integrity()
        assert self.scheduler.stats().num_resident_embeds == self.runner.num_resident_embeds
        for update in updates:
            outcome = self.outcomes[update.request_id]
            assert outcome.finish_reason is None, "news of a request that has ended"
            outcome.updates.append(update)
            if update.sample is not None:
                outcome.token_ids.append(update.sample.token_id)
        self.num_steps += 1
        return updates

    def step(self, *, abort_midway: str | None = None) -> StepPlan:
        plan = self.schedule()
        if abort_midway is not None:
            self.abort(abort_midway)
        self.commit(plan, self.runner.execute(plan))
        return plan

    def run(self, *, max_steps: int = 1000) -> dict[str, Outcome]:
        """Step until nothing is left, and check that nothing is left."""
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, f"not done after {max_steps} steps"
        assert self.scheduler.stats().num_used_blocks == 0
        assert self.runner.num_held == 0
        return self.outcomes


def request(
    request_id: str,
    prompt: int | list[int] = 6,
    max_tokens: int = 4,
    *,
    items: list[ItemSpan] | None = None,
    eos: tuple[int, ...] = (),
    salt: bytes = b"",
    priority: int = 0,
    rope: tuple[int, int] = (0, 0),
    predicted: list[int] | None = None,
    **params: Any,
) -> EngineRequest:
    """A request; a number as prompt stands for that many tokens, different for each id."""
    if isinstance(prompt, int):
        seed = sum(request_id.encode()) * 7
        prompt = [100 + (seed + i * i) % 101 for i in range(prompt)]
    return EngineRequest(
        request_id=request_id,
        token_ids=tuple(prompt),
        params=SamplingParams(max_tokens=max_tokens, **params),
        max_tokens=max_tokens,
        eos_token_ids=eos,
        items=tuple(items or ()),
        cache_salt=salt,
        priority=priority,
        predicted_ids=tuple(predicted or ()),
        rope_border=rope[0],
        rope_length=rope[1],
    )


def pooling_request(
    request_id: str,
    prompt: int | list[int] = 6,
    *,
    items: list[ItemSpan] | None = None,
    **options: Any,
) -> EngineRequest:
    """A request for a vector, otherwise as ``request``."""
    made = request(request_id, prompt, 1, items=items, **options)
    pooling = PoolingParams(normalize=True)
    return dataclasses.replace(made, params=SamplingParams(), max_tokens=0, pooling=pooling)


def item(name: str, start: int, length: int, modality: str = "image") -> ItemSpan:
    """An item with one run."""
    return ItemSpan(name.encode(), modality, ((start, length),))


def media_prompt(*parts: int | tuple[str, int]) -> tuple[list[int], list[ItemSpan]]:
    """Token ids and items: a number is a text token, ``("cat", 5)`` an item of five embeddings."""
    ids: list[int] = []
    items = []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
        else:
            items.append(item(part[0], len(ids), part[1]))
            ids += [PLACEHOLDER] * part[1]
    return ids, items
