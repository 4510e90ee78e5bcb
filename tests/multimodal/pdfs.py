"""Small PDFs for tests: good ones, and ones that attack who reads them."""

from __future__ import annotations

import functools
import io
import zlib
from collections.abc import Sequence

from PIL import Image

_HEAD = b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n"


def of_images(images: Sequence[Image.Image], dpi: float = 72.0) -> bytes:
    """A PDF with a page for each picture, which fills it."""
    buffer = io.BytesIO()
    first, *others = [image.convert("RGB") for image in images]
    first.save(buffer, "PDF", save_all=True, append_images=others, resolution=dpi)
    return buffer.getvalue()


def of_objects(objects: Sequence[bytes], trailer: bytes = b"") -> bytes:
    """A PDF of these objects, numbered from 1; the first is the catalog."""
    out, offsets = bytearray(_HEAD), []
    for number, content in enumerate(objects, 1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%b\nendobj\n" % (number, content)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    out += b"trailer\n<< /Size %d /Root 1 0 R %b >>\n" % (len(objects) + 1, trailer)
    out += b"startxref\n%d\n%%%%EOF\n" % start
    return bytes(out)


def stream(data: bytes, entries: bytes = b"", *, packed: bool = True) -> bytes:
    """A stream object."""
    if packed:
        data, entries = zlib.compress(data, 9), entries + b" /Filter /FlateDecode"
    return b"<< /Length %d %b >>\nstream\n%b\nendstream" % (len(data), entries, data)


def plain(
    num_pages: int = 1,
    box: bytes = b"0 0 100 50",
    content: bytes = b"",
    more: bytes = b"",
    objects: Sequence[bytes] = (),
) -> bytes:
    """A PDF whose pages all have one content; ``more`` goes into each page.

    Objects: 1 catalog, 2 pages, 3 content, then ``objects`` from 4, then the pages.
    """
    first = 4 + len(objects)
    kids = b" ".join(b"%d 0 R" % (first + i) for i in range(num_pages))
    page = b"<< /Type /Page /Parent 2 0 R /MediaBox [%b] /Contents 3 0 R %b >>" % (box, more)
    return of_objects(
        [
            b"<< /Type /Catalog /Pages 2 0 R >>",
            b"<< /Type /Pages /Count %d /Kids [%b] >>" % (num_pages, kids),
            stream(content),
            *objects,
            *([page] * num_pages),
        ]
    )


FONT = b"/Resources << /Font << /F << /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >> >> >>"


def of_text(*lines: str, num_pages: int = 1, at: int = 180) -> bytes:
    """A PDF whose pages have these lines of Latin text, from ``at`` points above the lower edge."""
    shown = b" T* ".join(b"(%b) Tj" % _escaped(line) for line in lines)
    content = b"BT /F 9 Tf 11 TL 10 %d Td %b ET" % (at, shown)
    return plain(num_pages, box=b"0 0 300 200", content=content, more=FONT)


def _escaped(text: str) -> bytes:
    return text.encode("cp1252").replace(b"\\", b"\\\\").replace(b"(", b"\\(").replace(b")", b"\\)")


def encrypted() -> bytes:
    """A PDF that needs a password that nobody knows."""
    key = b"<" + b"ab" * 32 + b">"
    protection = b"<< /Filter /Standard /V 1 /R 2 /O %b /U %b /P -4 >>" % (key, key)
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Count 1 /Kids [3 0 R] >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 100 50] >>",
        protection,
    ]
    return of_objects(objects, b"/Encrypt 4 0 R /ID [<00> <00>]")


def unknown_protection() -> bytes:
    """A PDF that is encrypted by a handler that nobody has."""
    good = encrypted()
    return good.replace(b"/Filter /Standard", b"/Filter /Nonsense")


@functools.cache
def hostile() -> dict[str, bytes]:
    """PDFs by what they attack."""
    good = of_images([Image.new("RGB", (60, 40), "red")])
    image = (
        b"<< /Type /XObject /Subtype /Image /Width %d /Height %d /ColorSpace /DeviceRGB "
        b"/BitsPerComponent 8 "
    )
    paint = b"q 100 0 0 50 0 0 cm /X Do Q"
    resources = b"/Resources << /XObject << /X 4 0 R >> >>"
    form = b"/Type /XObject /Subtype /Form /BBox [0 0 100 50] " + resources
    big = zlib.compress(bytes(64 << 20), 9)
    packed_twice = zlib.compress(big, 9)
    return {
        "empty": b"",
        "header alone": _HEAD,
        "cut off": good[: len(good) // 2],
        "no trailer": good[: good.rindex(b"xref")],
        "zeros inside": good[:200] + bytes(200) + good[400:],
        "encrypted": encrypted(),
        "unknown protection": unknown_protection(),
        "no pages": of_objects(
            [b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Count 0 /Kids [] >>"]
        ),
        "thousands of pages": plain(20_000),
        "a count that lies": plain(1).replace(b"/Count 1", b"/Count 2000000000"),
        "a negative count": plain(1).replace(b"/Count 1", b"/Count -5"),
        "pages that are their own parent": of_objects(
            [
                b"<< /Type /Catalog /Pages 2 0 R >>",
                b"<< /Type /Pages /Count 3 /Kids [2 0 R 2 0 R 2 0 R] >>",
            ]
        ),
        "a catalog that is its own pages": of_objects([b"<< /Type /Catalog /Pages 1 0 R >>"]),
        "a huge page": plain(box=b"0 0 1e9 1e9"),
        "a page as thin as a hair": plain(box=b"0 0 14400 0.001"),
        "a page without a size": plain(box=b"0 0 0 0"),
        "a page of no numbers": plain(box=b"/a /b /c /d"),
        "a bomb of content": of_objects(
            [
                b"<< /Type /Catalog /Pages 2 0 R >>",
                b"<< /Type /Pages /Count 1 /Kids [4 0 R] >>",
                b"<< /Length %d /Filter [/FlateDecode /FlateDecode] >>\nstream\n%b\nendstream"
                % (len(packed_twice), packed_twice),
                b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 100 50] /Contents 3 0 R >>",
            ]
        ),
        "a bomb of an image": plain(
            content=paint,
            more=resources,
            objects=[
                image % (60_000, 60_000)
                + b"/Length %d /Filter /FlateDecode >>\nstream\n%b\nendstream" % (len(big), big)
            ],
        ),
        "an image larger than numbers": plain(
            content=paint,
            more=resources,
            objects=[image % (2**31 - 1, 2**31 - 1) + b"/Length 3 >>\nstream\nabc\nendstream"],
        ),
        "a form that draws itself": plain(
            content=paint, more=resources, objects=[stream(paint * 8, form)]
        ),
        "a million strokes": plain(content=b"0 0 m 100 50 l S " * 300_000),
        "a bomb of text": plain(content=b"BT /F 1 Tf (%b) Tj ET" % (b"word " * 200_000), more=FONT),
        "a million texts": plain(content=b"BT /F 9 Tf (a) Tj ET " * 300_000, more=FONT),
        "deep saving of states": plain(content=b"q " * 500_000),
        "deep arrays": plain(more=b"/A " + b"[" * 20_000 + b"]" * 20_000),
        "an object that is a reference to itself": of_objects(
            [b"<< /Type /Catalog /Pages 2 0 R >>", b"2 0 R"]
        ),
        "a script": plain(more=b"/AA << /O << /S /JavaScript /JS (while(1);) >> >>"),
        "no PDF but its header": b"%PDF-1.7\n" + bytes(range(256)) * 64,
    }
