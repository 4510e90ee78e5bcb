"""Conversations that are too long, without their first turns: a real input processor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sensorium.config import engine_config
from sensorium.engine.prompts.input_processor import InputProcessor
from sensorium.engine.prompts.types import ChatPrompt, PreparedPrompt
from sensorium.engine.stats import EngineFacts
from sensorium.errors import PromptTooLongError
from sensorium.text.chat.chat_template import parse_messages
from tests import checkpoints


@pytest.fixture(scope="module")
def demo() -> Iterator[InputProcessor]:
    found = InputProcessor(engine_config(model="demo", mm_processor_cache_gb=0))
    yield found
    found.close()


def picture(shade: int, edge: int = 56) -> Image.Image:
    return Image.fromarray(np.full((edge, edge, 3), shade, np.uint8))


def conversation(turns: Sequence[Any], *, system: str = "Be brief.") -> ChatPrompt:
    """Turns of a user, each answered but for the last; ``drops_turns``."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}]
    for turn in turns:
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": "Yes."}]
    return ChatPrompt(conversation=parse_messages(messages[:-1]), drops_turns=True)


def turn(index: int, *, pictures: int = 0) -> list[dict[str, Any]]:
    shown = [{"type": "image_pil", "image_pil": picture(10 * index + i)} for i in range(pictures)]
    return [*shown, {"type": "text", "text": f"turn {index} " + "word " * 20}]


async def prepared(
    found: InputProcessor, prompt: ChatPrompt, most: int = 1 << 16
) -> PreparedPrompt:
    found.set_facts(EngineFacts(most, 100, 16, 2048, "cpu", "float32", 1, 0.0))
    return await found.prepare(prompt)


@pytest.mark.parametrize("pictures", [0, 1])
async def test_the_fewest_first_turns_are_left_out(demo: InputProcessor, pictures: int) -> None:
    turns = [turn(i, pictures=pictures) for i in range(8)]
    sizes = [
        len((await prepared(demo, conversation(turns[first:]))).token_ids) for first in range(8)
    ]
    for first, size in enumerate(sizes):
        found = await prepared(demo, conversation(turns), size + 1)  # one is left to generate
        assert len(found.token_ids) == size
        assert found.text is not None
        assert "Be brief." in found.text
        assert [i for i in range(8) if f"turn {i} " in found.text] == list(range(first, 8))
        assert len(found.items) == pictures * (8 - first)
    with pytest.raises(PromptTooLongError):
        await prepared(demo, conversation(turns), sizes[-1])


async def test_media_are_decoded_and_preprocessed_once(demo: InputProcessor) -> None:
    """Also without a cache, and not at all where the text alone is too long."""
    turns = [turn(i, pictures=1) for i in range(8)]
    whole = await prepared(demo, conversation(turns))
    part = await prepared(demo, conversation(turns[3:]))
    before = demo.media_stats()
    found = await prepared(demo, conversation(turns), len(part.token_ids) + 1)
    assert [item.digest for item in found.items] == [item.digest for item in whole.items[3:]]
    after = demo.media_stats()
    for stage in ("decode_count", "preprocess_count"):
        assert 0 < after[stage] - before[stage] <= 8, stage
    long = [[*turn(0, pictures=1), {"type": "text", "text": "word " * 3000}], turn(1, pictures=1)]
    await prepared(demo, conversation(long), 1000)
    assert demo.media_stats()["preprocess_count"] - after["preprocess_count"] == 1


async def test_an_image_that_becomes_the_only_one_is_loaded_as_such(tmp_path: Path) -> None:
    """LLaVA-OneVision cuts a single image into tiles, and squeezes one of several."""
    folder = checkpoints.make_llava_onevision(tmp_path)
    found = InputProcessor(engine_config(model=str(folder)))
    try:
        turns = [turn(i, pictures=1) for i in range(2)]
        alone = await prepared(found, conversation(turns[1:], system=""))
        shorter = await prepared(found, conversation(turns, system=""), len(alone.token_ids) + 1)
        assert shorter.token_ids == alone.token_ids
        assert [item.digest for item in shorter.items] == [item.digest for item in alone.items]
    finally:
        found.close()
