"""From a body of the Messages API to a chat: prompt, tools and sampling parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from sensorium.engine.prompts.types import ChatPrompt
from sensorium.errors import InvalidRequestError, located
from sensorium.server.anthropic.blocks import parse_conversation
from sensorium.server.anthropic.protocol import ChatChoice, CountBody, MessagesBody
from sensorium.server.context import ModelContext
from sensorium.server.openai.places import Rename, renaming
from sensorium.server.openai.prompts import chat_prompt
from sensorium.server.openai.protocol import ChatBody, JsonSchema, ResponseFormat
from sensorium.server.openai.tool_calls import ToolPlan, tool_plan
from sensorium.server.payload import abbreviate

_PLACES = {
    r"max_completion_tokens": "max_tokens",
    r"stop": "stop_sequences",
    r"response_format(\.json_schema)?(\.schema)?": "output_config.format.schema",
    r"reasoning_effort": "output_config.effort",
    r"(tools\[\d+\])\.function\.parameters": r"\1.input_schema",
    r"(tools\[\d+\])\.function": r"\1",
    r"tool_choice\.function": "tool_choice",
}
"""Places in a chat's body, as patterns, and what they are in a body of this API."""


@dataclass(frozen=True, slots=True)
class MessagesPrompt:
    """A body's prompt, and the chat that the body amounts to."""

    chat: ChatBody
    plan: ToolPlan
    prompt: ChatPrompt
    rename: Rename


def messages_prompt(context: ModelContext, request: Request, body: CountBody) -> MessagesPrompt:
    """Return the prompt of a body. Raises RequestError with the place in ``body``."""
    context.check_generates()
    conversation, places = parse_conversation(body.system, body.messages)
    rename = renaming(_PLACES, "messages", places)
    chat = _chat(body)
    last = conversation.messages[-1]
    if last.role == "assistant" and last.parts and not last.tool_calls:
        chat.continue_final_message = True  # as Anthropic's API does
        chat.messages = [{"role": "assistant", "content": last.text}]
    with located(rename=rename):
        plan = tool_plan(context, chat)
        prompt = chat_prompt(context, request, chat, plan.for_template, conversation)
    return MessagesPrompt(chat, plan, prompt, rename)


def _chat(body: CountBody) -> ChatBody:
    """Return a chat's body with the fields that both have, and those that differ in form."""
    shared = {
        name: value
        for name in ChatBody.model_fields
        if name in type(body).model_fields and (value := getattr(body, name)) is not None
    }
    kwargs = dict(body.chat_template_kwargs or {})
    if body.thinking is not None:
        kwargs.setdefault("enable_thinking", body.thinking.type != "disabled")
    choice = body.tool_choice
    config = body.output_config
    fields: dict[str, Any] = {
        "messages": [],
        "metadata": None,
        "max_tokens": None,
        "tools": _chat_tools(body.tools) or None,
        "tool_choice": _chat_choice(choice),
        "parallel_tool_calls": not (choice is not None and choice.disable_parallel_tool_use),
        "response_format": _response_format(body),
        "reasoning_effort": config.effort if config is not None else None,
        "chat_template_kwargs": kwargs or None,
    }
    if isinstance(body, MessagesBody):
        fields |= {"max_completion_tokens": body.max_tokens, "stop": body.stop_sequences}
    return ChatBody.model_construct(**{**shared, **fields})


def _chat_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Return tools in chat's form. Raises InvalidRequestError for tools that the server runs."""
    found = []
    for index, tool in enumerate(tools or ()):
        kind = tool.get("type")
        if kind not in (None, "custom"):
            raise InvalidRequestError(
                f"tools[{index}].type is {abbreviate(kind)}; this server runs no tools, only those "
                "of type 'custom' are known, which your program runs.",
                param=f"tools[{index}].type",
            )
        function = {"name": tool.get("name"), "parameters": tool.get("input_schema")}
        if tool.get("description") is not None:
            function["description"] = tool["description"]
        found.append({"type": "function", "function": function})
    return found


def _chat_choice(choice: ChatChoice | None) -> str | dict[str, Any] | None:
    if choice is None:
        return None
    if choice.type == "tool":
        return {"type": "function", "function": {"name": choice.name}}
    return "required" if choice.type == "any" else choice.type


def _response_format(body: CountBody) -> ResponseFormat | None:
    form = body.output_config.format if body.output_config is not None else None
    form = form or body.output_format
    if form is None:
        return None
    schema = JsonSchema.model_validate({"schema": form.schema_})
    return ResponseFormat(type="json_schema", json_schema=schema)
