"""Limits of the scheduler, and its counters."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from sensorium.core.plan import EncodeReport
from sensorium.core.request import EngineRequest, Sequence
from sensorium.core.speculation.speculator import SpeculationLimits
from sensorium.errors import ConfigError, MediaTooLargeError, PromptTooLongError
from sensorium.outputs import FinishReason


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """Sizes that the scheduler must keep to; raises ``ConfigError`` when they make no sense.

    max_num_seqs, max_num_batched_tokens: sequences and tokens of one step. max_model_len: tokens of
    a sequence, prompt and generated. num_blocks, block_size: the KV cache, in blocks and tokens.
    encode_budget: embeddings encoded in one step; encoder_cache_size: embeddings kept for use and
    reuse; both at least as large as the largest item that is to be served. max_num_waiting: longer
    queues are refused; None for any length. window: tokens before a sequence's next one that its
    layers may read; None for all. speculation: how tokens are tried; None for not at all.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    num_blocks: int
    block_size: int
    encode_budget: int = 0
    encoder_cache_size: int = 0
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    max_num_waiting: int | None = None
    window: int | None = None
    speculation: SpeculationLimits | None = None

    def __post_init__(self) -> None:
        lows = {"encode_budget": 0, "encoder_cache_size": 0, "max_model_len": 2}
        for limit in dataclasses.fields(self):
            value = getattr(self, limit.name)
            if not isinstance(value, int) or isinstance(value, bool):
                continue
            low = lows.get(limit.name, 1)
            if value < low:
                raise ConfigError(f"{limit.name} must be at least {low}, got {value}.")

    @property
    def num_cache_tokens(self) -> int:
        """Return how many tokens fit in the KV cache."""
        return self.num_blocks * self.block_size

    def check(self, request: EngineRequest) -> None:
        """Refuse a request that could never be scheduled.

        Raises ``PromptTooLongError`` or ``MediaTooLargeError``.
        """
        num_tokens = len(request.token_ids)
        self._check_length(num_tokens, pools=request.pooling is not None)
        # The others may each have a token in the step.
        most = max(self.max_num_batched_tokens - self.max_num_seqs + 1, 0)
        longest = max((end - start for start, end in request.bidirectional_spans), default=0)
        if longest > most:
            raise PromptTooLongError.beyond(
                most,
                f"{longest} tokens of the prompt attend to one another both ways and have to be "
                f"computed in one step, which has room for {most} (max_num_batched_tokens less "
                "max_num_seqs); raise max_num_batched_tokens, or shorten the prompt.",
                param="prompt",
            )
        self._check_items(request)

    def num_drafts_left(self, seq: Sequence) -> int:
        """Return how many tokens a sequence may try beside its next one.

        None would follow its last token, and none needs other rotary factors.
        """
        known, request = len(seq.token_ids), seq.request
        left = min(
            request.max_tokens - seq.num_generated,
            self.max_model_len - known,
            self.num_cache_tokens + 1 - known,
        )
        if request.rope_length and known <= request.rope_border:
            left = min(left, request.rope_border - known + 1)
        return max(0, left - 1)

    def finish_reason(self, seq: Sequence, token_id: int) -> FinishReason | None:
        """Return why a sequence ends with its latest token; None when it goes on."""
        is_stop = token_id in seq.eos_ids or token_id in seq.stop_ids
        if is_stop and seq.num_generated >= seq.request.params.min_tokens:
            return "stop"
        num_tokens = len(seq.token_ids)
        if (
            seq.num_generated >= seq.request.max_tokens
            or num_tokens >= self.max_model_len
            or num_tokens > self.num_cache_tokens
        ):
            return "length"
        return None

    def _check_length(self, num_tokens: int, *, pools: bool) -> None:
        has = f"the prompt has {num_tokens} tokens"
        if num_tokens + (not pools) > self.max_model_len:
            left = "" if pools else ", and one must be left to generate"
            raise PromptTooLongError.beyond(
                self.max_model_len, f"{has}{left}; shorten the prompt.", param="prompt"
            )
        if num_tokens > self.num_cache_tokens:
            raise PromptTooLongError.beyond(
                self.num_cache_tokens,
                f"{has}, and the KV cache holds no more than that ({self.num_blocks} blocks of "
                f"{self.block_size}); shorten the prompt or give the cache more memory.",
                param="prompt",
            )
        if not self.enable_chunked_prefill and num_tokens > self.max_num_batched_tokens:
            raise PromptTooLongError.beyond(
                self.max_num_batched_tokens,
                f"{has}, a step takes no more than that, and chunked prefill is off; shorten the "
                "prompt, raise max_num_batched_tokens or switch it on.",
                param="prompt",
            )

    def _check_items(self, request: EngineRequest) -> None:
        budget = min(self.encode_budget, self.encoder_cache_size)
        for index, item in enumerate(request.items):
            if item.num_embeds > budget:
                raise MediaTooLargeError(
                    f"Item {index} of the prompt ({item.modality}) makes {item.num_embeds} "
                    f"embeddings, more than the encoder's budget of {budget}; make it smaller or "
                    "raise the budget.",
                    param=f"items[{index}]",
                )
        if not self.enable_chunked_prefill:
            num_embeds = sum({item.digest: item.num_embeds for item in request.items}.values())
            if num_embeds > budget:
                raise MediaTooLargeError(
                    f"The items of the prompt make {num_embeds} embeddings, more than the "
                    f"encoder's budget of {budget}, and chunked prefill is off; send fewer or "
                    "smaller items, raise the budget or switch it on.",
                    param="items",
                )


