"""Messages between scheduler and runner: ``StepPlan`` and ``StepResult``, plain values both."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from sensorium.core.request import EngineRequest, TokenSample

NO_TOKEN_LEFT = (
    "The model gave no usable distribution for the next token: either the restrictions of the "
    "request (allowed_token_ids, bad_words, logit_bias, min_tokens, structured_outputs) leave no "
    "token, or a penalty or bias made its numbers overflow. Relax them."
)
"""Message of a sequence for which no token could be sampled; the caller can mend that."""

TOO_COMPLEX = (
    "The constraint of structured_outputs became too complex to follow within the answer; "
    "simplify it."
)
"""Message of a sequence whose grammar reached a limit of time or size; the caller can mend that."""

UNUSABLE = "The model made no usable numbers of "
"""Beginning of messages about unusable numbers of the model; only the operator can mend that."""


def unusable(what: str, flaw: str, dtype: str) -> str:
    """Return the message of a sequence that failed by what the model computed.

    Args:
        what: The input, or an item of it.
        flaw: What is wrong with the numbers, such as "its logits are all equal".
        dtype: That of the model.
    """
    advice = (
        "Its weights may be damaged, or the input is outside of what it can compute"
        if dtype == "float32"
        else "Numbers may be too large for this type: start with --dtype float32 (in Python "
        "dtype='float32')"
    )
    return f"{UNUSABLE}{what}: {flaw} in {dtype}. {advice}."


@dataclass(frozen=True, slots=True)
class NewSequence:
    """A sequence that the runner does not hold: new, or preempted before.

    ``token_ids`` are all known tokens: the prompt and, after a preemption, the generated ones.
    """

    seq_id: int
    request: EngineRequest
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Span:
    """The part of one sequence that a step computes: positions ``start`` to ``start + num_tokens``.

    ``new_block_ids`` follow the first ``first_block`` blocks that the runner knows of the sequence,
    or all of them with None; further ones have been given back. ``draft_ids``: the last tokens of
    the span, which are not known, but tried. The runner samples the next token of each as long as
    the one before is what was sampled.
    ``samples``: the span reaches the last known token, and the next one is sampled. ``pools``: it
    reaches the last token of a sequence whose embedding is wanted. Never both.
    """

    seq_id: int
    start: int
    num_tokens: int
    new_block_ids: tuple[int, ...]
    samples: bool
    pools: bool = False
    first_block: int | None = None
    draft_ids: tuple[int, ...] = ()

    def with_drafts(self, draft_ids: tuple[int, ...], new_block_ids: tuple[int, ...]) -> Span:
        """Return a span that also tries tokens, for which blocks were added."""
        return replace(
            self,
            num_tokens=self.num_tokens + len(draft_ids),
            new_block_ids=self.new_block_ids + new_block_ids,
            draft_ids=draft_ids,
        )

    def with_fewer_drafts(self, num_drafts: int) -> Span:
        """Return the span with the first so many of its tried tokens."""
        num_tokens = self.num_tokens - len(self.draft_ids) + num_drafts
        return replace(self, num_tokens=num_tokens, draft_ids=self.draft_ids[:num_drafts])


@dataclass(frozen=True, slots=True)
class EncodeJob:
    """An item to encode before the forward pass: item ``item_index`` of sequence ``seq_id``.

    Its features came with the request of that sequence. The encoder output is kept under ``digest``
    until a plan lists it in ``evict``.
    """

    digest: bytes
    seq_id: int
    item_index: int
    num_embeds: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step of the runner: drop, evict, add, encode, run the spans, sample and pool."""

    step_id: int
    dropped: tuple[int, ...] = ()
    """Sequences to forget: finished, aborted or preempted since the last plan."""
    evict: tuple[bytes, ...] = ()
    """Digests of encoder outputs to forget."""
    new: tuple[NewSequence, ...] = ()
    encode: tuple[EncodeJob, ...] = ()
    spans: tuple[Span, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Return the number of tokens that this step computes."""
        return sum(span.num_tokens for span in self.spans)

    @property
    def empty(self) -> bool:
        """Return True when the runner has nothing to do."""
        return not (self.spans or self.dropped or self.evict or self.new or self.encode)


@dataclass(frozen=True, slots=True)
class EncodeReport:
    """The cost of encoding: items, seconds, bytes of encoder outputs, and items that failed.

    Seconds are those of whole batches that succeeded. With ``is_late`` the device runs
    asynchronously, and they may be those of earlier steps. Precomputed embeddings are not encoded,
    and not counted.
    """

    num_items: int = 0
    seconds: float = 0.0
    num_bytes: int = 0
    num_failed: int = 0
    is_late: bool = False


NOTHING_ENCODED = EncodeReport()


@dataclass(slots=True)
class StepResult:
    """The result of a plan.

    Attributes:
        step_id: That of the plan.
        samples: Of each span with ``samples``, by sequence id, a token, and one more for each tried
            token that was the one sampled before it.
        embeddings: Little-endian float32 numbers for each span with ``pools``, by sequence id.
        prompt_logprobs: Of sequences that asked for them, the entries of the prompt tokens
            *predicted by* the span's positions (start+1 … start+num_tokens, clipped to the prompt).
        failed: Messages for the callers of sequences that could not be run. They have no sample and
            are finished with an error; the others are unharmed.
        num_drafts: How many tried tokens were computed, by sequence id: fewer than in the plan
            where a grammar forbids them, or where one spoilt the numbers of others.
        repeated: Some of the plan was computed twice, so that its time tells nothing.
        unsound: Sequences with infinite or undefined numbers among what was computed: their blocks
            must not be shared.
        failed_items: Digests of items whose encoding failed; they are not resident.
        unusable_items: Of those whose embeddings are unusable, the flaw and the dtype.
        encoded: The cost of encoding.
    """

    step_id: int
    samples: dict[int, tuple[TokenSample, ...]] = field(default_factory=dict)
    embeddings: dict[int, bytes] = field(default_factory=dict)
    prompt_logprobs: dict[int, tuple[tuple[tuple[int, float, int], ...], ...]] = field(
        default_factory=dict
    )
    num_drafts: dict[int, int] = field(default_factory=dict)
    repeated: bool = False
    failed: dict[int, str] = field(default_factory=dict)
    unsound: set[int] = field(default_factory=set)
    failed_items: tuple[bytes, ...] = ()
    unusable_items: dict[bytes, tuple[str, str]] = field(default_factory=dict)
    encoded: EncodeReport = NOTHING_ENCODED

    def drafts_of(self, span: Span) -> tuple[int, ...]:
        """Return the tried tokens of a span of the plan that were computed."""
        return span.draft_ids[: self.num_drafts.get(span.seq_id, 0)]

    def item_failure(self, digest: bytes, name: str) -> str:
        """Return the message for sequences that need the failed item, which is called ``name``."""
        flaw = self.unusable_items.get(digest)
        return unusable(name, *flaw) if flaw else f"{name.capitalize()} could not be encoded."
