"""Early checks of the length of prompts, and truncation, before much work is done for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from sensorium.engine.prompts.types import ChatPrompt, Prompt, Truncation
from sensorium.errors import InvalidRequestError, PromptTooLongError
from sensorium.text.chat.conversation import texts_of

PROBED_CHARS = 16
"""Characters per token of the context that are tokenized first of a much longer text."""

LONG_TEXT = 4096
"""Characters from which on a prompt is tokenized in a thread rather than on the event loop."""

MESSAGE_CHARS = 64
"""Characters that each message counts for besides its text, since templates loop over them."""


def is_long(prompt: Prompt) -> bool:
    """Return True if rendering and tokenizing a prompt would block an event loop."""
    if isinstance(prompt, ChatPrompt):
        if prompt.chat_template is not None:
            return True  # its cost is unknown
        num_chars = sum(map(len, texts_of(prompt.conversation)))
        num_chars += MESSAGE_CHARS * len(prompt.conversation.messages)
        return num_chars + _weight(prompt.tools, prompt.chat_template_kwargs) >= LONG_TEXT
    return len(prompt.text or prompt.token_ids or ()) >= LONG_TEXT


def _weight(*values: Any) -> int:
    """Count the characters of plain data, and 1 for each other value, up to ``LONG_TEXT``."""
    found, todo = 0, list(values)
    while todo and found < LONG_TEXT:
        value = todo.pop()
        found += len(value) if isinstance(value, str) else 1
        if isinstance(value, Mapping):
            todo += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            todo += value
    return found


def refuse_endless(text: str, most: int, count: Callable[[int], int], param: str) -> None:
    """Refuse a text whose beginning alone has more than ``most`` tokens.

    The rest is not tokenized: ten megabytes take half a minute. ``count`` returns the number of
    tokens of about so many first characters in this prompt; in a chat, control tokens that a user
    typed become several. Raises PromptTooLongError.
    """
    num_chars = PROBED_CHARS * most
    if len(text) < 2 * num_chars:
        return
    num_tokens = count(num_chars)
    # Cutting a text may change its last tokens.
    if num_tokens > most + most // 16 + PROBED_CHARS:
        raise PromptTooLongError.beyond(
            most,
            f"the prompt has {len(text)} characters, of which the first {num_chars} alone are "
            f"{num_tokens} tokens. Shorten it, or start with a larger max_model_len.",
            param=param,
        )


def truncate_text(
    text: str, most: int, encode: Callable[[str], Sequence[int]], *, left: bool
) -> str:
    """Return a part of ``text`` with all the tokens that truncation to ``most`` keeps.

    The rest of a long text is not tokenized. ``encode`` tokenizes without special tokens.
    """
    num_chars = PROBED_CHARS * most
    if len(text) < 2 * num_chars:
        return text
    part = text[-num_chars:] if left else text[:num_chars]
    # Cutting a text may change its last tokens.
    return part if len(encode(part)) > most + most // 16 + PROBED_CHARS else text


async def predicted_ids(
    text: str, most: int, vocab_size: int, encode: Callable[[str], Sequence[int]]
) -> tuple[int, ...]:
    """Return up to ``most`` first tokens of a text that the caller expects as the answer.

    Tokens from the first that the model lacks are left out. A long text is tokenized in a thread.
    """

    def tokenized() -> tuple[int, ...]:
        ids = encode(text[: PROBED_CHARS * most])[:most]
        return tuple(takewhile(lambda token_id: token_id < vocab_size, ids))

    return await asyncio.to_thread(tokenized) if len(text) >= LONG_TEXT else tokenized()


def truncate_ids(
    ids: Sequence[int],
    most: int,
    *,
    left: bool,
    prefix: Sequence[int] = (),
    suffix: Sequence[int] = (),
) -> tuple[int, ...]:
    """Return ``most`` of the ids, cut at the beginning (``left``) or at the end.

    ``prefix`` and ``suffix``, special tokens that the tokenizer added, are kept as far as they fit.
    """
    if len(ids) <= most:
        return tuple(ids)
    inner = ids[len(prefix) : len(ids) - len(suffix)]
    room = max(0, most - len(prefix) - len(suffix))
    kept = inner[len(inner) - room :] if left else inner[:room]
    return (*prefix, *kept, *suffix)[:most]


def kept_tokens(truncation: Truncation, context: int) -> int:
    """Return how many tokens a truncated prompt keeps.

    Raises InvalidRequestError for more than the ``context``.
    """
    most = truncation.most
    if most is not None and most > context:
        raise InvalidRequestError(
            f"truncate_prompt_tokens is {most}, but the model's maximum context length is "
            f"{context} tokens; give no more than that, or -1 for all of it.",
            param="truncate_prompt_tokens",
        )
    return context if most is None else most


def room(num_tokens: int, context: int, param: str, *, generates: bool) -> int:
    """Return how many tokens of the context are left after a prompt.

    A model that ``generates`` text needs one. Raises PromptTooLongError when there is no room.
    """
    left = context - num_tokens
    if left < generates:
        reserved = ", and one must be left to generate" if generates else ""
        raise PromptTooLongError.beyond(
            context,
            f"the prompt has {num_tokens} tokens{reserved}. Shorten it, or start with a larger "
            "max_model_len.",
            param=param,
        )
    return left


def refuse_many(num_samples: int, num_tokens: int, most: int) -> None:
    """Refuse more samples of a prompt than the engine can admit without delaying others.

    Each sample carries the whole prompt. Raises InvalidRequestError.
    """
    if num_samples > 1 and num_samples * num_tokens > most:
        raise InvalidRequestError(
            f"n is {num_samples} and the prompt has {num_tokens} tokens, "
            f"{num_samples * num_tokens} together; at most {most} are allowed: ask for fewer "
            "samples, in several requests.",
            param="n",
        )
