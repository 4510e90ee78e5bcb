"""Small PDFs to damage, and forms to upload them with."""

from __future__ import annotations

import functools
import random

from PIL import Image

from tests.fuzz.mutation import mutate
from tests.multimodal import pdfs

MOST_BYTES = 200_000
BOUNDARY = "boundary"
NAMES = (
    *("a.pdf", "../../etc/passwd", "..\\..\\x", "/dev/null", "", ".", "..", "a" * 5000),
    *("a\0b", 'a"b', "a\r\nX: y", "\u202eфайл", "CON", "-rf", "~root", "%2e%2e%2f", "é" * 300),
)
"""Names of files that a client may send."""
_PURPOSES = ("user_data", "vision", "batch", "assistants", "", "fun", "x" * 70_000)


@functools.cache
def documents() -> dict[str, bytes]:
    """PDFs by name; most are hostile already."""
    images = [Image.new("RGB", (40, 30), colour) for colour in ("red", "green")]
    drawn = b"0.5 g 10 10 30 20 re f BT ET 0 0 m 50 25 l S"
    good = {"images": pdfs.of_images(images), "drawn": pdfs.plain(2, content=drawn)}
    hostile = {name: data for name, data in pdfs.hostile().items() if len(data) <= MOST_BYTES}
    return good | hostile


def document(rng: random.Random) -> bytes:
    """A PDF, damaged or as it is."""
    data = documents()[rng.choice(sorted(documents()))]
    return mutate(data, rng, list(documents().values())) if rng.random() < 0.6 else data


def form(rng: random.Random, content: bytes) -> tuple[bytes, str]:
    """A form with a file, right or nearly so, and its content type."""
    name = rng.choice(NAMES).encode("utf-8", "replace")
    purpose = rng.choice(_PURPOSES).encode() if rng.random() < 0.3 else b"user_data"
    parts = [
        b'Content-Disposition: form-data; name="file"; filename="%b"\r\n\r\n%b' % (name, content),
        b'Content-Disposition: form-data; name="purpose"\r\n\r\n' + purpose,
        b'Content-Disposition: form-data; name="expires_after[seconds]"\r\n\r\n-1',
        b"\r\n\r\n",
        b"Content-Disposition: " + b"x" * 100_000 + b"\r\n\r\n",
    ]
    chosen = parts[:2] if rng.random() < 0.6 else rng.choices(parts, k=rng.randrange(6))
    edge = b"--" + BOUNDARY.encode()
    body = b"".join(edge + b"\r\n" + part + b"\r\n" for part in chosen) + edge + b"--\r\n"
    if rng.random() < 0.3:
        body = mutate(body, rng, [])
    kinds = (
        *((f"multipart/form-data; boundary={BOUNDARY}",) * 8),
        "multipart/form-data",
        f'multipart/form-data; boundary="{"b" * 300}"',
        "multipart/mixed; boundary=boundary",
        "application/json",
    )
    return body, rng.choice(kinds)
