"""State of a JSON text, for what a grammar allows in excess.

A weak model writes digits and texts without end.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

MAX_NUMBER_CHARS = 24
"""Length of the longest float64, -1.7976931348623157e+308; integers of 64 bits are shorter."""

_NUMBER_CHARS = frozenset(b"0123456789+-.eE")
_QUOTE, _BACKSLASH = b'"\\'

Words = npt.NDArray[np.int32]


class JsonTokens:
    """Bytes of the tokens of a vocabulary: ``spelled`` gives those of each."""

    def __init__(self, spelled: Callable[[int], bytes], vocab_size: int) -> None:
        self.spelled = spelled
        goes_on = np.zeros((vocab_size + 31) // 32 * 32, np.uint8)
        self.signs: dict[bytes, int] = {}
        for token_id in range(vocab_size):
            text = spelled(token_id)
            goes_on[token_id] = bool(text) and text[0] in _NUMBER_CHARS
            if text in (b'"', b"]", b"}", b","):
                self.signs.setdefault(text, token_id)
        self.beside_numbers: Words = ~np.packbits(goes_on, bitorder="little").view(np.int32)


class JsonText:
    """The end of a JSON text that grows.

    Whether it is within a string or a number, and how long that is.
    """

    def __init__(self, tokens: JsonTokens) -> None:
        self._tokens = tokens
        self._num_chars = 0
        self._in_string = self._escaped = False

    def fresh(self) -> JsonText:
        """A text that begins."""
        return JsonText(self._tokens)

    def follow(self, token_id: int) -> None:
        """Go on by one token."""
        for char in self._tokens.spelled(token_id):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == _BACKSLASH:
                    self._escaped = True
                elif char == _QUOTE:
                    self._in_string = False
            elif char in _NUMBER_CHARS:
                self._num_chars += 1
            else:
                self._in_string = char == _QUOTE
                self._num_chars = 0

    def end_number(self, words: Words) -> None:
        """Remove from a mask what continues a number of ``MAX_NUMBER_CHARS``.

        Unless nothing else is in the mask.
        """
        if self._num_chars < MAX_NUMBER_CHARS:
            return
        rest = words & self._tokens.beside_numbers[: len(words)]
        if rest.any():
            words[:] = rest

    def closing_token(self, words: Words) -> int | None:
        """The token, among those of a mask, that ends what is open.

        A string, a list, an object, or a number.
        """
        signs = [b"]", b"}", b","] if self._num_chars else [b"]", b"}"]
        if self._in_string:
            signs = [] if self._escaped else [b'"']
        for sign in signs:
            token_id = self._tokens.signs.get(sign)
            if token_id is not None and words[token_id // 32] >> (token_id % 32) & 1:
                return token_id
        return None
