"""Control characters in what a model writes, which a terminal must not obey."""

from __future__ import annotations

from typing import TextIO

_TAB, _LINE_FEED, _RETURN, _DELETE = 9, 10, 13, 127
_SYMBOLS = 0x2400
"""Code of the visible symbol of control character 0; those of the others follow."""
_VISIBLE: dict[int, str | None] = {
    **{code: chr(_SYMBOLS + code) for code in range(32) if code not in (_TAB, _LINE_FEED)},
    _RETURN: None,
    _DELETE: "\N{SYMBOL FOR DELETE}",
    **dict.fromkeys(range(0x80, 0xA0), "\N{REPLACEMENT CHARACTER}"),
    **dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}"),
}


def harmless(text: str) -> str:
    """Return the text with control characters as visible symbols; tabs and line ends stay.

    Escape sequences could change colours and titles, move the cursor, write to the clipboard or
    make the terminal type something. Surrogates, which cannot be encoded, are replaced, too.
    """
    return text.translate(_VISIBLE)


def shown(text: str, stream: TextIO) -> str:
    """Return the text as it may be written to a stream: harmless where that is a terminal."""
    return harmless(text) if stream.isatty() else text
