"""What comes back: one ``RequestOutput`` per prompt, one ``CompletionOutput`` per sample; or a vector per prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log probability of one token at one position.

    ``rank`` is 1 for the most likely token of the vocabulary at that position.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One sample of a request.

    ``logprobs`` has one dict (token id → ``Logprob``) per generated token, or is None when none were asked for.
    ``finish_reason`` is None while the sample is being generated. ``stop_reason`` is the stop string or stop token id
    that ended it; None for the end-of-sequence token.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        """Whether this sample is complete."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request, in seconds of ``time.monotonic()``; None when the stage was not reached."""

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        if self.first_token_time is None:
            return None
        return self.first_token_time - self.arrival_time


@dataclass(slots=True)
class RequestOutput:
    """Everything known of one request.

    ``prompt_token_ids`` are the ids after placeholder expansion. ``prompt_logprobs`` has one entry per prompt token,
    the first of which is None. ``num_cached_tokens`` counts prompt tokens whose KV came from the prefix cache.
    ``num_item_tokens`` counts the prompt positions that each modality fills. ``index`` is the place of the prompt among
    those of a call of ``LLM``, None elsewhere. ``warnings`` say what of the request was not done as it was asked.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    num_item_tokens: dict[str, int] = field(default_factory=dict)
    metrics: RequestMetrics | None = None
    index: int | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PoolingUsage:
    """What a vector cost, in tokens; ``cached_tokens`` of the prompt were found in the prefix cache."""

    prompt_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Nothing is generated: those of the prompt."""
        return self.prompt_tokens


@dataclass(slots=True)
class PoolingOutput:
    """A vector as a tensor ``data`` (dimensions,) float32 on the CPU."""

    data: torch.Tensor


@dataclass(slots=True)
class EmbeddingOutput:
    """A vector as a list of numbers."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """How many numbers it has."""
        return len(self.embedding)


OutputsT = TypeVar("OutputsT")


@dataclass(slots=True)
class PoolingRequestOutput(Generic[OutputsT]):
    """Everything known of one request for a vector, which is in ``outputs``.

    The other fields are those of ``RequestOutput``.
    """

    request_id: str
    outputs: OutputsT
    prompt_token_ids: list[int]
    finished: bool = True
    num_cached_tokens: int = 0
    prompt: str | None = None
    num_item_tokens: dict[str, int] = field(default_factory=dict)
    metrics: RequestMetrics | None = None
    index: int | None = None

    @property
    def usage(self) -> PoolingUsage:
        """What it cost."""
        return PoolingUsage(len(self.prompt_token_ids), self.num_cached_tokens)


@dataclass(slots=True)
class EmbeddingRequestOutput(PoolingRequestOutput[EmbeddingOutput]):
    """What ``LLM.embed`` returns for each prompt: ``outputs.embedding`` is a list of numbers."""
