"""Results of requests: text as ``RequestOutput`` and ``CompletionOutput``, or an embedding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log probability of one token at one position.

    Attributes:
        logprob: Natural logarithm of the probability.
        rank: 1 for the most likely token of the vocabulary at that position.
        decoded_token: The token's text.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One sample of a request.

    Attributes:
        index: Number of the sample, from 0 to ``n - 1``.
        text: The generated text.
        token_ids: The generated tokens.
        cumulative_logprob: Sum of the log probabilities of the generated tokens; None when no
            ``logprobs`` were asked for.
        logprobs: For each generated token a dict of token id to ``Logprob``; None when none were
            asked for.
        finish_reason: "stop", "length", "abort" or "error"; None while the sample is generated.
        stop_reason: The stop string or stop token id that ended the sample; None for the
            end-of-sequence token.
        accepted_prediction_tokens: Tokens of its ``prediction`` that were tried, and right.
        rejected_prediction_tokens: Those that were tried and wrong.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    accepted_prediction_tokens: int = 0
    rejected_prediction_tokens: int = 0

    @property
    def finished(self) -> bool:
        """True when the sample is complete."""
        return self.finish_reason is not None


@dataclass(frozen=True, slots=True)
class ItemMetrics:
    """Cost of one media item of a request, and the frames that the model sees of it.

    Attributes:
        place: Place of the item in the request, such as ``messages[0].content[1]``.
        modality: "image", "video" or "audio".
        num_embeds: Prompt positions that it fills.
        cached: Its preprocessed features came from the cache.
        fetch_seconds: Reading or downloading its file.
        decode_seconds: Decoding it.
        preprocess_seconds: The model's processor.
        frames: Of a video, the index in the file of each frame that the model sees, ascending.
        fps: Of a video, frames per second of the file; None if unknown.
        num_source_frames: Of a video, number of frames of the file.
    """

    place: str
    modality: str
    num_embeds: int
    cached: bool = False
    fetch_seconds: float = 0.0
    decode_seconds: float = 0.0
    preprocess_seconds: float = 0.0
    frames: tuple[int, ...] = ()
    fps: float | None = None
    num_source_frames: int | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Times of one request, in seconds of ``time.monotonic()``, and what its media took.

    Attributes:
        arrival_time: When the request was accepted.
        prepared_time: When its prompt was rendered and its media were loaded; None before.
        first_scheduled_time: When its first step began; None before.
        first_token_time: When its first token was generated; None before.
        finished_time: When it ended; None before.
        encode_seconds: Seconds of the batches in which its media were encoded (not a time).
        items: Its media items, in the order of the prompt.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    prepared_time: float | None = None
    encode_seconds: float = 0.0
    items: tuple[ItemMetrics, ...] = ()

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token; None before it."""
        if self.first_token_time is None:
            return None
        return self.first_token_time - self.arrival_time


@dataclass(slots=True)
class RequestOutput:
    """Result of one request for text.

    Attributes:
        request_id: Id of the request.
        prompt: The prompt as text; None when it was given as token ids.
        prompt_token_ids: Ids of the prompt, with placeholders at their full length.
        outputs: The samples.
        finished: True when all samples are complete.
        prompt_logprobs: One entry per prompt token, the first of which is None; None when they were
            not asked for.
        num_cached_tokens: Prompt tokens whose keys and values came from the prefix cache.
        num_item_tokens: Prompt positions that the items of each modality fill.
        metrics: Times of the request.
        index: Place of the prompt among those of a call of ``LLM``; None elsewhere.
        warnings: What of the request was not done as it was asked.
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
    """Tokens that an embedding took.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        cached_tokens: Those whose keys and values came from the prefix cache.
    """

    prompt_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """The same as ``prompt_tokens``: nothing is generated."""
        return self.prompt_tokens


@dataclass(slots=True)
class PoolingOutput:
    """An embedding as a tensor.

    Attributes:
        data: Tensor (dimensions,) float32 on the CPU.
    """

    data: torch.Tensor


@dataclass(slots=True)
class EmbeddingOutput:
    """An embedding as a list.

    Attributes:
        embedding: Its numbers.
    """

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """Number of dimensions."""
        return len(self.embedding)


@dataclass(slots=True)
class ScoringOutput:
    """The similarity of two prompts.

    Attributes:
        score: Cosine of their embeddings, from -1 to 1.
    """

    score: float


OutputsT = TypeVar("OutputsT")


@dataclass(slots=True)
class PoolingRequestOutput(Generic[OutputsT]):
    """Result of one request for an embedding.

    Attributes:
        request_id: Id of the request.
        outputs: The embedding.
        prompt_token_ids: Ids of the prompt, with placeholders at their full length.
        finished: Always true.
        num_cached_tokens: Prompt tokens whose keys and values came from the prefix cache.
        prompt: The prompt as text; None when it was given as token ids.
        num_item_tokens: Prompt positions that the items of each modality fill.
        metrics: Times of the request.
        index: Place of the prompt among those of a call of ``LLM``; None elsewhere.
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
        """Tokens that the embedding took."""
        return PoolingUsage(len(self.prompt_token_ids), self.num_cached_tokens)


@dataclass(slots=True)
class EmbeddingRequestOutput(PoolingRequestOutput[EmbeddingOutput]):
    """Result of ``LLM.embed`` for one prompt: ``outputs.embedding`` is a list of numbers."""


@dataclass(slots=True)
class ScoringRequestOutput(PoolingRequestOutput[ScoringOutput]):
    """Result of ``LLM.score`` for one pair: ``outputs.score`` is a number.

    Ids, tokens and items are those of both prompts.
    """
