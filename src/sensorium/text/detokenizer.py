"""Token ids to text while they come, without broken characters.

Three ways, by what the tokenizer's decoder is. Byte-level vocabularies (GPT-2, Qwen, Llama 3) and
byte-fallback ones (Llama 2, Mistral, Phi-3) are streams of bytes: a UTF-8 decoder holds back what
is incomplete. Anything else decodes a window of the last tokens twice, with and without the new
one, and emits the difference. Each costs constant time per token.

What comes out joined equals ``Tokenizer.decode`` of all ids, with one exception: where
byte-fallback tokens do not form UTF-8, the library replaces every byte of the whole run, even of
characters that were complete, whereas here only the broken bytes become U+FFFD; text that was sent
cannot be taken back."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Sequence
from typing import Any, Protocol

from sensorium.text.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\ufffd"
_MAX_HELD_TOKENS = 8  # a character has at most four bytes: more held tokens will not become one


class Detokenizer:
    """The text of one generated sequence, growing.

    ``continues``: the sequence continues a prompt, so a leading space that the vocabulary writes
    at the beginning of a word is kept; otherwise it is dropped as ``decode`` drops it.
    ``spaces_between_special_tokens=False`` writes adjacent added tokens without the spaces that
    some decoders put between them."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        continues: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._skips = skip_special_tokens
        self._spaces = spaces_between_special_tokens
        self._stream = _stream(tokenizer, continues)
        self._last_was_added = False

    def append(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; ids outside the vocabulary add nothing."""
        return "".join([self._append(token_id) for token_id in token_ids])

    def flush(self) -> str:
        """What was held back, broken characters replaced; to be called once, at the end."""
        return self._stream.flush()

    def _append(self, token_id: int) -> str:
        tokenizer = self._tokenizer
        if not 0 <= token_id <= tokenizer.max_token_id:
            return ""
        if self._skips and tokenizer.is_special(token_id):
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
    """Characters of a token stand for bytes; a token with other characters stands for itself."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int, token: str) -> str:
        try:
            data = bytes([_BYTES[char] for char in token])
        except KeyError:
            data = token.encode()
        return self._decoder.decode(data)

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _ByteFallback:
    """``<0xE2>`` stands for a byte, every other token for its text with ``▁`` as a space."""

    def __init__(self, space: str, strip_first: bool) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._space = space
        self._strips = strip_first

    def push(self, token_id: int, token: str) -> str:
        byte = _BYTE_TOKEN.fullmatch(token)
        if byte is not None:
            text = self._decoder.decode(bytes([int(byte[1], 16)]))
        else:
            text = self.flush() + token.replace(self._space, " ")
        return self._stripped(text)

    def flush(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return self._stripped(text)

    def _stripped(self, text: str) -> str:
        """The first text of all without its leading space."""
        if not self._strips or not text:
            return text
        self._strips = False
        return text.removeprefix(" ")


class _Window:
    """The difference that the newest token makes to the decoded text of a few tokens before it."""

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
    decoder: Any = tokenizer.backend.decoder
    layout = json.loads(decoder.__getstate__()) if decoder is not None else {}
    if layout.get("type") == "ByteLevel":
        return _ByteLevel()
    fallback = _byte_fallback(layout)
    if fallback is not None:
        space, strips = fallback
        return _ByteFallback(space, strips and not continues)
    return _Window(tokenizer, continues)


def _byte_fallback(layout: dict[str, Any]) -> tuple[str, bool] | None:
    """The space character and whether a leading space is stripped, when the decoder is Llama's:
    replace, byte fallback, fuse and perhaps strip one space at the left. None for other
    decoders."""
    steps = layout.get("decoders", []) if layout.get("type") == "Sequence" else []
    kinds = [step.get("type") for step in steps]
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or len(kinds) > 4:
        return None
    space = steps[0].get("pattern", {}).get("String")
    if not isinstance(space, str) or steps[0].get("content") != " ":
        return None
    if len(kinds) == 3:
        return space, False
    strip = {k: steps[3].get(k) for k in ("type", "content", "start", "stop")}
    if strip != {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
        return None
    return space, True


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte: itself where it is printable, else the next one
    from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def token_bytes(tokenizer: Tokenizer, token_id: int) -> bytes:
    """The bytes that a token stands for in the middle of a text; empty for an id without a token, as those are that
    pad a model's vocabulary beyond its tokenizer's."""
    if token_id > tokenizer.max_token_id:
        return b""
    token = tokenizer.token_text(token_id)
    if not token or tokenizer.is_added(token_id):
        return token.encode()
    stream = _stream(tokenizer, continues=True)
    if isinstance(stream, _ByteLevel):
        try:
            return bytes([_BYTES[char] for char in token])
        except KeyError:
            return token.encode()
    byte = _BYTE_TOKEN.fullmatch(token)
    if byte is not None:
        return bytes([int(byte[1], 16)])
    return token.replace("▁", " ").encode()
