"""Calls of the ``tokenizers`` library."""

from __future__ import annotations

import tokenizers

LONG_TEXT = 4096
"""Characters that take about a millisecond to encode."""


def ids_of(backend: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """Token ids of ``text``. Long ones are encoded while other threads work.

    Raises TypeError when the text is not valid Unicode.
    """
    if len(text) < LONG_TEXT:
        return list(backend.encode(text, add_special_tokens=add_special_tokens).ids)
    # Only for batches does the library give up the interpreter's lock.
    return list(backend.encode_batch([text], add_special_tokens=add_special_tokens)[0].ids)
