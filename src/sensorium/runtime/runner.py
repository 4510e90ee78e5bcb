"""The model runner: executes step plans on a device.

A plan is executed in this order: drop ended sequences, evict encoder outputs, add new sequences,
encode items, merge their embeddings into those of the tokens, run the forward pass over all spans
as one ragged batch, sample or pool. All device work of the engine happens here. A failure of one
sequence or item is reported in the ``StepResult`` and does not harm the others.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate

import torch

from sensorium.core.plan import TOO_COMPLEX, Span, StepPlan, StepResult, unusable
from sensorium.core.request import TokenSample
from sensorium.errors import EngineDeadError
from sensorium.kernels import ops
from sensorium.kernels.batch import LayerCache
from sensorium.models.interface import Model
from sensorium.runtime import pooler, sampler
from sensorium.runtime.adapters import NO_LANE, AdapterSet
from sensorium.runtime.encoder import EncoderCache, FeatureStore
from sensorium.runtime.inputs import SteadyInputs, StepInputs, is_decode
from sensorium.runtime.slots import Slot, SlotTable, single_tokens_first
from sensorium.runtime.soundness import finite_parts, flaws_of_logits

logger = logging.getLogger(__name__)

LOGIT_ROWS = 256
"""Rows of prompt logits that are computed at once for prompt_logprobs; bounds their memory."""

FAILED = "The model could not compute this request; the others were not affected."
NO_ADAPTER = "The adapter of this request is not loaded any more."


class ModelRunner:
    """The model with its KV cache, its encoder cache and a slot per running sequence.

    Not thread-safe.

    Args:
        model: The loaded model.
        caches: The KV cache, layer by layer.
        store: Features of admitted requests.
        batch_invariant: As in ``AttentionBatch``: a row has the same bits in every batch.
        adapters: The adapters that requests may name; None where there are none.
        after_step: Called after each step, such as a ``ThreadAdapter``'s.
    """

    def __init__(
        self,
        model: Model,
        caches: list[LayerCache],
        store: FeatureStore,
        *,
        batch_invariant: bool = True,
        adapters: AdapterSet | None = None,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = model
        self._after_step = after_step
        self._inputs = SteadyInputs(model, caches, batch_invariant)
        self.adapters = adapters
        self.encoder = EncoderCache(model, store, adapters)
        self._table = SlotTable()

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Execute a plan; failures of single sequences or items are in the result, not raised."""
        result = StepResult(plan.step_id)
        self._table.drop(plan.dropped)
        self.encoder.evict(plan.evict)
        for new in plan.new:
            slot = self._table.add(new)
            self._place(slot, result)
            self._start_grammar(slot, result)
        if plan.encode:
            gone = {job.digest for job in plan.encode if self._lane(job.seq_id) is None}
            jobs = [job for job in plan.encode if job.digest not in gone]
            result.failed_items = (*gone, *self.encoder.encode(jobs, self._table.slots))
            result.unusable_items = self.encoder.pop_unusable()
        lost = set(result.failed_items)
        pairs = [
            (_allowed(span, slot), slot)
            for span, slot in self._table.spans_of(plan.spans)
            if span.seq_id not in result.failed and not (lost and _needs(span, slot, lost))
        ]
        if pairs:
            self._run_isolated(single_tokens_first(pairs), result)
        result.encoded = self.encoder.pop_report()
        self._after_step()
        return result

    def encoded(self, digest: bytes) -> torch.Tensor | None:
        """Return the encoder output (num_embeds, H) of an item; None where it is not kept."""
        return self.encoder.get(digest)

    def reset(self) -> None:
        """Drop all sequences and encoder outputs; the contents of the KV cache become useless."""
        self._table.drop(tuple(self._table.slots))
        self._inputs.clear()
        self.encoder.clear()

    def _place(self, slot: Slot, result: StepResult) -> None:
        """Find the lane of a sequence's adapter."""
        lane = self._lane(slot.seq_id)
        if lane is None:
            result.failed[slot.seq_id] = NO_ADAPTER
        else:
            slot.lane = lane

    def _lane(self, seq_id: int) -> int | None:
        """Return the lane of a sequence's adapter; None for one that is not loaded any more."""
        digest = self._table.slots[seq_id].request.adapter
        if self.adapters is not None:
            return self.adapters.lane(digest)
        return None if digest else NO_LANE

    def _start_grammar(self, slot: Slot, result: StepResult) -> None:
        if slot.request.grammar is None:
            return
        try:
            slot.grammar = slot.request.grammar.fresh()
            for token_id in slot.token_ids[slot.num_prompt : slot.num_tokens].tolist():
                slot.grammar.accept(token_id)
        except Exception:
            logger.exception("a grammar could not be started")
            result.failed[slot.seq_id] = "The grammar of structured_outputs could not be started."

    def _run_isolated(self, pairs: list[tuple[Span, Slot]], result: StepResult) -> None:
        """Run the spans as one batch; if that fails, one by one, so that only the faulty ones fail.

        Running a span twice is harmless: it writes the same keys and values to the same places.
        """
        try:
            self._run(pairs, result)
        except EngineDeadError:
            raise  # of several ranks one has gone: nothing can be computed any more
        except Exception:
            self._inputs.clear()
            result.repeated = True
            logger.exception("a step of %d sequence(s) failed", len(pairs))
            if len(pairs) == 1:
                result.failed[pairs[0][0].seq_id] = FAILED
                return
            for pair in pairs:
                if pair[0].seq_id not in result.samples and pair[0].seq_id not in result.embeddings:
                    self._run_isolated([pair], result)

    def _run(self, pairs: list[tuple[Span, Slot]], result: StepResult) -> None:
        inputs = self._inputs.of(pairs)
        if all(is_decode(span, slot) for span, slot in pairs) and self._decode(
            pairs, inputs, result
        ):
            return
        embeds = self.model.embed(inputs.ids)
        for (span, slot), row in zip(pairs, inputs.first_row, strict=True):
            if slot.request.items and span.start < slot.num_prompt:
                self.encoder.merge(embeds, row, span.start, span.start + span.num_tokens, slot)
        with self._adapted(pairs, inputs):
            hidden = self.model.forward(embeds, inputs.batch)
        unsound = _unsound(pairs, inputs, hidden)
        result.num_drafts |= {span.seq_id: len(span.draft_ids) for span, _ in pairs}
        if any(span.draft_ids and span.seq_id in unsound for span, _ in pairs):
            # Perhaps it is a tried token that spoils the others, and it need not be right.
            result.repeated = True
            known = [(span.with_fewer_drafts(0), slot) for span, slot in pairs]
            self._run(single_tokens_first(known), result)
            return
        result.unsound |= unsound
        prompt_logprobs, unusable_prompts = self._prompt_logprobs(pairs, inputs, hidden)
        if inputs.sampled_rows:
            self._sample(hidden, inputs, result)
        if inputs.pooled_rows:
            last = _rows(hidden, inputs.pooled_rows)
            embeddings, failed = pooler.pool(last, inputs.pooled_slots)
            result.embeddings.update(embeddings)
            result.failed.update(failed)
        result.prompt_logprobs.update(prompt_logprobs)
        result.failed.update(unusable_prompts)

    def _adapted(
        self, pairs: list[tuple[Span, Slot]], inputs: StepInputs
    ) -> AbstractContextManager[None]:
        """Let layers apply the adapter of each row within the block."""
        if self.adapters is None or all(slot.lane == NO_LANE for _, slot in pairs):
            return nullcontext()
        inputs.batch.adapters = self.adapters.version
        lanes = [slot.lane for _, slot in pairs]
        return self.adapters.using(list(zip(lanes, inputs.batch.query_lens, strict=True)))

    def _decode(
        self, pairs: list[tuple[Span, Slot]], inputs: StepInputs, result: StepResult
    ) -> bool:
        """Run a step of generated tokens at once; return False if the model cannot do that."""
        with self._adapted(pairs, inputs):
            found = self.model.decode(inputs.ids, inputs.batch)
        if found is None:
            return False
        slots, likely = inputs.sampled_slots, found.tokens.tolist()
        inputs.is_plain = inputs.is_plain or all(map(sampler.is_plain, slots))
        if inputs.is_plain and min(likely) >= 0:
            for slot, token in zip(slots, likely, strict=True):
                slot.append(token)
                result.samples[slot.seq_id] = (TokenSample(token),)
        else:
            flaws = flaws_of_logits(found.logits, found.hidden)
            tokens = [token if token >= 0 else -1 - token for token in likely]
            rows = list(range(len(slots)))
            samples, failed = self._sample_each(
                found.logits, tokens if inputs.is_plain else None, flaws, rows, slots
            )
            result.samples |= {seq_id: (sample,) for seq_id, sample in samples.items()}
            result.failed.update(failed)
        self._inputs.decoded(pairs)
        return True

    def _sample(self, hidden: torch.Tensor, inputs: StepInputs, result: StepResult) -> None:
        """Sample the next token of each sequence, and more as long as its tried tokens are right.

        Each is sampled by itself, in the state that the sequence has after the one before. So a
        wrong token leaves no trace, and whatever tokens depend on is as it is without trying.
        """
        rows = _rows(hidden, inputs.sampled_rows)
        logits = self.model.logits(rows)
        flaws = flaws_of_logits(logits, rows)
        # A sequence that is sampled plainly once is so from then on.
        plain = all(map(sampler.is_plain, inputs.sampled_slots))
        likely = ops.argmax(logits).tolist() if plain else None
        firsts = [0, *accumulate(1 + len(draft_ids) for draft_ids in inputs.draft_ids)]
        going = list(zip(firsts, inputs.sampled_slots, inputs.draft_ids, strict=False))
        for place in range(1 + max(map(len, inputs.draft_ids))):
            slots = [slot for _, slot, _ in going]
            at = [first + place for first, _, _ in going]
            try:
                samples, failed = self._sample_each(logits, likely, flaws, at, slots)
            except Exception:
                if place == 0:
                    raise
                logger.exception("tokens that were tried could not be sampled")
                return
            for seq_id, sample in samples.items():
                result.samples[seq_id] = (*result.samples.get(seq_id, ()), sample)
            if place == 0:  # others have a token in this step, and fail alone in the next
                result.failed.update(failed)
            going = [
                (first, slot, draft_ids)
                for first, slot, draft_ids in going
                if place < len(draft_ids)
                and slot.seq_id in samples
                and samples[slot.seq_id].token_id == draft_ids[place]
            ]
            if not going:
                return

    def _sample_each(
        self,
        logits: torch.Tensor,
        likely: list[int] | None,
        flaws: Sequence[str | None],
        at: list[int],
        slots: list[Slot],
    ) -> tuple[dict[int, TokenSample], dict[int, str]]:
        """Sample a token of each slot, from the rows ``at`` of the logits, and append it.

        likely: the likeliest token of each row, where that is what all slots sample. Returns the
        samples, and messages of sequences that failed, by sequence id.
        """
        if likely is not None:
            tokens, usable = [likely[row] for row in at], [True] * len(at)
            samples, failed = sampler.token_samples(tokens, usable, slots)
        else:
            own = logits if len(at) == len(logits) else logits[at]
            samples, failed = sampler.sample(own.float(), slots)
        self._drop_flawed(samples, failed, [flaws[row] for row in at], slots)
        self._accept(samples, failed, slots)
        return samples, failed

    def _drop_flawed(
        self,
        samples: dict[int, TokenSample],
        failed: dict[int, str],
        flaws: Sequence[str | None],
        slots: list[Slot],
    ) -> None:
        """Move sequences whose logits have a flaw from the samples to those that failed."""
        for slot, flaw in zip(slots, flaws, strict=True):
            if flaw is not None:
                samples.pop(slot.seq_id, None)
                failed[slot.seq_id] = self._unusable(slot, flaw)

    def _unusable(self, slot: Slot, flaw: str) -> str:
        """Log unusable logits of a sequence, and return the message that it ends with."""
        dtype = str(self.model.dtype).removeprefix("torch.")
        logger.error("request %s: its logits %s in %s", slot.request.request_id, flaw, dtype)
        return unusable("this input", f"its logits {flaw}", dtype)

    def _accept(
        self, samples: dict[int, TokenSample], failed: dict[int, str], slots: list[Slot]
    ) -> None:
        """Append the sampled tokens to their slots, and advance the grammars."""
        for slot in slots:
            sample = samples.get(slot.seq_id)
            if slot.grammar is not None and not _follows(slot, sample):
                failed[slot.seq_id] = TOO_COMPLEX
                samples.pop(slot.seq_id, None)
            elif sample is not None:
                slot.append(sample.token_id)

    def _prompt_logprobs(
        self, pairs: list[tuple[Span, Slot]], inputs: StepInputs, hidden: torch.Tensor
    ) -> tuple[dict[int, tuple[tuple[tuple[int, float, int], ...], ...]], dict[int, str]]:
        """Return the entries of prompt tokens, and messages of unusable prompts, by sequence id."""
        found: dict[int, tuple[tuple[tuple[int, float, int], ...], ...]] = {}
        failed: dict[int, str] = {}
        for (span, slot), row in zip(pairs, inputs.first_row, strict=True):
            num_top = slot.request.params.prompt_logprobs
            last = min(span.start + span.num_tokens, slot.num_prompt - 1)
            if num_top is None or last <= span.start:
                continue
            entries: list[tuple[tuple[int, float, int], ...]] = []
            for start in range(span.start, last, LOGIT_ROWS):
                end = min(last, start + LOGIT_ROWS)
                rows = hidden[row + start - span.start : row + end - span.start]
                targets = torch.from_numpy(slot.token_ids[start + 1 : end + 1]).to(rows.device)
                logits = self.model.logits(rows)
                flaw = next((flaw for flaw in flaws_of_logits(logits, rows) if flaw), None)
                if flaw is not None:
                    failed[span.seq_id] = self._unusable(slot, flaw)
                    break
                entries += sampler.logprobs_of_targets(logits.float(), targets, num_top)
            found[span.seq_id] = tuple(entries)
        return found, failed


