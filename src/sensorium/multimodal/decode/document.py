"""PDFs: sizes and texts of their pages, and one page as an (H, W, 3) uint8 RGB array.

PDFium reads them, in a media worker: what a file does to it, it does there. Its own texts never
reach a message. Scripts are not run; PDFium is built without an interpreter.
"""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from sensorium.config import MediaConfig
from sensorium.errors import MediaTooLargeError, MediaUndecodableError, SensoriumError, counted
from sensorium.multimodal.decode.shortage import check_shortage
from sensorium.multimodal.items import PageFacts, check_document_time

if TYPE_CHECKING:
    from pypdfium2 import PdfDocument

POINTS_PER_INCH = 72
HEADER = b"%PDF-"
_HEADER_WITHIN = 1024
"""Bytes at the beginning within which readers look for the header."""
_NEEDS_PASSWORD = 4
_UNKNOWN_SECURITY = 5
_CHANNELS = 3
_SHRINK = 0.99
_NO_TEXT = re.compile(r"[^\S\n]*\ufffe\s*|[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff]")
"""Hyphens that end a line within a word, with the end of the line; control characters."""
_BEFORE_END = re.compile(r"[^\S\n]+\n")
_CUT = "…"

_LOCK = threading.Lock()
"""PDFium may be used by one thread at a time."""


def is_pdf(data: bytes) -> bool:
    """Return true for a file with a PDF's header near its beginning."""
    return HEADER in data[:_HEADER_WITHIN]


def inspect_pages(data: bytes, config: MediaConfig) -> list[PageFacts]:
    """Return width and height in pixels that each page of a PDF will have, and its text.

    Raises MediaTooLargeError for too many bytes, pages, pixels or seconds, and
    MediaUndecodableError for a PDF that is damaged, encrypted or empty.
    """
    _check_bytes(data, config)
    with _opened(data) as document:
        num_pages = len(document)
        most = config.max_document_pages
        if num_pages > most:
            raise MediaTooLargeError(
                f"The PDF has {num_pages} pages; at most {most} are allowed "
                "(--max-document-pages). Send the pages that matter."
            )
        if num_pages == 0:
            raise MediaUndecodableError("The PDF has no pages.")
        sizes = [_size(document, index, config)[1:] for index in range(num_pages)]
        _check_pixels(sizes, config)
        texts = _texts(document, config)
    return [PageFacts(*size, text) for size, text in zip(sizes, texts, strict=True)]


def _check_pixels(sizes: list[tuple[int, int]], config: MediaConfig) -> None:
    num_pages, num_pixels = len(sizes), sum(width * height for width, height in sizes)
    if num_pixels > config.max_document_pixels:
        raise MediaTooLargeError(
            f"The {counted(num_pages, 'page')} of the PDF would have {num_pixels} pixels together; "
            f"at most {config.max_document_pixels} are allowed (--max-document-pixels). Send fewer "
            "pages."
        )


def render_page(data: bytes, index: int, config: MediaConfig) -> np.ndarray:
    """Return the page with this index, (H, W, 3) uint8 RGB, on white.

    Raises as ``inspect_pages``.
    """
    _check_bytes(data, config)
    with _opened(data) as document:
        scale = _size(document, index, config)[0]
        page = document[index]
        try:
            bitmap = page.render(scale=scale, rev_byteorder=True, may_draw_forms=True)
            pixels = np.array(bitmap.to_numpy()[..., :_CHANNELS], order="C")
            bitmap.close()
        finally:
            page.close()
    if pixels.ndim == _CHANNELS and pixels.shape[2] == _CHANNELS:
        return pixels
    return np.repeat(pixels.reshape(*pixels.shape[:2], 1), _CHANNELS, axis=2)  # a page of greys


def _texts(document: PdfDocument, config: MediaConfig) -> list[str]:
    """Return the text of each page, each cut at ``max_document_page_chars``.

    A page that cannot be read has none here: drawing it says why. Raises MediaTooLargeError when
    the pages take more than ``document_timeout`` seconds.
    """
    from pypdfium2 import PdfiumError

    texts, most = [], config.max_document_page_chars
    began = time.monotonic()
    for index in range(len(document)):
        text = ""
        if most:
            check_document_time(time.monotonic() - began, config.document_timeout)
            try:
                text = _text(document, index, most)
            except PdfiumError as error:
                check_shortage(error)
        texts.append(text)
    return texts


def _text(document: PdfDocument, index: int, most: int) -> str:
    """Return the text within a page's edges in the order in which the PDF has it."""
    page = document[index]
    try:
        lines = page.get_textpage()
        try:
            text = lines.get_text_bounded() if lines.count_chars() else ""
        finally:
            lines.close()
    finally:
        page.close()
    text = text[: 4 * most]  # enough, whatever goes
    text = _NO_TEXT.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = _BEFORE_END.sub("\n", text).strip()
    return text if len(text) <= most else text[: most - 1] + _CUT


def _check_bytes(data: bytes, config: MediaConfig) -> None:
    if len(data) > config.max_document_bytes:
        raise MediaTooLargeError(
            f"The PDF has {len(data)} bytes; at most {config.max_document_bytes} are allowed "
            "(--max-document-bytes)."
        )


def _size(document: PdfDocument, index: int, config: MediaConfig) -> tuple[float, int, int]:
    """Return the scale at which a page is drawn, from points to pixels, and its size in pixels.

    A page beyond ``max_document_page_pixels`` is drawn smaller.
    """
    width, height = document.get_page_size(index)
    if not (math.isfinite(width) and math.isfinite(height) and width > 0 and height > 0):
        raise MediaUndecodableError(f"Page {index + 1} of the PDF has no size.")
    scale, most = config.document_dpi / POINTS_PER_INCH, config.max_document_page_pixels
    scale = min(scale, math.sqrt(most / width / height))
    while math.ceil(width * scale) * math.ceil(height * scale) > most:
        scale *= _SHRINK
    return scale, math.ceil(width * scale), math.ceil(height * scale)


@contextmanager
def _opened(data: bytes) -> Iterator[PdfDocument]:
    """Open a PDF for the block; what PDFium raises becomes one of our errors."""
    from pypdfium2 import PdfDocument, PdfiumError

    with _LOCK:
        document: PdfDocument | None = None
        try:
            document = PdfDocument(data)
            document.init_forms()
            yield document
        except (SensoriumError, MemoryError):
            raise
        except PdfiumError as error:
            check_shortage(error)
            raise MediaUndecodableError(_explained(getattr(error, "err_code", None))) from None
        finally:
            if document is not None:
                document.close()


def _explained(code: int | None) -> str:
    if code == _NEEDS_PASSWORD:
        return "The PDF is encrypted and needs a password; send it without one."
    if code == _UNKNOWN_SECURITY:
        return "The PDF is encrypted in a way that cannot be read; send it without protection."
    return "The PDF is damaged or truncated and cannot be read."
