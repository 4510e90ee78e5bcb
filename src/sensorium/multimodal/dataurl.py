"""``data:`` URLs (RFC 2397): base64 or percent-encoded; ``data:video/jpeg;base64,`` is pictures with commas between."""

from __future__ import annotations

import binascii
from urllib.parse import unquote_to_bytes

from sensorium.errors import MediaRefusedError, MediaTooLargeError, MediaUndecodableError
from sensorium.multimodal.frames import MAX_PICTURES, pack

_MAX_HEADER = 1024
_PIECE = 1 << 18
"""Characters decoded at a time, a multiple of 4: between pieces other threads get the interpreter."""

_SUBSTITUTES = {" ": "", "\n": "", "\r": "", "\t": "", "-": "+", "_": "/"}
"""Blanks are skipped, URL-safe letters read as the standard ones."""


def parse_data_url(text: str, max_bytes: int) -> bytes:
    """The content of a ``data:`` URL. Its size is checked before it is decoded.

    Raises MediaRefusedError for a URL without a comma, MediaTooLargeError, and MediaUndecodableError for bad base64.
    """
    comma = text.find(",", 0, _MAX_HEADER)
    if comma < 0:
        raise MediaRefusedError(
            "The data: URL has no comma; write it as data:image/png;base64,<data>."
        )
    header = text[5:comma].strip().lower()
    if header.endswith(";base64") and header.partition(";")[0] == "video/jpeg":
        return _pictures(text[comma + 1 :], max_bytes)
    if header.endswith(";base64"):
        return decode_base64(text[comma + 1 :], max_bytes)
    if (len(text) - comma - 1) > 3 * max_bytes:
        raise _too_large(max_bytes)
    content = unquote_to_bytes(text[comma + 1 :])
    if len(content) > max_bytes:
        raise _too_large(max_bytes)
    return content


def _pictures(text: str, max_bytes: int) -> bytes:
    """The pictures of a ``video/jpeg`` URL, as ``frames.pack`` writes them."""
    num = text.count(",") + 1
    if num > MAX_PICTURES:
        raise MediaTooLargeError(
            f"The data: URL has {num} pictures; at most {MAX_PICTURES} make a video. Send fewer, or a video file."
        )
    pictures: list[bytes] = []
    left = max_bytes
    for part in text.split(","):
        try:
            pictures.append(decode_base64(part, left))
        except MediaTooLargeError:
            raise _too_large(max_bytes) from None
        left -= len(pictures[-1])
    return pack(pictures)


def decode_base64(text: str, max_bytes: int) -> bytes:
    """Decode base64, standard or URL-safe, with or without padding; blanks are skipped.

    Raises MediaTooLargeError before decoding, and MediaUndecodableError for other characters or a wrong length.
    """
    if len(text) > 4 * max_bytes + _MAX_HEADER:
        raise _too_large(max_bytes)
    if "%" in text[:_PIECE] or "%" in text[-3:]:
        text = unquote_to_bytes(text).decode("latin-1")
    for letter, substitute in _SUBSTITUTES.items():
        if letter in text:
            text = text.replace(letter, substitute)
    text = text.rstrip("=")
    if len(text) * 3 // 4 > max_bytes:
        raise _too_large(max_bytes)
    text += "=" * (-len(text) % 4)
    try:
        return b"".join(
            binascii.a2b_base64(text[start : start + _PIECE], strict_mode=True)
            for start in range(0, len(text), _PIECE)
        )
    except ValueError:
        raise MediaUndecodableError("The base64 data are damaged or truncated.") from None


def _too_large(max_bytes: int) -> MediaTooLargeError:
    return MediaTooLargeError(
        f"The data have more than {max_bytes} bytes, the limit (--max-media-bytes)."
    )