@dataclass(slots=True)
class SchedulerCounts:
    """Counters since the start, described in ``SchedulerStats``."""

    num_steps: int = 0
    num_computed_tokens: int = 0
    num_generated_tokens: int = 0
    num_embeddings: int = 0
    num_preemptions: int = 0
    num_prefix_queries: int = 0
    num_prefix_hits: int = 0
    num_encoder_queries: int = 0
    num_encoder_hits: int = 0
    num_encoder_evictions: int = 0
    num_encoded_items: int = 0
    encode_seconds: float = 0.0
    num_encoded_bytes: int = 0
    num_encode_failures: int = 0
    num_unusable: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_at: list[int] = field(default_factory=list)

    def add_step(self, num_encoder_queries: int, num_hits: int, num_evictions: int) -> None:
        """Count a step, and the look-ups in the encoder cache for it."""
        self.num_steps += 1
        self.num_encoder_queries += num_encoder_queries
        self.num_encoder_hits += num_hits
        self.num_encoder_evictions += num_evictions

    def add_drafts(self, num_tried: int, num_right: int) -> None:
        """Count the tokens that a sequence has tried in a step, and those that were right."""
        if not num_tried:
            return
        self.num_drafts += 1
        self.num_draft_tokens += num_tried
        self.num_accepted_tokens += num_right
        missing = num_tried - len(self.num_accepted_at)
        self.num_accepted_at.extend([0] * missing)
        for place in range(num_right):
            self.num_accepted_at[place] += 1

    def add_encoded(self, report: EncodeReport) -> None:
        """Add the cost of encoding in a step."""
        self.num_encoded_items += report.num_items
        self.encode_seconds += report.seconds
        self.num_encoded_bytes += report.num_bytes
        self.num_encode_failures += report.num_failed


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """Gauges of the scheduler, and its counters since the start.

    ``num_waiting_tokens`` are those of prompts that have not been computed, running or waiting.
    ``num_embeddings`` are those of pooling requests. ``num_prefix_queries`` and ``num_prefix_hits``
    are prompt tokens looked up and found, at the first admission of each sequence.
    ``num_encoder_queries`` and ``num_encoder_hits`` are items that were needed, and those of them
    that lay ready or were in the same step's batch already. ``num_resident_embeds`` of
    ``num_embeds_capacity`` embeddings lie ready. ``num_unusable`` are sequences ended because the
    model made no usable numbers of them. ``num_drafts`` spans have tried ``num_draft_tokens``, of
    which ``num_accepted_tokens`` were right, ``num_accepted_at`` by their place in the span. The
    last four are sums of ``EncodeReport``. ``running_adapters`` and ``waiting_adapters`` are the
    digests of the adapters of sequences.
    """

    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    running_adapters: frozenset[bytes]
    waiting_adapters: frozenset[bytes]
    num_blocks: int
    num_used_blocks: int
    num_resident_embeds: int
    num_embeds_capacity: int
    num_steps: int
    num_computed_tokens: int
    num_generated_tokens: int
    num_embeddings: int
    num_preemptions: int
    num_prefix_queries: int
    num_prefix_hits: int
    num_encoder_queries: int
    num_encoder_hits: int
    num_encoder_evictions: int
    num_unusable: int
    num_drafts: int
    num_draft_tokens: int
    num_accepted_tokens: int
    num_accepted_at: list[int]
    num_encoded_items: int
    encode_seconds: float
    num_encoded_bytes: int
    num_encode_failures: int
