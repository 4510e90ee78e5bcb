"""Bad words as token ids."""

from __future__ import annotations

from collections.abc import Sequence

from sensorium.errors import InvalidRequestError
from sensorium.text.tokenizer import Tokenizer


def bad_words_token_ids(tokenizer: Tokenizer, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The id sequences that must not be generated: each word as at the beginning of a text, and as
    after a space.

    The second form counts where it is as long as the first and begins with another token; else it
    would forbid the bare space. Raises InvalidRequestError for a word that has no tokens."""
    sequences: dict[tuple[int, ...], None] = {}
    for i, word in enumerate(words):
        plain = tuple(tokenizer.encode(word.lstrip(), add_special_tokens=False))
        if not plain:
            raise InvalidRequestError(
                f"bad_words[{i}] is {word!r}, which has no tokens.", param=f"bad_words[{i}]"
            )
        sequences[plain] = None
        spaced = tuple(tokenizer.encode(" " + word.lstrip(), add_special_tokens=False))
        if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
            sequences[spaced] = None
    return tuple(sequences)
