"""Prompts as callers give them (``RawPrompt``, ``ChatPrompt``) and as the engine takes them.

``InputProcessor`` renders a prompt to a ``RenderedPrompt``, of ``text.chat``, and expands that to a
``PreparedPrompt``, of which ``EngineRequest``s are made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from sensorium.config import suggestion
from sensorium.core.request import EngineRequest, ItemSpan
from sensorium.errors import InvalidRequestError
from sensorium.models.interface import TextShape
from sensorium.multimodal.items import MediaItem, MediaRef
from sensorium.multimodal.parse import messages as parts
from sensorium.text.chat.chat_template import parse_messages

if TYPE_CHECKING:
    from sensorium.text.chat.chat_template import Conversation


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaOptions:
    """Options for loading the items of a request, and the scope of what is cached of it.

    ``tenant`` and ``cache_salt`` scope uuids. The prefix cache is shared by all unless there is a
    salt; then it is scoped by both. ``adapter``: name of the LoRA adapter, which scopes it, too;
    empty for none.
    """

    mm_processor_kwargs: Mapping[str, Any] = field(default_factory=dict)
    media_io_kwargs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    cache_salt: str = ""
    tenant: str = ""
    adapter: str = ""


@dataclass(frozen=True, slots=True)
class Truncation:
    """Truncation of a prompt to ``most`` tokens (None: the context), at its end or its beginning.

    ``left`` cuts the beginning off.
    """

    most: int | None = None
    left: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RawPrompt:
    """A prompt that no template renders, with the model's own placeholders.

    Exactly one of ``text`` and ``token_ids`` is given. Without a ``truncation`` a prompt that is
    too long is refused. ``operation``: what traces call generating from it.
    """

    text: str | None = None
    token_ids: tuple[int, ...] | None = None
    refs: tuple[MediaRef, ...] = ()
    media: MediaOptions = field(default_factory=MediaOptions)
    add_special_tokens: bool = True
    param: str = "prompt"
    operation: ClassVar[str] = "text_completion"
    truncation: Truncation | None = None

    def __post_init__(self) -> None:
        if (self.text is None) == (self.token_ids is None):
            raise ValueError("a raw prompt has either text or token_ids")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A conversation for the model's chat template.

    ``chat_template_kwargs`` override the operator's ``default_template_kwargs``.
    ``add_special_tokens`` lets the tokenizer add its own around the template's text; None does as
    the model's processor does. ``drops_turns`` leaves out the fewest first turns where the
    conversation is too long.
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
    spelled_ids: frozenset[int] = frozenset()
    drops_turns: bool = False
    param: str = "messages"
    operation: ClassVar[str] = "chat"


Prompt = RawPrompt | ChatPrompt


class RopeFields(NamedTuple):
    """``rope_border`` and ``rope_length`` of an ``EngineRequest``."""

    border: int
    length: int


ONE_SET = RopeFields(0, 0)
"""Rotary length of models with one set of factors, and of requests within the short context."""


@dataclass(frozen=True, slots=True)
class RopeChoice:
    """Rotary factors of a model that has others beyond ``short_context`` tokens.

    With ``grows`` they change with each further token.
    """

    short_context: int
    grows: bool

    @classmethod
    def of(cls, shape: TextShape) -> RopeChoice | None:
        """Return the choice that a decoder has; None for one set of factors."""
        if shape.short_context is None:
            return None
        return cls(shape.short_context, shape.rope_grows)

    def fields(self, num_prompt: int, final_length: int, *, known: bool) -> RopeFields:
        """Return the choice for a prompt of ``num_prompt`` tokens that ends at ``final_length``.

        With ``known``, the request gives its length (``max_tokens``): one set serves from start to
        end. Otherwise ``final_length`` is only an upper bound: the sequence begins with the factors
        of short ones and is computed again with the others once it has outgrown them, as in the
        models' published code.
        """
        if final_length <= self.short_context:
            return ONE_SET
        begins_short = not known and num_prompt <= self.short_context
        # Longrope has one set for all long sequences: these share what is cached.
        length = final_length if self.grows else self.short_context + 1
        return RopeFields(self.short_context if begins_short else 0, length)


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A prompt with its media loaded and its placeholders expanded.

    Attributes:
        text: The prompt for people; None when it was given as ids.
        token_ids: All ids, placeholders expanded.
        items: The media items in the order of the prompt.
        spans: The positions of each item.
        positions: (3, num_tokens) int32 for models with several position axes, else None.
        position_delta: Added to the index of a generated token to get its position.
        num_item_tokens: Tokens that items fill, by modality.
        cache_salt: Scope of the prefix cache.
        adapter: Digest of the adapter; empty for none.
        bidirectional_spans: As in ``EngineRequest``.
        continues: The answer's text goes on where the prompt's ends.
        param: Place of the prompt in the caller's request, for errors.
        rope: Rotary factors that depend on the length; None for one set.
        spelled_ids: Special tokens that the text of the answer shows.
    """

    text: str | None
    token_ids: tuple[int, ...]
    items: tuple[MediaItem, ...] = ()
    spans: tuple[ItemSpan, ...] = ()
    positions: np.ndarray | None = None
    position_delta: int = 0
    num_item_tokens: dict[str, int] = field(default_factory=dict)
    cache_salt: bytes = b""
    adapter: bytes = b""
    bidirectional_spans: tuple[tuple[int, int], ...] = ()
    continues: bool = False
    param: str = "prompt"
    rope: RopeChoice | None = None
    spelled_ids: frozenset[int] = frozenset()

    def request(self, max_tokens: int, *, known_length: bool, **fields: Any) -> EngineRequest:
        """Return a request of this prompt to the engine.

        ``known_length``: the caller gave ``max_tokens``; ``fields`` are those of ``EngineRequest``
        that the prompt does not know.
        """
        num_tokens, rope = len(self.token_ids), ONE_SET
        if self.rope is not None:
            rope = self.rope.fields(num_tokens, num_tokens + max_tokens, known=known_length)
        return EngineRequest(
            token_ids=self.token_ids,
            max_tokens=max_tokens,
            items=self.spans,
            positions=self.positions,
            position_delta=self.position_delta,
            cache_salt=self.cache_salt,
            adapter=self.adapter,
            bidirectional_spans=self.bidirectional_spans,
            rope_border=rope.border,
            rope_length=rope.length,
            **fields,
        )


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
    """Parse a prompt of the offline API: text, token ids, or a dict of ``_PROMPT_KEYS``.

    Raises RequestError for anything else, naming the place.
    """
    if isinstance(value, str):
        return RawPrompt(text=value, param=param)
    if isinstance(value, list | tuple):
        return RawPrompt(token_ids=_token_ids(value, param), param=param)
    if not isinstance(value, Mapping):
        raise InvalidRequestError(
            "A prompt must be a string, a list of token ids or a dict, got "
            f"{type(value).__name__}.",
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
    """Parse a conversation of the offline API's ``chat``.

    Raises RequestError, naming the place.
    """
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
    """Parse an input of ``embed``: a prompt, or a conversation as a dict with ``messages``.

    Raises RequestError, naming the place.
    """
    if isinstance(value, Mapping) and "messages" in value:
        return parse_conversation(value)
    return parse_prompt(value, enable_mm_embeds=enable_mm_embeds)


def parse_conversation(value: Mapping[str, Any], param: str = "prompt") -> ChatPrompt:
    """Parse a conversation to be embedded: a dict of ``_CONVERSATION_KEYS``.

    Raises RequestError, naming the place.
    """
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
            "cache_salt contains a lone surrogate, which is not valid Unicode.", param=param
        ) from None
    return value


def salt_of(prompt: Prompt) -> bytes:
    """Return the scope of the prefix cache: the caller's salt and, only with it, the tenant."""
    if not prompt.media.cache_salt:
        return b""
    text = f"{prompt.media.tenant}\0{prompt.media.cache_salt}"
    return hashlib.sha256(text.encode()).digest()
