"""The scheduler: decides what each step computes, and applies the results.

There are no phases such as prefill and decode. Every sequence has *known* tokens (its prompt and
what was generated) and *computed* ones (whose keys and values are in the KV cache). A step computes
a *span* of each chosen sequence, which narrows that gap; a span that reaches the last known token
samples the next one. Chunked prefill, prefix-cache hits, recomputation after a preemption and
waiting for an encoder are all the same subtraction.

One step, as the engine runs it::

    plan = scheduler.schedule()            # which spans, on which blocks, with which items
    result = runner.execute(plan)          # the model runs: sampled tokens, failures
    updates = scheduler.commit(plan, result)   # tokens appended, sequences finished

No request starves. Sequences are ordered by (priority, arrival). The first running one in that
order is never preempted, holds blocks for all it knows, and is offered the token budget and the
room in the encoder cache first, so it progresses in every step until it ends. When nothing runs,
the first waiting sequence fits, because ``add`` refuses what never could.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from sensorium.core.encoder_cache import EncodePlanner, EncoderCacheBudget
from sensorium.core.kv_cache import NO_MATCH, KVCacheManager, PrefixMatch
from sensorium.core.limits import SchedulerCounts, SchedulerLimits, SchedulerStats
from sensorium.core.plan import UNUSABLE, NewSequence, Span, StepPlan, StepResult
from sensorium.core.queues import check_queues, put, queue_gauges, remove
from sensorium.core.request import EngineRequest, Sequence, SequenceUpdate, Status
from sensorium.core.speculation.speculator import Speculator
from sensorium.errors import InvalidRequestError, OverloadedError


class _Step:
    """The plan that ``schedule`` is building."""

    def __init__(self, num_tokens: int, encoder: EncodePlanner) -> None:
        self.tokens_left = num_tokens
        self.encoder = encoder
        self.new: list[NewSequence] = []
        self.spans: list[Span] = []
        self.preempted = False


class Scheduler:
    """Continuous batching under one token budget. Not thread-safe.

    ``schedule`` and ``commit`` alternate: a plan is executed before the next one is made. ``add``
    and ``abort`` may be called at any time in between.
    """

    def __init__(
        self, limits: SchedulerLimits, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.limits = limits
        self._clock = clock
        self._num_spare_blocks = max(1, limits.num_blocks // 100)
        self._num_added = 0
        self._counts = SchedulerCounts()
        self.reset()

    def reset(self) -> None:
        """Drop all requests, caches and an uncommitted plan; counters are kept.

        This is for a step that was interrupted at an unknown point. The runner must be reset, too.
        """
        limits = self.limits
        caching, window = limits.enable_prefix_caching, limits.window
        blocks = limits.num_blocks, limits.block_size
        self._kv_cache = KVCacheManager(*blocks, prefix_caching=caching, window=window)
        self._encoder_cache = EncoderCacheBudget(limits.encoder_cache_size)
        self._live: dict[int, Sequence] = {}
        self._seq_ids: dict[str, int] = {}
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._dropped: list[int] = []
        self._plan: StepPlan | None = None
        speculation = limits.speculation
        self._speculator = None if speculation is None else Speculator(speculation)
        self._planned_at = 0.0

    def add(self, request: EngineRequest) -> None:
        """Put a request into the queue.

        Raises:
            RequestError: It could never run, or its id is in use.
            OverloadedError: The queue is full.
        """
        if request.request_id in self._seq_ids:
            raise InvalidRequestError(
                f"Request id {request.request_id!r} is in use; ids must be unique.",
                param="request_id",
            )
        most = self.limits.max_num_waiting
        if most is not None and len(self._waiting) >= most:
            raise OverloadedError(f"{most} requests are waiting already; try again later.")
        self.limits.check(request)
        params = request.params
        seq = Sequence(
            seq_id=self._num_added,
            request=request,
            token_ids=list(request.token_ids),
            eos_ids=frozenset(() if params.ignore_eos else request.eos_token_ids),
            stop_ids=frozenset(params.stop_token_ids),
            rope_length=request.rope_length_at(len(request.token_ids)),
        )
        self._num_added += 1
        self._kv_cache.open(seq)
        self._live[seq.seq_id] = seq
        self._seq_ids[request.request_id] = seq.seq_id
        put(self._waiting, seq)

    def abort(self, request_id: str) -> bool:
        """Remove a request, without an update of it; return False when it is unknown or has ended.

        It may be called while a plan is being executed: the blocks of the request are reused by the
        next plan at the earliest, which runs after this one, and its part of the result is ignored.
        """
        seq_id = self._seq_ids.get(request_id)
        if seq_id is None:
            return False
        self._end(self._live[seq_id])
        return True

    def schedule(self) -> StepPlan:
        """Return the plan of the next step: running sequences first, then waiting ones."""
        if self._plan is not None:
            raise RuntimeError(f"plan {self._plan.step_id} has not been committed yet")
        encoder = EncodePlanner(self._encoder_cache, self.limits.encode_budget)
        step = _Step(self.limits.max_num_batched_tokens, encoder)
        self._schedule_running(step)
        if not step.preempted:
            self._schedule_waiting(step)
        if self._speculator is not None:
            self._add_drafts(step, self._speculator)
        self._plan = StepPlan(
            step_id=self._counts.num_steps,
            dropped=tuple(self._dropped),
            evict=tuple(encoder.evicted),
            new=tuple(step.new),
            encode=tuple(encoder.jobs),
            spans=tuple(step.spans),
        )
        self._dropped.clear()
        self._counts.add_step(encoder.num_queries, encoder.num_hits, len(encoder.evicted))
        self._planned_at = self._clock()
        return self._plan

    def commit(self, plan: StepPlan, result: StepResult) -> list[SequenceUpdate]:
        """Apply the result of the plan, and return updates of sequences in the order of the plan.

        A chunk that does not reach the last known token gives no update, a step that tries tokens
        may give several of a sequence, one for each token.
        """
        if plan is not self._plan or result.step_id != plan.step_id:
            raise RuntimeError(f"plan {plan.step_id} is not the one to be committed")
        if self._speculator is not None:
            self._speculator.observe(plan, result, self._clock() - self._planned_at)
        self._plan = None
        self._counts.add_encoded(result.encoded)
        for seq_id in {job.seq_id for job in plan.encode} & self._live.keys():
            self._live[seq_id].encode_seconds += result.encoded.seconds
        failed = self._failures(result)
        updates = []
        for span in plan.spans:
            seq = self._live.get(span.seq_id)
            if seq is None:  # aborted while the step ran
                continue
            if span.seq_id in failed:
                updates.append(self._fail(seq, failed[span.seq_id]))
                continue
            if seq.request.params.prompt_logprobs is not None and seq.num_generated == 0:
                seq.prompt_logprobs.extend(result.prompt_logprobs.get(seq.seq_id, ()))
            if span.samples:
                updates += self._apply_samples(seq, span, result)
                continue
            self._advance(seq, span, span.start + span.num_tokens, result)
            if span.pools:
                updates.append(self._apply_embedding(seq, result))
        for digest in result.failed_items:
            self._encoder_cache.forget(digest)
        return updates

    @property
    def has_work(self) -> bool:
        """Return True while there are sequences to run, or ended ones for the runner to drop."""
        return bool(self._live or self._dropped)

    def stats(self) -> SchedulerStats:
        """Return gauges and counters."""
        return SchedulerStats(
            **queue_gauges(self._running, self._waiting),
            num_blocks=self.limits.num_blocks,
            num_used_blocks=self._kv_cache.num_used_blocks,
            num_resident_embeds=self._encoder_cache.num_resident,
            num_embeds_capacity=self._encoder_cache.capacity,
            **dataclasses.asdict(self._counts),
        )

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` when the bookkeeping contradicts itself.

        It is slow: for tests and idle moments. With no request left, it implies that all blocks are
        free and no item is pinned.
        """
        check_queues(self._running, self._waiting, self._live, self._seq_ids)
        self._kv_cache.check_integrity(self._live.values())
        self._encoder_cache.check_integrity(self._running)

    def _schedule_running(self, step: _Step) -> None:
        """Plan a span for each running sequence, as far as tokens and items allow.

        A long prompt leaves one token for each sequence behind it, so that generation goes on while
        it is computed. Preemption takes sequences from the end of the queue, never one that already
        has its span.
        """
        pos = 0
        while pos < len(self._running) and step.tokens_left > 0:
            seq = self._running[pos]
            num_behind = len(self._running) - pos - 1
            end = self._reach(step, seq, max(1, step.tokens_left - num_behind))
            if end > seq.num_computed:
                new_block_ids = self._make_room(step, seq)
                if new_block_ids is not None:
                    self._add_span(step, seq, end, new_block_ids)
            pos += 1

    def _schedule_waiting(self, step: _Step) -> None:
        """Start waiting sequences in order, until one does not fit.

        Only a sequence that waits for a block of another lets those behind it pass. It is first
        again once that block is computed, or its owner has ended.
        """
        pos = 0
        while (
            pos < len(self._waiting)
            and len(self._running) < self.limits.max_num_seqs
            and step.tokens_left > 0
        ):
            seq = self._waiting[pos]
            if seq.waits_for is not None and self._kv_cache.is_promised(seq.waits_for):
                pos += 1
                continue
            match = self._match(seq)
            seq.waits_for = match.waits_for
            if match.waits_for is not None:
                pos += 1
            elif self._start(step, seq, match):
                del self._waiting[pos]
            else:
                break

    def _match(self, seq: Sequence) -> PrefixMatch:
        if seq.request.params.prompt_logprobs is not None and seq.num_generated == 0:
            return NO_MATCH  # each prompt position has to be computed, for its logits
        return self._kv_cache.match(seq)

    def _start(self, step: _Step, seq: Sequence, match: PrefixMatch) -> bool:
        """Plan the first span of a waiting sequence; return False when it does not fit now."""
        seq.num_computed = match.num_tokens
        end = self._reach(step, seq, step.tokens_left)
        num_spare = self._num_spare_blocks if self._running else 0
        if end == seq.num_computed or not self._kv_cache.reserve(seq, match, num_spare=num_spare):
            seq.num_computed = 0
            return False
        if seq.first_scheduled_time is None:
            seq.first_scheduled_time = self._clock()
            seq.num_cached = match.num_tokens
            self._counts.num_prefix_queries += seq.num_prompt_tokens
            self._counts.num_prefix_hits += match.num_tokens
        seq.status = Status.RUNNING
        put(self._running, seq)
        step.new.append(NewSequence(seq.seq_id, seq.request, tuple(seq.token_ids)))
        self._add_span(step, seq, end, tuple(seq.block_ids))
        return True

    def _reach(self, step: _Step, seq: Sequence, num_tokens: int) -> int:
        """Return the end of a span of at most ``num_tokens``; ``seq.num_computed`` for no span.

        Without chunked prefill a prompt is computed whole. The exception is a preempted sequence
        that has grown beyond the token budget of a step: it is recomputed in chunks.
        """
        start, known = seq.num_computed, len(seq.token_ids)
        most = self.limits.max_num_batched_tokens
        whole = not self.limits.enable_chunked_prefill and known - start <= most
        if whole and known - start > step.tokens_left:
            return start
        end = known if whole else min(known, start + num_tokens)
        if seq.request.items:
            end = step.encoder.reach(seq, end)
        end = seq.request.stop(start, end)
        return start if whole and end < known else end

    def _make_room(self, step: _Step, seq: Sequence) -> tuple[int, ...] | None:
        """Allocate blocks for all known tokens of a running sequence, preempting from the end.

        Returns the new blocks; None when the sequence was itself preempted.
        """
        while True:
            new_block_ids = self._kv_cache.extend(seq)
            if new_block_ids is not None:
                return new_block_ids
            victim = self._running[-1]
            self._preempt(victim)
            step.preempted = True
            if victim is seq:
                return None

    def _add_span(
        self, step: _Step, seq: Sequence, end: int, new_block_ids: tuple[int, ...]
    ) -> None:
        start = seq.num_computed
        if seq.request.items:
            step.encoder.pin_items(seq, end)
        step.tokens_left -= end - start
        at_end = end == len(seq.token_ids)
        samples = at_end and seq.request.pooling is None
        first_block = len(seq.block_ids) - len(new_block_ids)
        own = (seq.seq_id, start, end - start, new_block_ids, samples, at_end and not samples)
        step.spans.append(Span(*own, first_block=first_block))

    def _add_drafts(self, step: _Step, speculator: Speculator) -> None:
        """Let sequences try tokens that may come next, with what is left of tokens and blocks."""
        pairs = [(self._live[span.seq_id], span) for span in step.spans]
        wanted = speculator.propose(pairs, self.limits.num_drafts_left, step.tokens_left)
        for index, (seq, span) in enumerate(pairs):
            drafts = wanted.get(seq.seq_id)
            if drafts:
                num, new = self._kv_cache.lend(seq, len(drafts), num_spare=self._num_spare_blocks)
                step.spans[index] = span.with_drafts(drafts[:num], new)

    def _preempt(self, seq: Sequence) -> None:
        """Take the blocks of a sequence; it is computed again later."""
        self._requeue(seq)
        seq.num_preemptions += 1
        if seq.num_generated == 0:
            seq.prompt_logprobs.clear()
        self._counts.num_preemptions += 1

    def _requeue(self, seq: Sequence) -> None:
        """Move a running sequence back into the queue, at its place in the order."""
        self._leave(seq)
        seq.status = Status.PREEMPTED
        seq.num_computed, seq.is_sound = 0, True
        put(self._waiting, seq)

    def _change_rope(self, seq: Sequence, rope_length: int) -> None:
        """Recompute a sequence with the rotary factors of the length that it has reached."""
        self._requeue(seq)
        seq.rope_length = rope_length
        seq.block_digests.clear()
        self._kv_cache.open(seq)

    def _failures(self, result: StepResult) -> dict[int, str]:
        """Return messages for the sequences that failed, alone or with one of their items."""
        failed = dict(result.failed)
        for digest in result.failed_items:
            for seq_id in self._encoder_cache.holders(digest):
                items = self._live[seq_id].request.items
                index = next(i for i, item in enumerate(items) if item.digest == digest)
                message = result.item_failure(digest, f"item {index} ({items[index].modality})")
                failed.setdefault(seq_id, message)
        return failed

    def _advance(self, seq: Sequence, span: Span, end: int, result: StepResult) -> None:
        """Count the tokens up to ``end`` as computed; commit their blocks, unpin passed items."""
        seq.num_computed = end
        self._counts.num_computed_tokens += end - span.start
        if seq.seq_id in result.unsound:
            seq.is_sound = False
            self._kv_cache.withdraw(seq)
        self._kv_cache.commit(seq)
        if span.draft_ids:
            self._kv_cache.take_back(seq)
        if seq.request.items:
            self._encoder_cache.unpin_passed(seq.seq_id, seq.num_computed)

    def _apply_samples(self, seq: Sequence, span: Span, result: StepResult) -> list[SequenceUpdate]:
        """Append the sampled tokens, up to one that ends the sequence.

        All but the last have been computed: as the last known token, or as tried ones.
        """
        samples = result.samples.get(seq.seq_id)
        if not samples:
            return [self._fail(seq, "The step returned no token for this request.")]
        was_prompt, reason, num_new = seq.num_generated == 0, None, 0
        for sample in samples:
            seq.token_ids.append(sample.token_id)
            num_new += 1
            reason = self.limits.finish_reason(seq, sample.token_id)
            if reason is not None:
                break
        self._counts.num_generated_tokens += num_new
        if self._speculator is not None:
            drafts = result.drafts_of(span)
            outcome = self._speculator.follow(seq, drafts, seq.token_ids[-num_new:])
            self._counts.add_drafts(len(drafts), outcome.num_right)
            seq.count_drafts(len(drafts), *outcome)
        self._advance(seq, span, len(seq.token_ids) - 1, result)
        updates = seq.updates(samples[:num_new], reason, completes_prompt=was_prompt)
        rope_length = seq.request.rope_length_at(len(seq.token_ids))
        if reason is not None:
            self._end(seq)
        elif rope_length != seq.rope_length:
            self._change_rope(seq, rope_length)
        return updates

    def _apply_embedding(self, seq: Sequence, result: StepResult) -> SequenceUpdate:
        """End a pooling sequence, whose prompt is computed."""
        embedding = result.embeddings.get(seq.seq_id)
        if embedding is None:
            return self._fail(seq, "The step returned no embedding for this request.")
        self._counts.num_embeddings += 1
        self._end(seq)
        return seq.update(finish_reason="stop", embedding=embedding)

    def _fail(self, seq: Sequence, message: str) -> SequenceUpdate:
        self._end(seq)
        self._counts.num_unusable += message.startswith(UNUSABLE)
        return seq.update(finish_reason="error", error=message)

    def _end(self, seq: Sequence) -> None:
        """Remove a sequence that has ended; its cached blocks can still be found."""
        if seq.status is Status.RUNNING:
            self._leave(seq)
        else:
            remove(self._waiting, seq)
        seq.status = Status.FINISHED
        del self._live[seq.seq_id]
        del self._seq_ids[seq.request.request_id]

    def _leave(self, seq: Sequence) -> None:
        """Remove a running sequence: release blocks and pins, drop it in the runner."""
        remove(self._running, seq)
        self._kv_cache.release(seq)
        self._encoder_cache.unpin_all(seq.seq_id)
        if self._speculator is not None:
            self._speculator.forget(seq.seq_id)
        self._dropped.append(seq.seq_id)
