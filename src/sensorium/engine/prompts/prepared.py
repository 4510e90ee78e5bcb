"""A prompt on its way to the engine: in ids, then with its media."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from sensorium.core.request import ItemSpan
from sensorium.engine.prompts.rope import RopeChoice
from sensorium.engine.prompts.types import Prompt
from sensorium.multimodal.items import MediaItem, MediaRef
from sensorium.multimodal.placeholders import NumberedPlaceholder


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A prompt that the engine could run.

    ``text`` is what a person would read (None for prompts given as ids); ``token_ids`` have their placeholders
    expanded; ``items`` and ``spans`` belong together, in the order of the prompt. ``positions`` (3, num_tokens) int32
    for models with several position axes. ``continues``: the answer's text goes on where the prompt's ends. ``rope``:
    for models whose rotary factors depend on how long the whole gets.
    """

    text: str | None
    token_ids: tuple[int, ...]
    items: tuple[MediaItem, ...] = ()
    spans: tuple[ItemSpan, ...] = ()
    positions: np.ndarray | None = None
    position_delta: int = 0
    num_item_tokens: dict[str, int] = field(default_factory=dict)
    cache_salt: bytes = b""
    stretches: tuple[tuple[int, int], ...] = ()
    continues: bool = False
    param: str = "prompt"
    rope: RopeChoice | None = None


class Draft(NamedTuple):
    """A prompt in ids, its placeholders not expanded yet: what can be known of it without its media."""

    prompt: Prompt
    text: str | None
    token_ids: tuple[int, ...]
    refs: tuple[MediaRef, ...]
    param: str
    numbered: tuple[NumberedPlaceholder, ...] = ()
    """The placeholders found in a text where they are no single tokens, in order."""
