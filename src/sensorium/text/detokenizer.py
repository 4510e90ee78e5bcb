"""Incremental detokenizing: token ids to text while they come, without broken characters.

Three ways, by the kind of the tokenizer's decoder. Byte-level and byte-fallback vocabularies are
streams of bytes: a UTF-8 decoder holds back what is incomplete. For all others a window of the last
tokens is decoded twice, with and without the new one, and the difference is emitted. Each costs
constant time per token.

What comes out joined equals ``Tokenizer.decode`` of all ids, with one exception: where
byte-fallback tokens do not form UTF-8, the library replaces every byte of the whole run, even of
characters that were complete, whereas here only the broken bytes become U+FFFD; text that was sent
cannot be taken back.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from sensorium.text.spelling import byte_level_bytes, byte_of
from sensorium.text.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_HELD_TOKENS = 8  # a character has at most four bytes: more held tokens will not become one


class Detokenizer:
    """Text of one generated sequence, as it grows.

    ``continues``: the sequence continues a prompt, so a leading space that the vocabulary writes
    at the beginning of a word is kept; otherwise it is dropped as ``decode`` drops it.
    ``spaces_between_special_tokens=False`` writes adjacent added tokens without the spaces that
    some decoders put between them. ``spelled_ids``: special tokens that are written all the same.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        continues: bool = False,
        spelled_ids: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._skips = skip_special_tokens
        self._spelled_ids = spelled_ids
        self._spaces = spaces_between_special_tokens
        self._stream = _stream(tokenizer, continues)
        self._last_was_added = False

    def append(self, token_ids: Sequence[int]) -> str:
        """Return the text that these tokens complete; ids outside the vocabulary add nothing."""
        return "".join([self._append(token_id) for token_id in token_ids])

    def flush(self) -> str:
        """Return what was held back, with broken characters replaced; call it once, at the end."""
        return self._stream.flush()

    def _append(self, token_id: int) -> str:
        tokenizer = self._tokenizer
        if not 0 <= token_id <= tokenizer.max_token_id:
            return ""
        is_hidden = tokenizer.is_special(token_id) and token_id not in self._spelled_ids
        if self._skips and is_hidden:
            return ""
        token = tokenizer.backend.id_to_token(token_id)
        if token is None:
            return ""
        is_added = tokenizer.is_added(token_id)
        text = self._stream.push(token_id, token)
        if is_added and self._last_was_added and not self._spaces:
            text = text.removeprefix(" ")
        self._last_was_added = is_added
        return text


class _Stream(Protocol):
    def push(self, token_id: int, token: str) -> str: ...
    def flush(self) -> str: ...


class _ByteLevel:
    """Stream of a byte-level vocabulary."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int, token: str) -> str:
        return self._decoder.decode(byte_level_bytes(token))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _ByteFallback:
    """Stream of a byte-fallback vocabulary."""

    def __init__(self, space: str, strip_first: bool) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._space = space
        self._strips = strip_first

    def push(self, token_id: int, token: str) -> str:
        byte = byte_of(token)
        if byte is not None:
            return self._stripped(self._decoder.decode(byte))
        return self._stripped(self.flush() + token.replace(self._space, " "))

    def flush(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return self._stripped(text)

    def _stripped(self, text: str) -> str:
        """Strip a leading space from the first text."""
        if not self._strips or not text:
            return text
        self._strips = False
        return text.removeprefix(" ")


class _Window:
    """Stream of any other vocabulary.

    The difference that a token makes to the decoded text of a few before it.
    """

    def __init__(self, tokenizer: Tokenizer, continues: bool) -> None:
        self._decode = tokenizer.backend.decode
        self._ids: list[int] = []
        self._num_emitted = 0  # leading ids whose text is out; they give the context
        self._continues = continues

    def push(self, token_id: int, token: str) -> str:
        self._ids.append(token_id)
        text = self._new_text()
        held = len(self._ids) - self._num_emitted
        if not text or (text.endswith(_REPLACEMENT) and held < _MAX_HELD_TOKENS):
            return ""
        self._ids = self._ids[self._num_emitted :]
        self._num_emitted = len(self._ids)
        return text

    def flush(self) -> str:
        text = self._new_text() if len(self._ids) > self._num_emitted else ""
        self._num_emitted = len(self._ids)
        return text

    def _new_text(self) -> str:
        old = self._decode(self._ids[: self._num_emitted], skip_special_tokens=False)
        new = self._decode(self._ids, skip_special_tokens=False)
        return new[len(old) :]


def _stream(tokenizer: Tokenizer, continues: bool) -> _Stream:
    spelling = tokenizer.spelling
    if spelling.kind == "byte_level":
        return _ByteLevel()
    if spelling.kind == "byte_fallback":
        return _ByteFallback(spelling.space, spelling.strips_first and not continues)
    return _Window(tokenizer, continues)


class TokenSpelling:
    """Text and bytes of single tokens, each computed once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, bytes] = {}

    def to_bytes(self, token_id: int) -> bytes:
        """Return the bytes that the token stands for, which may be part of a character."""
        found = self._known.get(token_id)
        if found is None:
            found = self._known[token_id] = self._tokenizer.token_bytes(token_id)
        return found

    def text(self, token_id: int) -> str:
        """Return the token's text, with U+FFFD for incomplete characters."""
        return self.to_bytes(token_id).decode("utf-8", "replace")
