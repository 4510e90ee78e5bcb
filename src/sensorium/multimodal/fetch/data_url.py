"""``data:`` URLs (RFC 2397), base64 or percent-encoded.

``data:video/jpeg;base64,`` holds the frames of a video as JPEG images with commas between.
"""

from __future__ import annotations

import binascii
from collections.abc import Iterator
from urllib.parse import unquote_to_bytes

import pybase64

from sensorium.errors import MediaRefusedError, MediaTooLargeError, MediaUndecodableError
from sensorium.multimodal.decode.video.video_frames import MAX_PICTURES, pack

_MAX_HEADER = 1024
_BINARY = ("image", "video", "audio", "base64", "application")
"""First parts of media types whose data are binary; ``data:base64,`` lacks the semicolon."""
_ESCAPED_BASE64 = ("%2b", "%2f", "%3d", "%0a", "%0d", "%20")
_PIECE = 1 << 16
"""Characters rewritten per step; other threads can run between two steps."""

_BLANKS = b" \n\r\t"
_STANDARD = bytes.maketrans(b"-_", b"+/")


def parse_data_url(text: str, max_bytes: int) -> bytes:
    """Decode a ``data:`` URL; its size is checked first.

    Raises MediaRefusedError for a URL without a comma or text that is not encoded as the URL says,
    MediaTooLargeError, and MediaUndecodableError for bad base64 or characters that have no
    encoding.
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
                "The data: URL says ;base64, but its data are percent-encoded; leave ;base64 out, "
                "or encode them so."
            )
        if media_type == "video/jpeg":
            return _frames(text[comma + 1 :], max_bytes)
        return decode_base64(text[comma + 1 :], max_bytes)
    if (len(text) - comma - 1) > 3 * max_bytes:
        raise _too_large(max_bytes)
    _check_escaped(text, comma + 1, media_type)
    content = _unquote(text, comma + 1)
    if len(content) > max_bytes:
        raise _too_large(max_bytes)
    return content


def _check_escaped(text: str, start: int, media_type: str) -> None:
    """Raise MediaRefusedError for binary data without escapes, which cannot be percent-encoded."""
    if media_type.partition("/")[0] in _BINARY and text.find("%", start) < 0:
        raise MediaRefusedError(
            f"The data: URL does not say ;base64, and its data are not percent-encoded; write "
            f"data:{media_type[:80]};base64,<data> if they are base64."
        )


def _frames(text: str, max_bytes: int) -> bytes:
    """Return the frames of a ``video/jpeg`` URL, as ``video_frames.pack`` writes them."""
    num = text.count(",") + 1
    if num > MAX_PICTURES:
        raise MediaTooLargeError(
            f"The data: URL has {num} images; at most {MAX_PICTURES} make a video. Send fewer, or "
            "a video file."
        )
    frames: list[bytes] = []
    left = max_bytes
    for part in text.split(","):
        try:
            frames.append(decode_base64(part, left))
        except MediaTooLargeError:
            raise _too_large(max_bytes) from None
        left -= len(frames[-1])
    return pack(frames)


def decode_base64(text: str, max_bytes: int) -> bytes:
    """Decode base64, standard or URL-safe, with or without padding; blanks are skipped.

    Raises MediaTooLargeError before decoding, and MediaUndecodableError for other characters or a
    wrong length.
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
    """Return the number of bytes that standard base64 decodes to."""
    end = text[-2:] if isinstance(text, str) else text[-2:].decode("latin-1")
    return (len(text) - len(end) + len(end.rstrip("="))) * 3 // 4


def _decode(text: str | bytes) -> bytes | None:
    """Decode padded standard base64, without the interpreter's lock; None for other text."""
    try:
        return pybase64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None


def _plain_base64(text: str) -> bytes:
    """Rewrite base64 to the standard alphabet, without blanks, with its padding."""
    source = _unquoted(text, 0) if "%" in text else _encoded(text, 0)
    plain = b"".join(piece.translate(_STANDARD, _BLANKS) for piece in source).rstrip(b"=")
    return plain + b"=" * (-len(plain) % 4)


def _unquote(text: str, start: int) -> bytes:
    return b"".join(_unquoted(text, start))


def _unquoted(text: str, start: int) -> Iterator[bytes]:
    """Undo percent-encoding in steps: all at once takes fifty times the memory of the text."""
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
        raise MediaUndecodableError(
            "The data: URL has characters that cannot be encoded."
        ) from None


def _too_large(max_bytes: int) -> MediaTooLargeError:
    return MediaTooLargeError(
        f"The data have more than {max_bytes} bytes, the limit (--max-media-bytes)."
    )
