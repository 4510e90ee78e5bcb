"""``data:`` URLs (RFC 2397): base64 or percent-encoded; ``data:video/jpeg;base64,`` is pictures with commas between."""

from __future__ import annotations

import binascii
from collections.abc import Iterator
from urllib.parse import unquote_to_bytes

import pybase64

from sensorium.errors import MediaRefusedError, MediaTooLargeError, MediaUndecodableError
from sensorium.multimodal.decode.video.video_frames import MAX_PICTURES, pack

_MAX_HEADER = 1024
_BINARY = ("image", "video", "audio", "base64", "application")
"""What media types begin with whose data are no text; ``data:base64,`` lacks the semicolon."""
_ESCAPED_BASE64 = ("%2b", "%2f", "%3d", "%0a", "%0d", "%20")
_PIECE = 1 << 16
"""Characters that are rewritten at a time: between pieces other threads get the interpreter."""

_BLANKS = b" \n\r\t"
_STANDARD = bytes.maketrans(b"-_", b"+/")


def parse_data_url(text: str, max_bytes: int) -> bytes:
    """The content of a ``data:`` URL. Its size is checked before it is decoded.

    Raises MediaRefusedError for a URL without a comma and for text that is not encoded as the URL says,
    MediaTooLargeError, and MediaUndecodableError for bad base64 and for text that no encoding has.
    """
    comma = text.find(",", 0, _MAX_HEADER)
    if comma < 0:
        raise MediaRefusedError(
            "The data: URL has no comma; write it as data:image/png;base64,<data>."
        )
    media_type, *parameters = (part.strip().lower() for part in text[5:comma].split(";"))
    if "base64" in parameters:
        if (start := text[comma + 1 : comma + 6].lower()) == "data:":
            raise MediaRefusedError("The data: URL holds a second data: URL; send that alone.")
        if start[:1] == "%" and start[:3] not in _ESCAPED_BASE64:
            raise MediaRefusedError(
                "The data: URL says ;base64, but its data are percent-encoded; leave ;base64 out, or encode them so."
            )
        if media_type == "video/jpeg":
            return _pictures(text[comma + 1 :], max_bytes)
        return decode_base64(text[comma + 1 :], max_bytes)
    if (len(text) - comma - 1) > 3 * max_bytes:
        raise _too_large(max_bytes)
    _check_escaped(text, comma + 1, media_type)
    content = _unquote(text, comma + 1)
    if len(content) > max_bytes:
        raise _too_large(max_bytes)
    return content


def _check_escaped(text: str, start: int, media_type: str) -> None:
    """Raise MediaRefusedError for data that cannot be percent-encoded media: these have bytes that must be escaped."""
    if media_type.partition("/")[0] in _BINARY and text.find("%", start) < 0:
        raise MediaRefusedError(
            f"The data: URL does not say ;base64, and its data are not percent-encoded; write "
            f"data:{media_type[:80]};base64,<data> if they are base64."
        )


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
    if _decoded_size(text) <= max_bytes:
        content = _decode(text)
        if content is not None:
            return content
    plain = _plain_base64(text)
    if _decoded_size(plain) > max_bytes:
        raise _too_large(max_bytes)
    content = _decode(plain)
    if content is None:
        raise MediaUndecodableError("The base64 data are damaged or truncated.")
    return content


def _decoded_size(text: str | bytes) -> int:
    """Bytes that standard base64 stands for."""
    end = text[-2:] if isinstance(text, str) else text[-2:].decode("latin-1")
    return (len(text) - len(end) + len(end.rstrip("="))) * 3 // 4


def _decode(text: str | bytes) -> bytes | None:
    """Decode standard base64 with its padding, in one go and without the interpreter's lock; None if it is not that."""
    try:
        return pybase64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None


def _plain_base64(text: str) -> bytes:
    """The same data in standard letters, without blanks, padded as they should be."""
    source = _unquoted(text, 0) if "%" in text else _encoded(text, 0)
    plain = b"".join(piece.translate(_STANDARD, _BLANKS) for piece in source).rstrip(b"=")
    return plain + b"=" * (-len(plain) % 4)


def _unquote(text: str, start: int) -> bytes:
    return b"".join(_unquoted(text, start))


def _unquoted(text: str, start: int) -> Iterator[bytes]:
    """The text from ``start`` on without percent-encoding, piece by piece: all at once takes fifty times its memory."""
    while start < len(text):
        end = start + _PIECE
        if end < len(text):  # not within an escape
            end -= 1 if text[end - 1] == "%" else 2 if text[end - 2] == "%" else 0
        yield unquote_to_bytes(_utf8(text[start:end]))
        start = end


def _encoded(text: str, start: int) -> Iterator[bytes]:
    for begin in range(start, len(text), _PIECE):
        yield _utf8(text[begin : begin + _PIECE])


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise MediaUndecodableError("The data: URL has characters that no encoding has.") from None


def _too_large(max_bytes: int) -> MediaTooLargeError:
    return MediaTooLargeError(
        f"The data have more than {max_bytes} bytes, the limit (--max-media-bytes)."
    )
