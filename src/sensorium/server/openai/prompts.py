"""Prompts of a body. No dictionary of a body goes further than this."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from fastapi import Request

from sensorium.engine.prompts.types import ChatPrompt, MediaOptions, RawPrompt, Truncation
from sensorium.errors import InvalidRequestError
from sensorium.server.context import ModelContext, context_of, tenant_of
from sensorium.server.files.uploads import with_uploads
from sensorium.server.openai.protocol import (
    ChatBody,
    CompletionBody,
    EmbeddingBody,
    PromptBody,
    TokenizeBody,
)
from sensorium.server.payload import abbreviate
from sensorium.text.chat.chat_template import Conversation, parse_messages

if TYPE_CHECKING:
    from collections.abc import Mapping


def media_options(request: Request, body: PromptBody) -> MediaOptions:
    """Return the options for loading the items of a request, its tenant and its adapter."""
    return MediaOptions(
        mm_processor_kwargs=body.mm_processor_kwargs or {},
        media_io_kwargs=body.media_io_kwargs or {},
        cache_salt=(getattr(body, "cache_salt", None) or ""),
        tenant=tenant_of(request),
        adapter=context_of(request).models.adapter_of(body.model),
    )


def chat_prompt(
    context: ModelContext,
    request: Request,
    body: ChatBody | TokenizeBody | EmbeddingBody,
    tools: list[dict[str, Any]] | None = None,
    conversation: Conversation | None = None,
) -> ChatPrompt:
    """Return the conversation of a body.

    ``tools``: those that the template lists. ``conversation``: the messages, where they have been
    parsed already, of a body of another form.

    Unless the body says otherwise, a generation prompt is added where text is generated and no
    message is continued. Raises InvalidRequestError with the place of what is wrong.
    """
    continues = bool(body.continue_final_message)
    adds = body.add_generation_prompt
    if adds is None:
        adds = not continues and not isinstance(body, EmbeddingBody)
    conversation = with_uploads(
        conversation or parse_messages(body.messages or []), context.files, tenant_of(request)
    )
    return ChatPrompt(
        conversation=conversation,
        add_generation_prompt=adds,
        continue_final_message=continues,
        tools=tuple(tools) if tools else None,
        chat_template=body.chat_template,
        chat_template_kwargs=_template_kwargs(body),
        default_template_kwargs=context.config.default_chat_template_kwargs,
        add_special_tokens=body.add_special_tokens if isinstance(body, EmbeddingBody) else None,
        media=media_options(request, body),
        spelled_ids=context.forms.spelled(with_calls=bool(tools)),
    )


def _template_kwargs(body: ChatBody | TokenizeBody | EmbeddingBody) -> Mapping[str, Any]:
    """Return the template's variables of a request, with its reasoning effort."""
    kwargs = body.chat_template_kwargs or {}
    effort = getattr(body, "reasoning_effort", None)
    return {"reasoning_effort": effort, **kwargs} if effort is not None else kwargs


def raw_prompts(request: Request, body: CompletionBody | EmbeddingBody) -> list[RawPrompt]:
    """Return the prompts of a completion, or the inputs of an embedding.

    Each is a text or token ids. Raises InvalidRequestError that names the entry.
    """
    if isinstance(body, EmbeddingBody):
        name, value = "input", body.input
    else:
        name, value = "prompt", body.prompt
    media = media_options(request, body)
    adds = True if body.add_special_tokens is None else body.add_special_tokens
    if isinstance(value, str) or _is_ids(value):
        entries = [(value, name)]
    elif isinstance(value, list) and value:
        entries = [(entry, f"{name}[{i}]") for i, entry in enumerate(value)]
    else:
        _bad_prompt(value, name)
    cut = _truncation(body) if isinstance(body, EmbeddingBody) else None
    prompts = []
    for entry, param in entries:
        if isinstance(entry, str):
            prompt = RawPrompt(
                text=entry, media=media, add_special_tokens=adds, param=param, truncation=cut
            )
            prompts.append(prompt)
        elif _is_ids(entry):
            if min(entry) < 0:
                raise InvalidRequestError(f"Token ids count from 0, got {min(entry)}.", param=param)
            prompts.append(
                RawPrompt(token_ids=tuple(entry), media=media, param=param, truncation=cut)
            )
        else:
            _bad_prompt(entry, param)
    return prompts


def _truncation(body: EmbeddingBody) -> Truncation | None:
    """Return how inputs are truncated; None if not. Raises InvalidRequestError for 0 tokens."""
    most = body.truncate_prompt_tokens
    if most is None:
        return None
    if most == 0:
        raise InvalidRequestError(
            "truncate_prompt_tokens must be at least 1, or -1 for the model's context, got 0.",
            param="truncate_prompt_tokens",
        )
    return Truncation(None if most < 0 else most, left=body.truncation_side == "left")


def _is_ids(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(i, int) and not isinstance(i, bool) for i in value)
    )


def _bad_prompt(value: object, param: str) -> NoReturn:
    raise InvalidRequestError(
        f"{param} must be a text, a non-empty list of token ids, or a list of either, got "
        f"{abbreviate(value)}.",
        param=param,
    )
