"""``truncation: auto``: the beginning of a conversation that is too long is left out."""

from __future__ import annotations

import dataclasses

from sensorium.engine.prompts.types import ChatPrompt
from sensorium.errors import PromptTooLongError
from sensorium.server.context import ModelContext
from sensorium.text.chat.conversation import Conversation

_INSTRUCTIONS = ("system", "developer")


async def truncated(context: ModelContext, prompt: ChatPrompt) -> ChatPrompt:
    """Return the prompt without the fewest first turns that it is too long with.

    Instructions at the beginning stay, and a turn begins with a message of the user. Raises
    PromptTooLongError when the last turn alone is too long.
    """
    with context.admission.enter(1):
        error = await _refusal(context, prompt)
        if error is None:
            return prompt
        cuts = _cuts(prompt.conversation)
        low, high, best = 0, len(cuts), None
        while low < high:
            middle = (low + high) // 2
            shorter = _without(prompt, cuts[middle])
            found = await _refusal(context, shorter)
            if found is None:
                high, best = middle, shorter
            else:
                low, error = middle + 1, found
        if best is None:
            raise error
        return best


async def _refusal(context: ModelContext, prompt: ChatPrompt) -> PromptTooLongError | None:
    """Return the error of a prompt that is too long; None for one that fits."""
    try:
        await context.frontend.input_processor.prepare(prompt)
    except PromptTooLongError as error:
        return error
    return None


def _num_instructions(conversation: Conversation) -> int:
    roles = [message.role for message in conversation.messages]
    return next((i for i, role in enumerate(roles) if role not in _INSTRUCTIONS), len(roles))


def _cuts(conversation: Conversation) -> list[int]:
    """Return the indices of messages with which a shorter conversation may begin."""
    start = _num_instructions(conversation) + 1
    messages = conversation.messages
    return [i for i in range(start, len(messages)) if messages[i].role == "user"]


def _without(prompt: ChatPrompt, cut: int) -> ChatPrompt:
    messages = prompt.conversation.messages
    kept = (*messages[: _num_instructions(prompt.conversation)], *messages[cut:])
    return dataclasses.replace(prompt, conversation=Conversation(kept))
