"""A simulated engine with few events: each step that computes prompts, and the steps between.

Steps that only decode are alike, so those up to the next end of a sequence or the next arrival are
one event. A step is the one of ``core.scheduler``: sequences that decode have a token each, prompts
share the rest of the budget in order. What it leaves out: preemption, and blocks of parts of pieces.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import simpy

from benchmarks.fleet.caches import ItemCache, PrefixCache
from benchmarks.fleet.service import StepCosts
from benchmarks.fleet.traces import Request
from sensorium.distributed.routing import ReplicaLoad


@dataclass(frozen=True, slots=True)
class EngineShape:
    """Sizes of an engine, by the names of its options where it has such."""

    costs: StepCosts
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    kv_tokens: int = 65_536
    encoder_embeds: int = 8_192


@dataclass(slots=True, eq=False)
class Job:
    """A request at an engine, and what became of it."""

    request: Request
    sent_at: float
    number: int = 0
    replica: str = ""
    cached: int = 0
    left: int = 0
    num_items: int = 0
    num_embeds: int = 0
    items_met: int = 0
    first_token_at: float = math.nan
    ended_at: float = math.nan
    failed: bool = False
    notify: Callable[[Job, str], None] = field(default=lambda job, event: None)


class Engine:
    """One replica."""

    def __init__(self, env: simpy.Environment, name: str, shape: EngineShape) -> None:
        self.env, self.name, self.shape = env, name, shape
        self.kv = PrefixCache(shape.kv_tokens)
        self.items = ItemCache(shape.encoder_embeds)
        self.alive = True
        self.busy = 0.0
        self.num_jobs = 0
        self.num_steps = 0
        self.computed_tokens = 0
        self._waiting: deque[Job] = deque()
        self._prompts: list[Job] = []
        self._decoding: list[tuple[float, int, Job]] = []
        self._generated = 0.0
        self._context = 0.0
        self._event = 0
        self._began = 0.0
        self._seconds = 0.0
        self._steps_left = 0
        self._spans: list[tuple[Job, int]] = []

    def submit(self, job: Job) -> None:
        """Take a request; ``job.notify`` is called with "first" and "ended"."""
        job.number, job.replica = self.num_jobs, self.name
        self.num_jobs += 1
        self._waiting.append(job)
        if self._steps_left == 0:
            self._begin()
        elif not self._spans:
            done = max(1, math.ceil((self.env.now - self._began) / self._seconds - 1e-9))
            if done < self._steps_left:
                self._steps_left = done
                self._schedule(self._began + done * self._seconds - self.env.now)

    def load(self) -> ReplicaLoad:
        """What it would report now."""
        waiting = sum(job.request.num_tokens for job in self._waiting)
        return ReplicaLoad(
            num_running=len(self._prompts) + len(self._decoding),
            num_waiting=len(self._waiting),
            waiting_tokens=waiting + sum(job.left for job in self._prompts),
            kv_usage=min(1.0, self.kv.used / self.kv.capacity),
            kv_tokens=self.kv.capacity,
            computed_tokens=self.computed_tokens,
            encoder_items=len(self.items),
            encoder_evictions=self.items.num_evictions,
        )

    def die(self) -> list[Job]:
        """End at once; return the requests that fail."""
        self.alive = False
        self._event += 1
        lost = [*self._waiting, *self._prompts, *(job for _, _, job in self._decoding)]
        for job in lost:
            job.failed = True
        self._waiting.clear()
        self._prompts, self._decoding, self._spans, self._steps_left = [], [], [], 0
        return lost

    def _begin(self) -> None:
        """Plan the next step, or the next ones when they only decode."""
        num_decoding = len(self._decoding)
        budget = self.shape.max_num_batched_tokens - num_decoding
        self._spans, items, embeds, tokens = [], 0, 0, 0
        for job in self._prompts:
            budget, tokens = self._add_span(job, budget, tokens)
        while self._waiting and budget > 0:
            if num_decoding + len(self._prompts) >= self.shape.max_num_seqs:
                break
            started = self._next_waiting()
            if started is None:
                break
            self._prompts.append(started)
            items, embeds = items + started.num_items, embeds + started.num_embeds
            budget, tokens = self._add_span(started, budget, tokens)
        costs = self.shape.costs
        self._began = self.env.now
        if self._spans:
            self._steps_left = 1
            self._seconds = costs.seconds(tokens, num_decoding, self._context, items, embeds)
        elif num_decoding:
            self._steps_left = max(1, math.ceil(self._decoding[0][0] - self._generated))
            context = self._context + num_decoding * self._steps_left / 2
            self._seconds = costs.seconds(0, num_decoding, context)
        else:
            self._steps_left = 0
            return
        self._schedule(self._steps_left * self._seconds)

    def _add_span(self, job: Job, budget: int, tokens: int) -> tuple[int, int]:
        span = min(job.left, budget)
        if span > 0:
            self._spans.append((job, span))
        return budget - span, tokens + span

    def _next_waiting(self) -> Job | None:
        """The first job that can start; those that another's prompt is about to serve let others pass."""
        for index, job in enumerate(self._waiting):
            cached, comes = self.kv.match(job.request)
            if comes:
                continue
            if self._prompts or self._decoding:
                spare = self.kv.capacity // 100
                if self.kv.used + job.request.num_tokens - cached + spare > self.kv.capacity:
                    return None
            del self._waiting[index]
            self.kv.pin(job.request)
            job.cached, job.left = cached, job.request.num_tokens - cached
            self._encode(job)
            return job
        return None

    def _encode(self, job: Job) -> None:
        """Count the items that must be encoded: neither encoded before nor in the cached prefix."""
        for number, size in job.request.media:
            in_prefix = job.cached >= job.request.prompt[0][1] + size
            if in_prefix or self.items.use(number, size):
                job.items_met += 1
            else:
                job.num_items += 1
                job.num_embeds += size

    def _schedule(self, seconds: float) -> None:
        self._event += 1
        event = self._event
        timeout = self.env.timeout(seconds)
        timeout.callbacks.append(lambda _: self._end(event))

    def _end(self, event: int) -> None:
        """Apply the steps that have been made, and begin the next."""
        if event != self._event or not self.alive:
            return
        steps, num_decoding = self._steps_left, len(self._decoding)
        self.busy += steps * self._seconds
        self.num_steps += steps
        self._generated += steps
        self._context += steps * num_decoding
        self.computed_tokens += steps * num_decoding
        if num_decoding:
            self.kv.grow(steps * num_decoding)
        while self._decoding and self._decoding[0][0] <= self._generated + 1e-9:
            self._finish(heapq.heappop(self._decoding)[2])
        for job, span in self._spans:
            job.left -= span
            self.computed_tokens += span
            if job.left == 0:
                self._first_token(job)
        if self._spans:
            self._prompts = [job for job in self._prompts if job.left]
        self._begin()

    def _first_token(self, job: Job) -> None:
        self.kv.computed(job.request)
        self.kv.grow(1)
        job.first_token_at = self.env.now
        job.notify(job, "first")
        self._context += job.request.num_tokens
        if job.request.answer_tokens <= 1:
            self._finish(job)
        else:
            end = self._generated + job.request.answer_tokens - 1
            heapq.heappush(self._decoding, (end, job.number, job))

    def _finish(self, job: Job) -> None:
        self._context -= job.request.num_tokens + job.request.answer_tokens - 1
        self.kv.release(job.request)
        job.ended_at = self.env.now
        job.notify(job, "ended")
