"""Types of prompts, for annotations, under the names that users of vLLM know.

Prompts are plain strings, lists and dictionaries: nothing of this module is needed to make one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypeAlias, TypedDict

from sensorium.multimodal.inputs import MultiModalDataDict, MultiModalUUIDDict


class _Options(TypedDict):
    multi_modal_data: NotRequired[MultiModalDataDict | None]
    multi_modal_uuids: NotRequired[MultiModalUUIDDict | None]
    mm_processor_kwargs: NotRequired[Mapping[str, Any] | None]
    cache_salt: NotRequired[str]


class TextPrompt(_Options):
    """A prompt as text, with its media.

    Attributes:
        prompt: The text, with one placeholder of the model for each item.
        multi_modal_data: Items by modality, "image", "video" or "audio": one or a list of them.
        multi_modal_uuids: Your own ids for these items, or None for each that has none.
        mm_processor_kwargs: Options of the model's processor.
        cache_salt: Separates the prompt's cache entries from those of other salts.
    """

    prompt: str


class TokensPrompt(_Options):
    """A prompt as token ids, with its media.

    Attributes:
        prompt_token_ids: The ids, with one placeholder of the model for each item.
        multi_modal_data: Items by modality, "image", "video" or "audio": one or a list of them.
        multi_modal_uuids: Your own ids for these items, or None for each that has none.
        mm_processor_kwargs: Options of the model's processor.
        cache_salt: Separates the prompt's cache entries from those of other salts.
    """

    prompt_token_ids: list[int]


TextTokensPrompt: TypeAlias = TokensPrompt
PromptType: TypeAlias = str | list[int] | TextPrompt | TokensPrompt
PromptInputs: TypeAlias = PromptType
PromptStrictInputs: TypeAlias = str | TextPrompt | TokensPrompt

__all__ = [
    "MultiModalDataDict",
    "MultiModalUUIDDict",
    "PromptInputs",
    "PromptStrictInputs",
    "PromptType",
    "TextPrompt",
    "TextTokensPrompt",
    "TokensPrompt",
]
