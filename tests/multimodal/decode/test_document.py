"""PDFs: sizes and pixels of pages, limits, and files that attack who reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from sensorium.config import MediaConfig
from sensorium.errors import MediaTooLargeError, MediaUndecodableError
from sensorium.multimodal.decode.document import inspect_pages, is_pdf, render_page
from sensorium.multimodal.decode.file_kind import kind_of
from tests.fuzz.corpus import corpus
from tests.multimodal import pdfs

AT_72 = MediaConfig(document_dpi=72.0)


def test_pages_look_like_what_was_put_there() -> None:
    colours = [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
    data = pdfs.of_images([Image.new("RGB", (40, 30), colour) for colour in colours])
    assert inspect_pages(data, AT_72) == [(40, 30, "")] * 3
    for index, colour in enumerate(colours):
        pixels = render_page(data, index, AT_72)
        assert pixels.shape == (30, 40, 3)
        assert pixels.dtype == np.uint8
        assert np.abs(pixels[15, 20].astype(int) - colour).max() <= 8  # a JPEG


def test_an_empty_page_is_white() -> None:
    pixels = render_page(pdfs.plain(), 0, AT_72)
    assert pixels.shape == (50, 100, 3)
    assert (pixels == 255).all()


def test_drawing_is_at_the_resolution_asked_for() -> None:
    data = pdfs.plain(content=b"1 0 0 rg 0 0 50 50 re f")
    pixels = render_page(data, 0, MediaConfig(document_dpi=144.0))
    assert pixels.shape == (100, 200, 3)
    assert (pixels[50, 20] == (255, 0, 0)).all()
    assert (pixels[50, 150] == 255).all()


@pytest.mark.parametrize("most", [1, 7, 1000, 4999])
@pytest.mark.parametrize("box", [b"0 0 100 50", b"0 0 14400 0.5", b"0 0 9000 14400"])
def test_a_page_has_no_more_pixels_than_allowed(most: int, box: bytes) -> None:
    config = MediaConfig(max_document_page_pixels=most)
    [(width, height, _)] = inspect_pages(pdfs.plain(box=box), config)
    assert 1 <= width * height <= most
    assert render_page(pdfs.plain(box=box), 0, config).shape == (height, width, 3)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"max_document_pages": 3}, ("4 pages", "3", "--max-document-pages")),
        ({"max_document_pixels": 19_999}, ("20000 pixels", "19999", "--max-document-pixels")),
        ({"max_document_bytes": 500}, ("bytes", "500", "--max-document-bytes")),
    ],
)
def test_limits_are_told_with_numbers(config: dict[str, int], words: tuple[str, ...]) -> None:
    data = pdfs.plain(4)
    with pytest.raises(MediaTooLargeError) as caught:
        inspect_pages(data, MediaConfig(document_dpi=72.0, **config))
    assert all(word in caught.value.message for word in words)


def texts(data: bytes, **config: Any) -> list[str]:
    return [page.text for page in inspect_pages(data, MediaConfig(**config))]


def test_texts_of_pages() -> None:
    assert (
        texts(pdfs.of_text("Café (1)", "second line", num_pages=2)) == ["Café (1)\nsecond line"] * 2
    )
    assert texts(pdfs.of_text("Hello"), max_document_page_chars=0) == [""]
    assert texts(pdfs.plain()) == [""]


def test_text_beyond_the_edges_of_a_page_is_not_read() -> None:
    assert texts(pdfs.of_text("Hello", at=900)) == [""]


@pytest.mark.parametrize("most", [1, 7, 1000])
def test_long_texts_are_cut(most: int) -> None:
    line = "word " * 12
    [text] = texts(pdfs.of_text(*[line] * 15), max_document_page_chars=most)
    whole = "\n".join([line.strip()] * 15)
    if len(whole) <= most:
        assert text == whole
    else:
        assert len(text) == most
        assert (whole[: most - 1], "…") == (text[:-1], text[-1])


def test_no_control_characters_are_in_texts() -> None:
    [text] = texts(pdfs.of_text("a\x00b\x1b[31mc\x7fd"))
    assert text.isprintable()


def test_bombs_of_text_are_cut_or_refused() -> None:
    for name in ("a bomb of text", "a million texts"):
        [text] = texts(pdfs.hostile()[name], max_document_page_chars=100)
        assert 0 < len(text) <= 100


def test_reading_has_a_time_limit() -> None:
    with pytest.raises(MediaTooLargeError, match="--document-timeout"):
        texts(pdfs.of_text("Hello", num_pages=100), document_timeout=0.001)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (pdfs.encrypted(), "password"),
        (pdfs.unknown_protection(), "encrypted"),
        (pdfs.hostile()["cut off"][:60], "damaged"),
        (pdfs.hostile()["no pages"], "no pages|damaged"),
    ],
)
def test_what_cannot_be_read_is_refused(data: bytes, word: str) -> None:
    with pytest.raises(MediaUndecodableError, match=word):
        inspect_pages(data, AT_72)


def test_kinds_of_files() -> None:
    assert kind_of(pdfs.plain()) == "pdf"
    assert is_pdf(b"junk before it\n" + pdfs.plain())
    assert kind_of(b"hello") is None
    assert kind_of(b"") is None
    for modality in ("image", "audio", "video"):
        for name, data in corpus(modality).items():
            if name.startswith("packed") or (
                modality == "video" and name.split()[0] in ("gif", "jpeg", "webp", "png")
            ):
                continue
            assert kind_of(data, f"x.{'weba' if modality == 'audio' else 'bin'}") in (
                modality,
                None,
            ), name