def _unsound(pairs: list[tuple[Span, Slot]], inputs: StepInputs, hidden: torch.Tensor) -> set[int]:
    """Return the ids of sequences with rows that are not finite.

    Single rows are sampled: their logits show it. Keys and values of such rows reach other rows of
    the step, even earlier ones, because 0 times NaN is NaN: so blocks of a prefix that is shared
    with other requests may be spoilt.
    """
    spans = [
        (span, row)
        for (span, _), row in zip(pairs, inputs.first_row, strict=True)
        if span.num_tokens > 1 or not span.samples
    ]
    finite = finite_parts([hidden[row : row + span.num_tokens] for span, row in spans])
    return {span.seq_id for (span, _), good in zip(spans, finite, strict=True) if not good}


def _follows(slot: Slot, sample: TokenSample | None) -> bool:
    """Advance the grammar of a slot by a token; return False when the sequence fails."""
    grammar = slot.grammar
    if grammar is None or sample is None:
        return grammar is None or grammar.error is None
    try:
        return grammar.accept(sample.token_id)
    except Exception:  # the others of the step have moved on: this must not run it again
        logger.exception("a grammar failed")
        return False


def _allowed(span: Span, slot: Slot) -> Span:
    """Return the span without the tried tokens from the first that the grammar forbids."""
    if not span.draft_ids or slot.grammar is None:
        return span
    try:
        num = slot.grammar.num_allowed(span.draft_ids)
    except Exception:
        logger.exception("a grammar could not tell which tokens may be tried")
        num = 0
    return span if num == len(span.draft_ids) else span.with_fewer_drafts(num)


def _rows(hidden: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return hidden[torch.tensor(rows, device=hidden.device)]


def _needs(span: Span, slot: Slot, digests: set[bytes]) -> bool:
    """Return True if a span covers positions of one of these items."""
    end = span.start + span.num_tokens
    return any(
        item.digest in digests and item.start < end and item.end > span.start
        for item in slot.request.items
    )
