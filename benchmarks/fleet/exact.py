"""A simulated engine with an event for each step, planned by the scheduler of real engines.

It is what ``engine.Engine`` is checked against; nothing of it is approximated but the time of a step.
"""

from __future__ import annotations

from functools import cache
from struct import pack
from typing import Any

import simpy

from benchmarks.fleet.caches import BLOCK
from benchmarks.fleet.engine import EngineShape, Job
from sensorium.core.limits import SchedulerLimits
from sensorium.core.plan import StepPlan, StepResult
from sensorium.core.request import EngineRequest, ItemSpan, TokenSample
from sensorium.core.scheduler import Scheduler
from sensorium.distributed.routing import ReplicaLoad
from sensorium.params import SamplingParams

PLACEHOLDER = 1


class ExactEngine:
    """One replica; ``submit``, ``load`` and the figures are those of ``engine.Engine``."""

    def __init__(self, env: simpy.Environment, name: str, shape: EngineShape) -> None:
        self.env, self.name, self.shape = env, name, shape
        self.scheduler = Scheduler(
            SchedulerLimits(
                max_num_seqs=shape.max_num_seqs,
                max_num_batched_tokens=shape.max_num_batched_tokens,
                max_model_len=1 << 20,
                num_blocks=shape.kv_tokens // BLOCK,
                block_size=BLOCK,
                encode_budget=shape.encoder_embeds,
                encoder_cache_size=shape.encoder_embeds,
            ),
            clock=lambda: env.now,
        )
        self.alive = True
        self.busy = 0.0
        self.num_jobs = self.num_steps = 0
        self._jobs: dict[str, Job] = {}
        self._runs = False
        self._uncomputed: dict[str, int] = {}
        self._tokens: dict[int, tuple[str, int]] = {}

    def submit(self, job: Job) -> None:
        """Take a request."""
        job.number, job.replica = self.num_jobs, self.name
        self.num_jobs += 1
        self._jobs[str(job.number)] = job
        self._uncomputed[str(job.number)] = job.request.num_tokens
        self.scheduler.add(engine_request(job))
        if not self._runs:
            self._runs = True
            self.env.process(self._run())

    def load(self) -> ReplicaLoad:
        """What it would report now."""
        stats = self.scheduler.stats()
        return ReplicaLoad(
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            waiting_tokens=sum(self._uncomputed.values()),
            kv_usage=stats.num_used_blocks / stats.num_blocks,
            kv_tokens=self.shape.kv_tokens,
            computed_tokens=stats.num_computed_tokens,
            encoder_items=stats.num_resident_embeds // 256,
            encoder_evictions=stats.num_encoder_evictions,
        )

    def _run(self) -> Any:
        while self.scheduler.has_work:
            plan = self.scheduler.schedule()
            if plan.spans:
                seconds = self._seconds(plan)
                self.busy += seconds
                self.num_steps += 1
                yield self.env.timeout(seconds)
            self._commit(plan)
        self._runs = False

    def _seconds(self, plan: StepPlan) -> float:
        for new in plan.new:
            self._tokens[new.seq_id] = (new.request.request_id, len(new.request.token_ids))
        for job in plan.encode:
            owner = self._jobs[self._tokens[job.seq_id][0]]
            owner.num_items += 1
        decoding = [s for s in plan.spans if s.start >= self._tokens[s.seq_id][1]]
        tokens = plan.num_tokens - len(decoding)
        return self.shape.costs.seconds(
            tokens,
            len(decoding),
            sum(span.start for span in decoding),
            len(plan.encode),
            sum(job.num_embeds for job in plan.encode),
        )

    def _commit(self, plan: StepPlan) -> None:
        samples: dict[int, tuple[TokenSample, ...]] = {}
        for span in plan.spans:
            name, num_tokens = self._tokens[span.seq_id]
            end = span.start + span.num_tokens
            if end >= num_tokens:
                self._uncomputed.pop(name, None)
            elif name in self._uncomputed:
                self._uncomputed[name] = num_tokens - end
            if span.samples:
                job = self._jobs[name]
                place = span.start + span.num_tokens - job.request.num_tokens
                samples[span.seq_id] = (TokenSample(piece(job.request.answer, 2048)[place]),)
        for update in self.scheduler.commit(plan, StepResult(plan.step_id, samples=samples)):
            job = self._jobs[update.request_id]
            if job.left >= 0:
                job.left = -1
                job.cached = update.num_cached_tokens
                job.items_met = len(job.request.media) - job.num_items
                job.first_token_at = self.env.now
                job.notify(job, "first")
            if update.finish_reason is not None:
                job.ended_at = self.env.now
                del self._jobs[update.request_id]
                job.notify(job, "ended")


@cache
def piece(number: int, tokens: int) -> tuple[int, ...]:
    """Tokens of a piece: others for each number."""
    return tuple((number * 2_654_435_761 + i * 40_503) % 1_000_003 + 2 for i in range(tokens))


def engine_request(job: Job) -> EngineRequest:
    """The request as engines get it."""
    request = job.request
    token_ids: list[int] = []
    items: list[ItemSpan] = []
    media = list(request.media)
    for place, (number, tokens) in enumerate(request.prompt):
        if place == 1 and media:
            digest = pack("<Q", media[0][0]) * 4
            items.append(ItemSpan(digest, "image", ((len(token_ids), tokens),)))
            token_ids += [PLACEHOLDER] * tokens
        else:
            token_ids += piece(number, 2048)[:tokens]
    return EngineRequest(
        request_id=str(job.number),
        token_ids=tuple(token_ids),
        params=SamplingParams(max_tokens=request.answer_tokens),
        max_tokens=request.answer_tokens,
        items=tuple(items),
        arrival_time=job.sent_at,
    )
