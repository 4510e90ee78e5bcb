"""The engine's request, the scheduler's record of it, and the updates that come back."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from sensorium.outputs import FinishReason
from sensorium.params import PoolingParams, SamplingParams


@dataclass(frozen=True, slots=True)
class ItemSpan:
    """Positions of one image, video or audio clip in the token ids of a request.

    ``runs`` are ``(start, length)`` pairs, ascending and disjoint: the positions that the item's
    embeddings fill, in order. An item without separators between its parts has one run. Example:
    ids ``[1, 9, 9, 9, 5]`` with an image of three embeddings at 9 have ``runs == ((1, 3),)``,
    ``start == 1``, ``end == 4`` and ``num_embeds == 3``.
    """

    digest: bytes
    modality: str
    runs: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("an item span needs at least one run")
        end = 0
        for start, length in self.runs:
            if start < end or length < 1:
                raise ValueError(f"runs must be ascending, disjoint and not empty: {self.runs}")
            end = start + length

    @property
    def start(self) -> int:
        """Return the first position that the item fills."""
        return self.runs[0][0]

    @property
    def end(self) -> int:
        """Return one past the last position that the item fills."""
        start, length = self.runs[-1]
        return start + length

    @property
    def num_embeds(self) -> int:
        """Return the number of embeddings of the item."""
        return sum(length for _, length in self.runs)


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """The only message into the engine: one sequence to generate, or one prompt to embed.

    A request with ``n`` samples is sent as ``n`` of these.

    Attributes:
        request_id: Unique among the requests that have not ended.
        token_ids: The prompt, placeholders expanded.
        params: Sampling parameters; not read when ``pooling`` is set.
        max_tokens: Most tokens to generate. It is final: the frontend has resolved None and the end
            of the context. 0 when ``pooling`` is set.
        eos_token_ids: End-of-sequence tokens of the model.
        items: Media items in the order of the prompt.
        positions: Rotary positions of the prompt where they are not 0, 1, 2 …: numpy int32
            (3, num_tokens), which ``core`` only hands to the runner.
        position_delta: Generated token i has position i + delta.
        bad_words_token_ids: Sequences of tokens that must not be generated.
        grammar: The constraint on the answer: its text on the way to the engine, from there on a
            matcher of it, which ``core`` only hands to the runner.
        cache_salt: Scope of the prefix cache; requests with different salts share no blocks.
        adapter: Digest of the adapter that the sequence runs with; empty for none. Blocks are
            shared by sequences with the same one only.
        priority: Lower values run first.
        arrival_time: By ``time.monotonic``, in seconds.
        pooling: The embedding that is wanted, its ``normalize`` resolved. Nothing is generated: the
            sequence ends as soon as its prompt is computed.
        bidirectional_spans: Parts (start, end) of the prompt with bidirectional attention. A step
            that computes some of one computes all that is left of it.
        predicted_ids: Tokens that the caller expects as the answer; they are tried.
        rope_border: See ``rope_length``.
        rope_length: The length of sequence that rotary factors are chosen for, once the sequence
            has more than ``rope_border`` tokens; until then, and where it is 0, the factors are
            those of short sequences. When they change, the sequence is computed again, since keys
            cached with the others cannot be used.
    """

    request_id: str
    token_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    eos_token_ids: tuple[int, ...] = ()
    items: tuple[ItemSpan, ...] = ()
    positions: Any = None
    position_delta: int = 0
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    grammar: Any = None
    cache_salt: bytes = b""
    adapter: bytes = b""
    priority: int = 0
    arrival_time: float = 0.0
    pooling: PoolingParams | None = None
    bidirectional_spans: tuple[tuple[int, int], ...] = ()
    predicted_ids: tuple[int, ...] = ()
    rope_border: int = 0
    rope_length: int = 0

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise ValueError("a request needs at least one token")
        if self.pooling is None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if self.pooling is not None and (self.max_tokens != 0 or self.pooling.normalize is None):
            raise ValueError("a pooling request has max_tokens 0 and says whether to normalize")
        end = 0
        for item in self.items:
            if item.start < end or item.end > len(self.token_ids):
                raise ValueError("item spans must be ascending, disjoint and inside the prompt")
            end = item.end
        end = 0
        for first, last in self.bidirectional_spans:
            if not end <= first < last <= len(self.token_ids):
                raise ValueError(
                    "bidirectional_spans must be ascending, disjoint and inside the prompt"
                )
            end = last

    def rope_length_at(self, num_tokens: int) -> int:
        """Return the ``rope_length`` for a sequence of ``num_tokens``; 0 for short ones."""
        return self.rope_length if num_tokens > self.rope_border else 0

    def stop(self, start: int, end: int) -> int:
        """Return an end, at most ``end``, at which no bidirectional span is cut.

        It is ``start`` when there is no room for the bidirectional span that it begins with.
        """
        for first, last in self.bidirectional_spans:
            if first < end < last:
                return max(start, first)
        return end


class Status(enum.Enum):
    """State of a sequence."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """The scheduler's record of one request. Only the scheduler writes to it.

    Invariant: ``0 <= num_computed <= len(token_ids)``, and ``block_ids`` cover at least
    ``num_computed`` tokens, counting ``num_freed`` blocks that were given back.

    Attributes:
        token_ids: All known tokens: the prompt and the generated ones.
        num_computed: How many of them have their keys and values in the cache.
        num_cached: Prompt tokens found in the prefix cache when the sequence first started.
        block_ids: Its blocks; like the next field, ``num_registered`` and ``num_freed``, written
            by ``KVCacheManager``.
        block_digests: Those of the leading full blocks, as far as they were needed.
        num_registered: Leading blocks that have been offered to the prefix index.
        num_freed: Leading blocks that were given back, as no row reads them any more.
        eos_ids: Tokens that end the sequence; empty with ``ignore_eos``.
        stop_ids: Further tokens that end it.
        waits_for: Digest of a block that another sequence is computing and this one could share.
        prompt_logprobs: Entries of the chunks so far, until the first token is generated.
        rope_length: The request's, at the present length; ``block_digests`` depend on it.
        is_sound: All numbers computed so far are finite; otherwise its blocks are not shared.
        encode_seconds: Seconds of the batches that encoded its items, as far as they are known.
        num_predicted: Tried tokens of ``predicted_ids`` that were right, and that were wrong.
        num_right: Those of the latest step that were right.
    """

    seq_id: int
    request: EngineRequest
    token_ids: list[int]
    status: Status = Status.WAITING
    num_computed: int = 0
    num_cached: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_digests: list[bytes] = field(default_factory=list)
    num_preemptions: int = 0
    num_registered: int = 0
    num_freed: int = 0
    eos_ids: frozenset[int] = frozenset()
    stop_ids: frozenset[int] = frozenset()
    first_scheduled_time: float | None = None
    waits_for: bytes | None = None
    prompt_logprobs: list[tuple[tuple[int, float, int], ...]] = field(default_factory=list)
    rope_length: int = 0
    is_sound: bool = True
    encode_seconds: float = 0.0
    num_predicted: tuple[int, int] = (0, 0)
    num_right: int = 0

    @property
    def num_prompt_tokens(self) -> int:
        """Return the number of tokens of the prompt, placeholders expanded."""
        return len(self.request.token_ids)

    @property
    def num_generated(self) -> int:
        """Return the number of tokens generated so far."""
        return len(self.token_ids) - len(self.request.token_ids)

    @property
    def num_uncomputed(self) -> int:
        """Return the number of known tokens that are still to be computed."""
        return len(self.token_ids) - self.num_computed

    def count_drafts(self, num_tried: int, num_right: int, predicted: bool) -> None:
        """Count tokens that were tried in a step, if they came from ``predicted_ids``."""
        self.num_right = num_right if predicted else 0
        if predicted:
            right, wrong = self.num_predicted
            self.num_predicted = right + num_right, wrong + num_tried - num_right

    def updates(
        self,
        samples: tuple[TokenSample, ...],
        finish_reason: FinishReason | None,
        *,
        completes_prompt: bool,
    ) -> list[SequenceUpdate]:
        """Return the updates for new tokens, which are the last known ones.

        With ``completes_prompt`` the first takes along the entries of the prompt, if wanted.
        Each counts the right tokens of ``predicted_ids`` up to its own: the text may end there.
        """
        fields: list[dict[str, Any]] = [{"sample": sample} for sample in samples]
        if completes_prompt and self.request.params.prompt_logprobs is not None:
            fields[0]["prompt_logprobs"] = tuple(self.prompt_logprobs)
            self.prompt_logprobs.clear()
        if finish_reason is not None:
            fields[-1]["finish_reason"] = finish_reason
            last = samples[-1].token_id
            if finish_reason == "stop" and last not in self.eos_ids:
                fields[-1]["stop_token_id"] = last
        right, wrong = self.num_predicted
        for own, num_later in zip(fields, range(self.num_right - 1, 0, -1), strict=False):
            own["num_predicted"] = right - num_later, wrong
        return [self.update(**own) for own in fields]

    def update(self, **fields: Any) -> SequenceUpdate:
        """Return an update of this sequence with what all of them have, and ``fields``."""
        fields.setdefault("num_predicted", self.num_predicted)
        return SequenceUpdate(
            request_id=self.request.request_id,
            num_cached_tokens=self.num_cached,
            first_scheduled_time=self.first_scheduled_time,
            encode_seconds=self.encode_seconds,
            **fields,
        )


@dataclass(frozen=True, slots=True)
class TokenSample:
    """One sampled token.

    ``logprobs`` are tuples ``(token_id, logprob, rank)``, the sampled token first, then the most
    likely ones; None when not asked for.
    """

    token_id: int
    logprobs: tuple[tuple[int, float, int], ...] | None = None


@dataclass(frozen=True, slots=True)
class SequenceUpdate:
    """Update of one sequence after a step: at most one new token, and its end.

    A step that gives several tokens of a sequence gives as many updates.
    ``embedding`` is the result of a pooling request, little-endian float32; it comes with the end
    (``"stop"``). ``prompt_logprobs`` come once, whole: for each prompt token after the first, its
    ``(token_id, logprob, rank)`` tuples, the prompt's own token first. ``error`` is set when
    ``finish_reason`` is ``"error"``. ``prefilled_time``, of requests that are traced, is when the
    prompt had been computed; it comes once, with ``encoded``: begin, end and number of items of
    each batch in which some were encoded. ``encode_seconds`` are those of the batches in which
    the items were encoded so far; a device that runs asynchronously tells them late.
    ``num_predicted``: as in ``Sequence``, up to this token.
    """

    request_id: str
    sample: TokenSample | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[tuple[tuple[int, float, int], ...], ...] | None = None
    error: str | None = None
    first_scheduled_time: float | None = None
    embedding: bytes | None = None
    prefilled_time: float | None = None
    encode_seconds: float = 0.0
    encoded: tuple[tuple[float, float, int], ...] = ()
    num_predicted: tuple[int, int] = (0, 0)
