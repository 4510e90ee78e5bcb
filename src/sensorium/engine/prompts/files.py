"""Files in a conversation: they become media items and texts before the template renders it."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sensorium.engine.prompts.types import ChatPrompt, Prompt
from sensorium.errors import UnsupportedModalityError
from sensorium.multimodal.items import MediaRef
from sensorium.multimodal.pipeline import MediaPipeline
from sensorium.text.chat.conversation import Part, TextPart


def has_files(prompt: Prompt) -> bool:
    """Return true for a conversation with parts of the type ``file``."""
    return isinstance(prompt, ChatPrompt) and bool(prompt.conversation.files)


@asynccontextmanager
async def files_opened(prompt: Prompt, pipeline: MediaPipeline | None) -> AsyncIterator[Prompt]:
    """Give the prompt with the media and texts of its files in their places.

    Their bytes count against those of all downloads until the block ends. Raises RequestError,
    OverloadedError and UnavailableError.
    """
    if not isinstance(prompt, ChatPrompt) or not prompt.conversation.files:
        yield prompt
        return
    files = prompt.conversation.files
    if pipeline is None:
        raise UnsupportedModalityError(
            "This model takes text only; it cannot take files.", param=files[0].param or None
        )
    async with pipeline.files.opened(files) as opened:
        parts = [[_part(found) for found in media] for media in opened]
        yield dataclasses.replace(prompt, conversation=prompt.conversation.with_files(parts))


def _part(found: MediaRef | str) -> Part:
    return TextPart(found) if isinstance(found, str) else found
