"""From a body of the Responses API to a chat: prompt, tools and sampling parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from sensorium.engine.prompts.types import ChatPrompt
from sensorium.errors import InvalidRequestError, located
from sensorium.server.context import ModelContext, tenant_of
from sensorium.server.openai.places import Rename, renaming
from sensorium.server.openai.prompts import chat_prompt
from sensorium.server.openai.protocol import ChatBody, JsonSchema, ResponseFormat
from sensorium.server.openai.tool_calls import ToolPlan, tool_plan
from sensorium.server.payload import abbreviate
from sensorium.server.responses.items import Item, Messages, parse_items
from sensorium.server.responses.protocol import LOGPROBS, InputBody, ResponsesBody, TextFormat
from sensorium.server.responses.store import Turn
from sensorium.text.chat.conversation import Conversation

_PLACES = {
    r"max_completion_tokens": "max_output_tokens",
    r"response_format\.json_schema\.schema": "text.format.schema",
    r"response_format\.json_schema": "text.format",
    r"response_format": "text.format",
    r"reasoning_effort": "reasoning.effort",
    r"(tools\[\d+\])\.function": r"\1",
    r"tool_choice\.function": "tool_choice",
}
"""Places in a chat's body, as patterns, and what they are in a body of this API."""


@dataclass(frozen=True, slots=True)
class ResponsePrompt:
    """A body's prompt.

    ``items``: those of its ``input``, in the form in which they are stored. ``last``: the turn that
    it continues; None for a new conversation.
    """

    items: list[Item]
    last: Turn | None
    chat: ChatBody
    plan: ToolPlan
    prompt: ChatPrompt
    rename: Rename


def response_prompt(
    context: ModelContext, request: Request, body: InputBody, **fields: Any
) -> ResponsePrompt:
    """Return the prompt of a body, its history included, and the chat that it amounts to.

    ``fields``: further fields of the chat. Raises RequestError with the place in ``body``.
    """
    reading = context.responses.reading(tenant_of(request))
    history: list[Item] = []
    if body.previous_response_id is not None:
        history = reading.history(body.previous_response_id, "previous_response_id")
    if body.input is None and not history:
        raise InvalidRequestError("input is required.", param="input")
    items = []
    if body.input is not None and body.input != []:
        items = parse_items(body.input, reading.item)
    conversation, places = _conversation(body, history, items)
    rename = renaming(_PLACES, "input", places)
    chat = _chat(body, fields)
    with located(rename=rename):
        plan = tool_plan(context, chat)
        prompt = chat_prompt(context, request, chat, plan.for_template, conversation)
        if body.truncation == "auto":
            prompt = dataclasses.replace(prompt, drops_turns=True)
    return ResponsePrompt(items, reading.last, chat, plan, prompt, rename)


def sampling_fields(body: ResponsesBody) -> dict[str, Any]:
    """Return the fields of a chat for the answer's length and log probabilities.

    Raises InvalidRequestError.
    """
    wants_logprobs = LOGPROBS in (body.include or ())
    if body.top_logprobs and not wants_logprobs:
        raise InvalidRequestError(
            f"top_logprobs is {body.top_logprobs}, but include does not have '{LOGPROBS}'; "
            "give both.",
            param="top_logprobs",
        )
    return {
        "max_completion_tokens": body.max_output_tokens,
        "logprobs": wants_logprobs or None,
        "top_logprobs": body.top_logprobs,
    }


def _conversation(
    body: InputBody, history: Sequence[Item], items: Sequence[Item]
) -> tuple[Conversation, list[str]]:
    """Return the messages, and their places in the request."""
    messages = Messages()
    if body.instructions:
        messages.add_text("system", body.instructions, "instructions")
    for item in history:
        messages.add(item, "previous_response_id")
    is_text = isinstance(body.input, str)
    for index, item in enumerate(items):
        messages.add(item, "input" if is_text else f"input[{index}]")
    conversation = messages.conversation()
    if not conversation.messages:
        raise InvalidRequestError(
            "input has no message; give a text or at least one message.", param="input"
        )
    return conversation, messages.places


def _chat(body: InputBody, fields: Mapping[str, Any]) -> ChatBody:
    """Return a chat's body with the fields that both have, and those that differ in form."""
    shared = {
        name: value
        for name in ChatBody.model_fields
        if name in type(body).model_fields and (value := getattr(body, name)) is not None
    }
    form = body.text.format if body.text is not None else None
    effort = body.reasoning.effort if body.reasoning is not None else None
    return ChatBody.model_construct(
        **{
            **shared,
            "messages": [],
            "tools": chat_tools(body.tools) or None,
            "tool_choice": _chat_choice(body.tool_choice),
            "response_format": _response_format(form),
            "reasoning_effort": effort,
            **fields,
        }
    )


def chat_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Return tools in chat's form. Raises InvalidRequestError for built-in tools."""
    found = []
    for index, tool in enumerate(tools or ()):
        kind = tool.get("type")
        if kind != "function":
            raise InvalidRequestError(
                f"tools[{index}].type is {abbreviate(kind)}; built-in and custom tools do not "
                "exist here, only 'function': offer it as a function that your program runs.",
                param=f"tools[{index}].type",
            )
        members = ("name", "description", "parameters", "strict")
        found.append({"type": "function", "function": {k: tool[k] for k in members if k in tool}})
    return found


def _chat_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    """Return a tool choice in chat's form; what is wrong with others is found there."""
    if isinstance(choice, dict) and choice.get("type") == "function" and "function" not in choice:
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _response_format(form: TextFormat | None) -> ResponseFormat | None:
    if form is None:
        return None
    if form.type != "json_schema":
        return ResponseFormat(type=form.type)
    if form.schema_ is None:
        raise InvalidRequestError(
            "text.format.schema is required with type 'json_schema'.",
            param="text.format.schema",
        )
    schema = JsonSchema.model_validate({"name": form.name, "schema": form.schema_})
    return ResponseFormat(type=form.type, json_schema=schema)
