"""Expansion of a rendered prompt's placeholders: final ids, positions, spans, cache scope."""

from __future__ import annotations

import contextlib
import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from sensorium.core.request import ItemSpan
from sensorium.engine.prompts.types import (
    ChatPrompt,
    PreparedPrompt,
    Prompt,
    RawPrompt,
    RopeChoice,
    salt_of,
)
from sensorium.errors import PlaceholderMismatchError
from sensorium.multimodal.items import MediaItem
from sensorium.multimodal.placeholders import expand, in_order
from sensorium.multimodal.processor import Processor
from sensorium.text.chat.chat_template import RenderedPrompt


@dataclass(frozen=True, slots=True)
class Traits:
    """Properties of a model that its prompts are expanded by.

    ``bidirectional``: as in ``Family``.
    """

    processor: Processor | None
    bidirectional: Literal["items", "prompt"] | None
    rope: RopeChoice | None


def expanded(
    prompt: Prompt,
    rendered: RenderedPrompt,
    items: list[MediaItem],
    model: Traits,
    check_room: Callable[[int, str], object],
) -> PreparedPrompt:
    """Put the items of a prompt into their places.

    ``check_room`` is called with numbers of tokens that the context must hold, and the place of the
    prompt. Raises RequestError, also what ``check_room`` raises.
    """
    salt, continues = salt_of(prompt), isinstance(prompt, RawPrompt)
    spelled_ids = frozenset[int]() if isinstance(prompt, RawPrompt) else prompt.spelled_ids
    processor = model.processor
    if processor is None:
        return PreparedPrompt(
            rendered.text,
            rendered.token_ids,
            cache_salt=salt,
            continues=continues,
            param=prompt.param,
            rope=model.rope,
            spelled_ids=spelled_ids,
        )
    if any(placeholder.number is not None for placeholder in rendered.numbered):
        items = in_order(items, rendered.numbered, processor)
        # One item may stand in many places: what is too long by far is refused before it is made.
        check_room(sum(item.features.num_embeds for item in items), prompt.param)
    expansion = expand(rendered.token_ids, items, processor)
    check_room(len(expansion.token_ids), prompt.param)
    placed = expansion.items
    spans = tuple(ItemSpan(p.item.digest, p.item.modality, p.runs) for p in placed)
    bidirectional, salt = bidirectional_spans(model.bidirectional, expansion.token_ids, spans, salt)
    found = processor.positions(expansion.token_ids, placed) if placed else None
    positions, delta = (None, 0) if found is None else found
    return PreparedPrompt(
        text=rendered.text,
        token_ids=expansion.token_ids,
        items=tuple(p.item for p in placed),
        spans=spans,
        positions=positions,
        position_delta=delta,
        num_item_tokens=expansion.num_item_tokens,
        cache_salt=salt,
        bidirectional_spans=bidirectional,
        continues=continues,
        param=prompt.param,
        rope=model.rope,
        spelled_ids=spelled_ids,
    )


def bidirectional_spans(
    kind: Literal["items", "prompt"] | None,
    token_ids: Sequence[int],
    spans: Sequence[ItemSpan],
    salt: bytes,
) -> tuple[tuple[tuple[int, int], ...], bytes]:
    """Return the ``bidirectional_spans`` of an ``EngineRequest``, and its ``cache_salt``.

    Keys and values of an item's run depend on the whole item, whose digest is in the digest of each
    block with a part of it. With bidirectional attention over the whole prompt they depend on its
    last token: all of the prompt goes into the salt, so that only equal prompts share their cache.
    """
    if kind is None or not spans:
        return (), salt
    if kind == "items":
        runs = (run for span in spans for run in span.runs)
        return tuple((start, start + length) for start, length in runs), salt
    parts = (salt, array("q", token_ids).tobytes(), *(span.digest for span in spans))
    return ((0, len(token_ids)),), hashlib.sha256(b"".join(parts)).digest()


@contextlib.contextmanager
def advised(prompt: Prompt) -> Iterator[None]:
    """Add advice to errors about placeholders that a chat template wrote."""
    try:
        yield
    except PlaceholderMismatchError as error:
        if not isinstance(prompt, ChatPrompt):
            raise
        raise PlaceholderMismatchError(
            error.found,
            "In a chat the template writes them, and this one does not write the model's own for "
            "each item: give another one (--chat-template FILE_OR_TEXT; in Python "
            "chat_template=…).",
        ) from error
