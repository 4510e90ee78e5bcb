"""Cutting prompts to a number of tokens."""

from __future__ import annotations

import pytest

from sensorium.engine.prompts.lengths import (
    LONG_TEXT,
    PROBED_CHARS,
    predicted_ids,
    truncate_ids,
    truncate_text,
)
from tests.server.fake_frontend import TOKENIZER

IDS = tuple(range(10))


@pytest.mark.parametrize(
    ("most", "left", "kept"),
    [
        (20, False, IDS),
        (10, True, IDS),
        (4, False, (0, 1, 2, 3)),
        (4, True, (6, 7, 8, 9)),
        (1, True, (9,)),
    ],
)
def test_ids_are_cut(most: int, left: bool, kept: tuple[int, ...]) -> None:
    assert truncate_ids(IDS, most, left=left) == kept


@pytest.mark.parametrize(
    ("most", "left", "kept"),
    [
        (5, False, (0, 1, 2, 3, 9)),
        (5, True, (0, 6, 7, 8, 9)),
        (2, False, (0, 9)),
        (1, True, (0,)),
    ],
)
def test_special_tokens_around_a_text_stay(most: int, left: bool, kept: tuple[int, ...]) -> None:
    assert truncate_ids(IDS, most, left=left, prefix=(0,), suffix=(9,)) == kept


@pytest.mark.parametrize("left", [False, True])
def test_the_rest_of_a_long_text_is_not_tokenized(left: bool) -> None:
    def encode(text: str) -> list[int]:
        return TOKENIZER.encode(text, add_special_tokens=False)

    words = " ".join(f"number {i} is a square," for i in range(2000))
    part = truncate_text(words, 20, encode, left=left)
    assert len(part) == 20 * PROBED_CHARS
    whole = truncate_ids(encode(words), 20, left=left)
    assert truncate_ids(encode(part), 20, left=left) == whole
    few_tokens = " " * len(words)
    assert truncate_text(few_tokens, 20, lambda text: [1], left=left) == few_tokens


async def test_an_expected_answer_has_tokens_of_the_model_only() -> None:
    assert await predicted_ids("abc{d", 100, 120, list_of_codes) == (97, 98, 99)
    assert await predicted_ids("abcd", 3, 120, list_of_codes) == (97, 98, 99)
    assert await predicted_ids("", 3, 120, list_of_codes) == ()


async def test_no_more_of_a_long_one_is_tokenized_than_can_be_used() -> None:
    sizes = []

    def encode(text: str) -> list[int]:
        sizes.append(len(text))
        return list_of_codes(text)

    assert await predicted_ids("a" * 10 * LONG_TEXT, 50, 120, encode) == (97,) * 50
    assert sizes == [50 * PROBED_CHARS]


def list_of_codes(text: str) -> list[int]:
    return [ord(character) for character in text]
