"""What users ask, before it becomes an ``EngineRequest``: a raw prompt or a conversation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sensorium.config import suggestion
from sensorium.errors import InvalidRequestError
from sensorium.multimodal.items import MediaRef
from sensorium.multimodal.parse import messages as parts
from sensorium.text.chat.chat_template import parse_messages

if TYPE_CHECKING:
    from sensorium.text.chat.chat_template import Conversation


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaOptions:
    """How the items of a request are loaded, and whose they are.

    ``tenant`` and ``cache_salt`` scope uuids; the prefix cache is scoped by both where there is a salt, else shared.
    """

    mm_processor_kwargs: Mapping[str, Any] = field(default_factory=dict)
    media_io_kwargs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    cache_salt: str = ""
    tenant: str = ""


@dataclass(frozen=True, slots=True)
class Truncation:
    """Cut a prompt to ``most`` tokens (None: to the context), from its end, or from its beginning (``left``)."""

    most: int | None = None
    left: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RawPrompt:
    """A prompt as it stands, with the model's own placeholders: ``text`` or ``token_ids``, exactly one of them.

    ``truncation``: how it is cut when it is too long; None refuses it then.
    """

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    refs: tuple[MediaRef, ...] = ()
    media: MediaOptions = field(default_factory=MediaOptions)
    add_special_tokens: bool = True
    param: str = "prompt"
    truncation: Truncation | None = None

    def __post_init__(self) -> None:
        if (self.text is None) == (self.token_ids is None):
            raise ValueError("a raw prompt has either text or token_ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A conversation to be rendered by the model's chat template.

    ``default_template_kwargs``: the operator's variables of the template, under those of the request.
    ``add_special_tokens``: whether the tokenizer puts its own around what the template wrote; None does as the model's
    processor does.
    """

    conversation: Conversation
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: tuple[Mapping[str, Any], ...] | None = None
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    default_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    add_special_tokens: bool | None = None
    media: MediaOptions = field(default_factory=MediaOptions)


Prompt = RawPrompt | ChatPrompt

_PROMPT_KEYS = (
    "prompt",
    "prompt_token_ids",
    "multi_modal_data",
    "multi_modal_uuids",
    "mm_processor_kwargs",
    "cache_salt",
)


_CONVERSATION_KEYS = (
    "messages",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
    "add_special_tokens",
    "mm_processor_kwargs",
    "cache_salt",
)


def parse_prompt(value: object, *, enable_mm_embeds: bool, param: str = "prompt") -> RawPrompt:
    """A prompt as the offline API takes it: text, a list of token ids, or a dict of ``_PROMPT_KEYS``.

    Raises RequestError for anything else, naming the place.
    """
    if isinstance(value, str):
        return RawPrompt(text=value, param=param)
    if isinstance(value, list | tuple):
        return RawPrompt(token_ids=_token_ids(value, param), param=param)
    if not isinstance(value, Mapping):
        raise InvalidRequestError(
            f"A prompt must be a string, a list of token ids or a dict, got {type(value).__name__}.",
            param=param,
        )
    for key in value:
        if key not in _PROMPT_KEYS:
            raise InvalidRequestError(
                f"Unknown key {key!r} in a prompt.{suggestion(str(key), list(_PROMPT_KEYS))}",
                param=param,
            )
    text, ids = value.get("prompt"), value.get("prompt_token_ids")
    if (text is None) == (ids is None):
        raise InvalidRequestError(
            "A prompt dict needs either 'prompt' or 'prompt_token_ids'.", param=param
        )
    if text is not None and not isinstance(text, str):
        raise InvalidRequestError(f"'prompt' must be a string, got {text!r:.80}.", param=param)
    data, uuids = value.get("multi_modal_data"), value.get("multi_modal_uuids")
    refs = parts.refs_from_data(
        {} if data is None else data,
        uuids,
        enable_mm_embeds=enable_mm_embeds,
        param=f"{param}.multi_modal_data",
        uuids_param=f"{param}.multi_modal_uuids",
    )
    return RawPrompt(
        text=text,
        token_ids=None if ids is None else _token_ids(ids, f"{param}.prompt_token_ids"),
        refs=tuple(refs),
        media=MediaOptions(
            mm_processor_kwargs=_mapping(value, "mm_processor_kwargs", param),
            cache_salt=_salt(value.get("cache_salt"), param),
        ),
        param=param,
    )


