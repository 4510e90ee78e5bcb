"""Bodies of Anthropic's Messages API. Strict, as those of chat; see ``server.openai.protocol``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from sensorium.server.openai.protocol import Body, Items, RequestBody


class Thinking(Body):
    """``enabled`` and ``adaptive`` let the chat template think, ``disabled`` forbids it.

    ``budget_tokens`` and ``display`` have no effect: ``max_tokens`` limits thinking and text
    together.
    """

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1)
    display: str | None = None


class OutputFormat(Body):
    """The form that the text must have: a JSON schema, which is always enforced."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """Options of the answer: its form, and the reasoning effort for the chat template."""

    format: OutputFormat | None = None
    effort: str | None = Field(None, max_length=64)


class ChatChoice(Body):
    """Choice among the tools; ``name`` goes with ``tool`` only."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class CountBody(RequestBody):
    """Body of ``POST /v1/messages/count_tokens``.

    The last block is accepted without effect, for clients that always send it.
    """

    messages: Items[dict[str, Any]]
    system: str | Items[dict[str, Any]] | None = None
    tools: Items[dict[str, Any]] | None = None
    tool_choice: ChatChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    cache_control: dict[str, Any] | None = None


class MessagesBody(CountBody):
    """Body of ``POST /v1/messages``.

    Of the last two blocks, the first is accepted without effect; the second is not supported.
    """

    max_tokens: int
    stop_sequences: Items[str] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    structured_outputs: dict[str, Any] | None = None

    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    inference_geo: str | None = None

    container: None = None
    context_management: None = None
    mcp_servers: None = None
