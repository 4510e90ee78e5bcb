"""From a rendered prompt and its loaded media to what the engine computes: placeholders expanded, positions, salts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sensorium.core.request import ItemSpan
from sensorium.engine.prompts.bidirectional import attending
from sensorium.engine.prompts.prepared import Draft, PreparedPrompt
from sensorium.engine.prompts.rope import RopeChoice
from sensorium.engine.prompts.types import RawPrompt, salt_of
from sensorium.multimodal.items import MediaItem
from sensorium.multimodal.placeholders import expand, in_order
from sensorium.multimodal.processor import Processor


@dataclass(frozen=True, slots=True)
class Traits:
    """What of a model decides how its prompts are expanded. ``both_ways``: as in ``Family``."""

    processor: Processor | None
    both_ways: Literal["items", "prompt"] | None
    rope: RopeChoice | None


def expanded(
    draft: Draft, items: list[MediaItem], model: Traits, check_room: Callable[[int, str], object]
) -> PreparedPrompt:
    """Put the items of a prompt into their places. Raises RequestError, also what ``check_room`` raises.

    check_room: is called with numbers of tokens that the context must hold, and the place of the prompt.
    """
    prompt, text, token_ids, _, param, numbered = draft
    salt, continues = salt_of(prompt), isinstance(prompt, RawPrompt)
    processor = model.processor
    if processor is None:
        return PreparedPrompt(
            text, token_ids, cache_salt=salt, continues=continues, param=param, rope=model.rope
        )
    if any(placeholder.number is not None for placeholder in numbered):
        items = in_order(items, numbered, processor)
        # One item may stand in many places: what is too long by far is refused before it is made.
        check_room(sum(item.features.num_embeds for item in items), param)
    expansion = expand(token_ids, items, processor)
    check_room(len(expansion.token_ids), param)
    placed = expansion.items
    spans = tuple(ItemSpan(p.item.digest, p.item.modality, p.runs) for p in placed)
    both_ways = attending(model.both_ways, expansion.token_ids, spans, salt)
    found = processor.positions(expansion.token_ids, placed) if placed else None
    positions, delta = (None, 0) if found is None else found
    return PreparedPrompt(
        text=text,
        token_ids=expansion.token_ids,
        items=tuple(p.item for p in placed),
        spans=spans,
        positions=positions,
        position_delta=delta,
        num_item_tokens=expansion.num_item_tokens,
        cache_salt=both_ways.salt,
        stretches=both_ways.stretches,
        continues=continues,
        param=param,
        rope=model.rope,
    )
