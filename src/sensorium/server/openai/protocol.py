"""Bodies of requests: OpenAI's fields, and Sensorium's own.

Types are strict (``"1"`` is no number, ``true`` no integer), unknown fields are refused, ``null``
means "not given". Ranges of sampling values are checked by ``SamplingParams``, conversations by
``text.chat.conversation``. Validation stops at the first wrong value of a list: an error for each
of a million would take seconds.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

T = TypeVar("T")
Items = Annotated[list[T], Field(fail_fast=True)]


def _up_to_first_wrong(*kinds: type) -> BeforeValidator:
    """Return a validator that reduces an object to its first member of another type, if any."""

    def first(value: Any) -> Any:
        if isinstance(value, dict):
            for key, member in value.items():
                if type(member) not in kinds:
                    return {key: member}
        return value

    return BeforeValidator(first)


Numbers = Annotated[dict[str, float], _up_to_first_wrong(int, float)]
Objects = Annotated[dict[str, dict[str, Any]], _up_to_first_wrong(dict)]


class Body(BaseModel):
    """Base class of all bodies."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _up_to_first_unknown(cls, value: Any) -> Any:
        """Reduce an object with many unknown members to the known ones and the first unknown."""
        if not isinstance(value, dict) or len(value) <= len(cls.model_fields):
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = next(key for key in value if key not in known)
        return {key: value[key] for key in (*known, unknown) if key in value}


class StreamOptions(Body):
    """Options of a stream."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(Body):
    """A named JSON schema. ``strict`` has no effect: the schema is always enforced."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """The form that the answer must have.

    A structural tag has ``format``, or ``structures`` and ``triggers``.
    """

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    format: dict[str, Any] | None = None
    structures: Items[dict[str, Any]] | None = None
    triggers: Items[str] | None = None


class PromptBody(Body):
    """Fields of all bodies with prompts."""

    model: str | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    media_io_kwargs: Objects | None = None


class RequestBody(PromptBody):
    """Fields of all bodies that the engine computes."""

    cache_salt: str | None = Field(None, max_length=1024)
    priority: int | None = Field(None, ge=-(1 << 31), le=1 << 31)
    request_id: str | None = Field(None, pattern=r"^[A-Za-z0-9._:-]{1,128}$")
    user: str | None = None


class RenderingBody(Body):
    """Fields of all bodies that may have a conversation: options of its rendering."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class SamplingBody(RequestBody):
    """Fields of sampling that all bodies for generated text share."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    min_tokens: int | None = None
    stop: str | Items[str] | None = None
    stop_token_ids: Items[int] | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Numbers | None = None
    allowed_token_ids: Items[int] | None = None
    bad_words: Items[str] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    structured_outputs: dict[str, Any] | None = None


class GenerationBody(SamplingBody):
    """Fields that chat and completions share."""

    n: int | None = None
    max_tokens: int | None = None
    prompt_logprobs: int | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_token_ids: bool | None = None
    include_reasoning: bool | None = None


class TextPart(Body):
    """A part of a text."""

    type: Literal["text"]
    text: str


class Prediction(Body):
    """An answer of which much is known before, as a text or as parts of one."""

    type: Literal["content"]
    content: str | Items[TextPart]

    @property
    def text(self) -> str:
        """The whole text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatBody(RenderingBody, GenerationBody):
    """Body of ``POST /v1/chat/completions``.

    Of the last two blocks, the first is accepted without effect, for clients that always send it;
    the second is not supported.
    """

    messages: Items[dict[str, Any]]
    tools: Items[dict[str, Any]] | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    return_metrics: bool | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    prediction: Prediction | None = None
    reasoning_effort: str | None = None
    modalities: Items[Literal["text"]] | None = None

    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    verbosity: str | None = None

    audio: None = None
    functions: None = None
    function_call: None = None
    moderation: None = None
    web_search_options: None = None


class CompletionBody(GenerationBody):
    """Body of ``POST /v1/completions``. ``prompt``: a text, token ids, or a list of either."""

    prompt: Any
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: None = None
    add_special_tokens: bool | None = None


class EmbeddingBody(RenderingBody, RequestBody):
    """Body of ``POST /v1/embeddings``: an ``input`` or ``messages``.

    ``input`` is a text, token ids, or a list of either; ``truncate_prompt_tokens`` cuts each to so
    many tokens (-1: to the context).
    """

    input: Any = None
    messages: Items[dict[str, Any]] | None = None
    encoding_format: Literal["float", "base64"] | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=1 << 31)
    truncation_side: Literal["left", "right"] | None = None
    dimensions: int | None = None
    normalize: bool | None = None
    add_special_tokens: bool | None = None


class ScoringBody(RequestBody):
    """Fields of all bodies that compare texts or media by their embeddings."""

    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=1 << 31)
    truncation_side: Literal["left", "right"] | None = None
    dimensions: int | None = None
    add_special_tokens: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ScoreBody(ScoringBody):
    """Body of ``POST /v1/score``: two sides, each under one of its names.

    A side is an entry or a list of entries; an entry is a text, or an object with ``text``, an
    ``image``, or ``content`` as in chat.
    """

    text_1: Any = None
    text_2: Any = None
    data_1: Any = None
    data_2: Any = None
    queries: Any = None
    documents: Any = None
    items: Any = None


class RerankBody(ScoringBody):
    """Body of ``POST /v1/rerank``: entries as in ``ScoreBody``."""

    query: Any
    documents: Any
    top_n: int | None = Field(None, ge=0, le=1 << 31)
    return_documents: bool | None = None
    max_tokens_per_doc: int | None = Field(None, ge=1, le=1 << 31)


class TranscriptionBody(Body):
    """Fields of the form of ``POST /v1/audio/transcriptions`` and ``/translations``, but its file.

    The last block is accepted without effect.
    """

    model: str | None = None
    language: str | None = Field(None, pattern=r"^[A-Za-z]{2,32}([_-][A-Za-z0-9]{1,8})*$")
    prompt: str | None = Field(None, max_length=8192)
    response_format: Literal["json", "text", "verbose_json"] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    request_id: str | None = Field(None, pattern=r"^[A-Za-z0-9._:-]{1,128}$")
    user: str | None = None

    include: str | None = None
    chunking_strategy: str | None = None


class TokenizeBody(RenderingBody, PromptBody):
    """Body of ``POST /tokenize``: a ``prompt``, or ``messages`` with the options of rendering."""

    prompt: str | None = None
    messages: Items[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    tools: Items[dict[str, Any]] | None = None


class DetokenizeBody(Body):
    """Body of ``POST /detokenize``."""

    model: str | None = None
    tokens: Items[int]


class ExpiresAfter(Body):
    """The time for which a file is kept."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=30 * 86400)


class BatchBody(Body):
    """Body of ``POST /v1/batches``. ``completion_window``: a number with m, h or d, as in 24h."""

    input_file_id: str
    endpoint: str
    completion_window: str = Field(pattern=r"^[0-9]{1,5}[mhd]$")
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None


class LoadAdapterBody(Body):
    """Body of ``POST /v1/load_lora_adapter``."""

    lora_name: str = Field(min_length=1, max_length=256)
    lora_path: str = Field(min_length=1, max_length=4096)
    model: str | None = None
    load_inplace: Literal[False] | None = None
    is_3d_lora_weight: Literal[False] | None = None


class UnloadAdapterBody(Body):
    """Body of ``POST /v1/unload_lora_adapter``."""

    lora_name: str = Field(min_length=1, max_length=256)
    lora_int_id: int | None = None
