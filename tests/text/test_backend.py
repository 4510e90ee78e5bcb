"""Encoding by the library: long texts give what short ones would, and leave other threads room."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers

import sensorium
from sensorium.text.backend import LONG_TEXT, ids_of

BACKEND = tokenizers.Tokenizer.from_file(
    str(Path(sensorium.__file__).parent / "demo" / "tokenizer.json")
)
SENTENCE = "What is shown in the picture? <|im_end|> Zwölf Boxkämpfer, 日本語 🙂\n"


@pytest.mark.parametrize("length", [0, 1, LONG_TEXT - 1, LONG_TEXT, 3 * LONG_TEXT])
@pytest.mark.parametrize("adds", [False, True])
def test_ids_equal_those_of_the_library(length: int, adds: bool) -> None:
    text = (SENTENCE * (length // len(SENTENCE) + 1))[:length]
    assert ids_of(BACKEND, text, add_special_tokens=adds) == list(
        BACKEND.encode(text, add_special_tokens=adds).ids
    )


class OneAtATime:
    """A backend whose ``encode``, which keeps the interpreter's lock, must not be called."""

    def encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[tokenizers.Encoding]:
        """As the library's, which gives the lock up."""
        return BACKEND.encode_batch(texts, add_special_tokens=add_special_tokens)


def test_long_texts_are_encoded_as_batches() -> None:
    text = "a " * LONG_TEXT
    ids = ids_of(OneAtATime(), text, add_special_tokens=False)  # type: ignore[arg-type]
    assert ids == BACKEND.encode(text, add_special_tokens=False).ids
    with pytest.raises(AttributeError):
        ids_of(OneAtATime(), "a", add_special_tokens=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["\ud800", "a" * LONG_TEXT + "\ud800"])
def test_what_is_no_unicode(text: str) -> None:
    with pytest.raises(TypeError):
        ids_of(BACKEND, text, add_special_tokens=False)