def chat_prompt(
    messages: Any,
    *,
    chat_template: str | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    mm_processor_kwargs: Mapping[str, Any] | None = None,
) -> ChatPrompt:
    """A conversation to be answered, as ``chat`` of the offline API takes it. Raises RequestError, naming the place."""
    return ChatPrompt(
        conversation=parse_messages(messages),
        chat_template=chat_template,
        add_generation_prompt=add_generation_prompt and not continue_final_message,
        continue_final_message=continue_final_message,
        tools=tuple(tools) if tools else None,
        chat_template_kwargs=chat_template_kwargs or {},
        media=MediaOptions(mm_processor_kwargs=mm_processor_kwargs or {}),
    )


def parse_input(value: object, *, enable_mm_embeds: bool) -> Prompt:
    """What a vector is made of: a prompt, or a conversation (a dict with ``messages``). Raises RequestError."""
    if isinstance(value, Mapping) and "messages" in value:
        return parse_conversation(value)
    return parse_prompt(value, enable_mm_embeds=enable_mm_embeds)


def parse_conversation(value: Mapping[str, Any], param: str = "prompt") -> ChatPrompt:
    """A conversation to be embedded: a dict of ``_CONVERSATION_KEYS``. Raises RequestError, naming the place."""
    for key in value:
        if key not in _CONVERSATION_KEYS:
            near = suggestion(str(key), list(_CONVERSATION_KEYS))
            raise InvalidRequestError(f"Unknown key {key!r} beside 'messages'.{near}", param=param)
    given = {k: v for k, v in value.items() if v is not None}
    for key in ("add_generation_prompt", "continue_final_message", "add_special_tokens"):
        if not isinstance(given.get(key, False), bool):
            raise InvalidRequestError(
                f"{key} must be true or false, got {given[key]!r}.", param=param
            )
    return ChatPrompt(
        conversation=parse_messages(value["messages"]),
        add_generation_prompt=given.get("add_generation_prompt", False),
        continue_final_message=given.get("continue_final_message", False),
        chat_template=given.get("chat_template"),
        chat_template_kwargs=_mapping(given, "chat_template_kwargs", param),
        add_special_tokens=given.get("add_special_tokens"),
        media=MediaOptions(
            mm_processor_kwargs=_mapping(given, "mm_processor_kwargs", param),
            cache_salt=_salt(given.get("cache_salt"), param),
        ),
    )


def _token_ids(value: object, param: str) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise InvalidRequestError("Token ids must be a non-empty list of integers.", param=param)
    for token_id in value:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise InvalidRequestError(
                f"Token ids must be integers from 0, got {token_id!r:.80}.", param=param
            )
    return tuple(value)


def _mapping(values: Mapping[str, Any], name: str, param: str) -> Mapping[str, Any]:
    value = values.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidRequestError(f"{name} must be a dict, got {value!r:.80}.", param=param)
    return value


def _salt(value: object, param: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str) or not value:
        raise InvalidRequestError(
            f"cache_salt must be a non-empty string, got {value!r:.80}.", param=param
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError(
            "cache_salt holds a lone surrogate, which is no valid Unicode.", param=param
        ) from None
    return value


def salt_of(prompt: Prompt) -> bytes:
    """What scopes the prefix cache: the caller's salt and, only together with it, the tenant."""
    if not prompt.media.cache_salt:
        return b""
    text = f"{prompt.media.tenant}\0{prompt.media.cache_salt}"
    return hashlib.sha256(text.encode()).digest()
