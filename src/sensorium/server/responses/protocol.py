"""Bodies of the Responses API. Strict, as those of chat; see ``server.openai.protocol``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from sensorium.server.openai.protocol import (
    Body,
    Items,
    RenderingBody,
    SamplingBody,
    StreamOptions,
)

LOGPROBS = "message.output_text.logprobs"
"""Entry of ``include`` that asks for log probabilities."""

Includable = Literal[
    "message.output_text.logprobs",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
"""Values of ``include``. All but ``LOGPROBS`` are without effect: they are about what is in every
answer, or about tools that do not exist here."""

MAX_METADATA = 16
MAX_METADATA_NAME = 64
MAX_METADATA_VALUE = 512


def _check_metadata(value: dict[str, str]) -> dict[str, str]:
    if len(value) > MAX_METADATA:
        raise ValueError(f"it has {len(value)} members; at most {MAX_METADATA} are allowed")
    if any(len(name) > MAX_METADATA_NAME for name in value):
        raise ValueError(f"a name is longer than {MAX_METADATA_NAME} characters")
    if any(len(text) > MAX_METADATA_VALUE for text in value.values()):
        raise ValueError(f"a value is longer than {MAX_METADATA_VALUE} characters")
    return value


Metadata = Annotated[
    dict[str, str],
    AfterValidator(_check_metadata),
    Field(json_schema_extra={"maxProperties": MAX_METADATA}),
]


class TextFormat(Body):
    """The form that the text must have. ``strict`` has no effect: a schema is always enforced."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextConfig(Body):
    """Options of the text. ``verbosity`` is accepted without effect."""

    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(Body):
    """Options of reasoning: ``effort`` goes to the chat template; the others have no effect."""

    effort: str | None = Field(None, max_length=64)
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None
    context: Literal["auto", "current_turn", "all_turns"] | None = None
    mode: str | None = Field(None, max_length=64)


class InputBody(RenderingBody, SamplingBody):
    """Fields that make the prompt of a response.

    ``input`` is a text or a list of items; ``previous_response_id`` puts an earlier response, with
    all that came before it, in front of them.
    """

    input: str | Items[dict[str, Any]] | None = None
    instructions: str | None = None
    previous_response_id: str | None = Field(None, max_length=128)
    tools: Items[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    truncation: Literal["auto", "disabled"] | None = None

    conversation: None = None


class ResponsesBody(InputBody):
    """Body of ``POST /v1/responses``.

    Of the last two blocks, the first is accepted without effect; the second is not supported.
    """

    background: bool | None = None
    include: Items[Includable] | None = None
    max_output_tokens: int | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_logprobs: int | None = None

    max_tool_calls: int | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None

    prompt: None = None
    context_management: None = None
    moderation: None = None


class InputTokensBody(InputBody):
    """Body of ``POST /v1/responses/input_tokens``."""
