"""Conversations without their first turns, where the whole is too long."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from sensorium.engine.prompts.types import ChatPrompt
from sensorium.errors import PromptTooLongError
from sensorium.multimodal.items import MediaItem, MediaRef, Modality
from sensorium.multimodal.processor import Processor
from sensorium.text.chat.chat_template import RenderedPrompt
from sensorium.text.chat.conversation import Conversation

T = TypeVar("T")

_INSTRUCTIONS = ("system", "developer")


async def without_first_turns(
    prompt: ChatPrompt,
    render: Callable[[ChatPrompt], Awaitable[RenderedPrompt]],
    complete: Callable[[ChatPrompt, RenderedPrompt], Awaitable[T]],
) -> T:
    """Return what ``complete`` makes of the prompt without the fewest first turns.

    Instructions at the beginning stay, and a turn begins with a message of the user. Forms whose
    text alone is too long are found by rendering, so that their media are not loaded. Raises
    PromptTooLongError when the last turn alone is too long.
    """
    starts = [0, *_starts(prompt.conversation)]

    async def rendered(index: int) -> RenderedPrompt:
        return await render(_beginning_at(prompt, starts[index]))

    async def completed(index: int) -> T:
        form = _beginning_at(prompt, starts[index])
        return await complete(form, first if index == lowest else await render(form))

    lowest, first = await _smallest(0, len(starts), rendered)
    return (await _smallest(lowest, len(starts), completed))[1]


async def _smallest(low: int, high: int, attempt: Callable[[int], Awaitable[T]]) -> tuple[int, T]:
    """Return the smallest index for which nothing is too long, and its result; tries ``low`` first.

    Raises the PromptTooLongError of the largest index when there is none.
    """
    found: list[T] = []
    index = low
    while True:
        try:
            found = [await attempt(index)]
        except PromptTooLongError:
            low = index + 1
            if low == high and not found:
                raise
        else:
            high = index
        if low == high:
            return high, found[0]
        index = (low + high) // 2


def _num_instructions(conversation: Conversation) -> int:
    roles = [message.role for message in conversation.messages]
    return next((i for i, role in enumerate(roles) if role not in _INSTRUCTIONS), len(roles))


def _starts(conversation: Conversation) -> list[int]:
    """Return the indices of messages with which a shorter conversation may begin."""
    start = _num_instructions(conversation) + 1
    messages = conversation.messages
    return [i for i in range(start, len(messages)) if messages[i].role == "user"]


def _beginning_at(prompt: ChatPrompt, start: int) -> ChatPrompt:
    if start == 0:
        return prompt
    messages = prompt.conversation.messages
    kept = (*messages[: _num_instructions(prompt.conversation)], *messages[start:])
    return dataclasses.replace(prompt, conversation=Conversation(kept))


class KeptItems:
    """Items that were loaded for one form of a conversation, for its shorter forms."""

    def __init__(self, processor: Processor | None) -> None:
        self._processor = processor
        self._items: dict[tuple[int, bytes], MediaItem] = {}

    def add(self, refs: Sequence[MediaRef], items: Sequence[MediaItem]) -> None:
        """Keep the items of a form; each part of a message is one item."""
        self._items.update(zip(self._keys(refs), items, strict=True))

    def find(self, refs: Sequence[MediaRef]) -> list[MediaItem] | None:
        """Return the items of another form; None when one was not loaded as that form needs it.

        Some models make other features of an image that is the prompt's only one.
        """
        found = [self._items.get(key) for key in self._keys(refs)]
        return None if None in found else [item for item in found if item is not None]

    def _keys(self, refs: Sequence[MediaRef]) -> list[tuple[int, bytes]]:
        assert self._processor is not None
        counts = Counter[Modality](ref.modality for ref in refs)
        kinds = {m: self._processor.identity(m, {}, number) for m, number in counts.items()}
        return [(id(ref), kinds[ref.modality]) for ref in refs]
