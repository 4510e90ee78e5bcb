"""Spelling of text in the vocabulary of a tokenizer, as its decoder defines it.

Byte-level vocabularies (GPT-2, Qwen, Llama 3) have a character for each byte. Byte-fallback ones
(Llama 2, Mistral, Phi-3) write ``▁`` for a space and ``<0xE2>`` for a byte of a character that has
no token.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """Return GPT-2's printable character for each byte.

    Itself where it is printable, else one from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()


@dataclass(frozen=True, slots=True)
class Spelling:
    """The kind of a tokenizer's decoder.

    Of a byte-fallback one its space, and if it strips a leading one.
    """

    kind: Literal["byte_level", "byte_fallback", "other"]
    space: str = "▁"
    strips_first: bool = False

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer) -> Spelling:
        """Return the spelling of a tokenizer."""
        decoder: Any = backend.decoder
        layout = json.loads(decoder.__getstate__()) if decoder is not None else {}
        if layout.get("type") == "ByteLevel":
            return cls("byte_level")
        return _byte_fallback(layout) or cls("other")

    def to_bytes(self, token: str) -> bytes:
        """Return the bytes that a token stands for in the middle of a text."""
        if self.kind == "byte_level":
            return byte_level_bytes(token)
        byte = byte_of(token)
        return token.replace("▁", " ").encode() if byte is None else byte


def byte_level_bytes(token: str) -> bytes:
    """Return the bytes of a byte-level token; one with other characters stands for itself."""
    try:
        return bytes([_BYTES[char] for char in token])
    except KeyError:
        return token.encode()


def byte_of(token: str) -> bytes | None:
    """Return the byte of a token such as ``<0xE2>``, None for others."""
    match = _BYTE_TOKEN.fullmatch(token)
    return None if match is None else bytes([int(match[1], 16)])


def _byte_fallback(layout: dict[str, Any]) -> Spelling | None:
    """Return the spelling of Llama's decoder.

    Replace, byte fallback, fuse and perhaps strip one space at the left.

    None for other decoders.
    """
    steps = layout.get("decoders", []) if layout.get("type") == "Sequence" else []
    kinds = [step.get("type") for step in steps]
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or len(kinds) > 4:
        return None
    space = steps[0].get("pattern", {}).get("String")
    if not isinstance(space, str) or steps[0].get("content") != " ":
        return None
    if len(kinds) == 3:
        return Spelling("byte_fallback", space)
    strip = {k: steps[3].get(k) for k in ("type", "content", "start", "stop")}
    if strip != {"type": "Strip", "content": " ", "start": 1, "stop": 0}:
        return None
    return Spelling("byte_fallback", space, strips_first=True)
