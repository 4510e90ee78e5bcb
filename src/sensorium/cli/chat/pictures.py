"""Images in terminals that can show them: the protocols of Kitty, of iTerm2, and sixels.

- Kitty: https://sw.kovidgoyal.net/kitty/graphics-protocol/
- iTerm2: https://iterm2.com/documentation-images.html
- Sixels: VT330/VT340 Programmer Reference Manual, chapter 14
"""

from __future__ import annotations

import base64
import io
import os
import re
import select
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

Protocol = Literal["kitty", "iterm2", "sixel"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
MOST_WIDTH, MOST_HEIGHT = 480, 320
"""Pixels of an image as it is shown."""
CELL_WIDTH = 10
"""Pixels of a character that are assumed."""
QUERY_SECONDS = 0.5
"""Time that a terminal has for its answer."""
_CHUNK = 4096
_SIXEL_ROWS = 6
_COLOURS = 128
_MOST_ANSWER = 4096
_KITTY_QUERY = "\x1b_Gi=31,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\"
_ATTRIBUTES_QUERY = "\x1b[c"
_ERASE_LINE = b"\r\x1b[K"
_ATTRIBUTES = re.compile(rb"\x1b\[\?([0-9;]*)c")
_KITTY_TERMINALS = ("xterm-kitty", "xterm-ghostty")
_ITERM_PROGRAMS = ("iTerm.app", "WezTerm", "mintty", "rio")
_NO_IMAGES = ("", "dumb", "linux", "vt100")


def detect(environ: Mapping[str, str], ask: Callable[[str], bytes]) -> Protocol | None:
    """Return the protocol that the terminal understands, None for none.

    Args:
        environ: environment variables, in which some terminals name themselves.
        ask: writes a query to the terminal and returns its answer; used where the variables do not
            tell.
    """
    multiplexed = "TMUX" in environ or environ.get("TERM", "").startswith("screen")
    if environ.get("TERM", "") in _NO_IMAGES:
        return None
    if not multiplexed:
        if "KITTY_WINDOW_ID" in environ or environ["TERM"] in _KITTY_TERMINALS:
            return "kitty"
        if environ.get("TERM_PROGRAM") in _ITERM_PROGRAMS or environ.get("LC_TERMINAL") == "iTerm2":
            return "iterm2"
    answer = ask(_ATTRIBUTES_QUERY if multiplexed else _KITTY_QUERY + _ATTRIBUTES_QUERY)
    if b"_Gi=31;OK" in answer:
        return "kitty"
    attributes = _ATTRIBUTES.search(answer)
    return "sixel" if attributes is not None and b"4" in attributes[1].split(b";") else None


def ask_terminal(query: str, seconds: float = QUERY_SECONDS) -> bytes:
    """Write a query to the controlling terminal and return its answer, empty if there is none.

    The answer ends with the terminal's attributes, which every terminal that answers sends last.
    """
    import termios
    import tty

    try:
        terminal = os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return b""
    try:
        before = termios.tcgetattr(terminal)
        try:
            tty.setcbreak(terminal, termios.TCSANOW)
            os.write(terminal, query.encode("ascii"))
            answer = _answer(terminal, time.monotonic() + seconds)
            os.write(terminal, _ERASE_LINE)  # a terminal that takes the query for text shows it
            return answer
        finally:
            termios.tcsetattr(terminal, termios.TCSANOW, before)
    except (OSError, termios.error):
        return b""
    finally:
        os.close(terminal)


def _answer(terminal: int, deadline: float) -> bytes:
    answer = b""
    while _ATTRIBUTES.search(answer) is None and len(answer) < _MOST_ANSWER:
        ready, _, _ = select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        answer += os.read(terminal, 256)
    return answer


def thumbnail(path: str) -> Image | None:
    """Return the image of a file, small and upright; None if it cannot be read as one."""
    import warnings

    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.draft("RGB", (2 * MOST_WIDTH, 2 * MOST_HEIGHT))
                upright = ImageOps.exif_transpose(image).convert("RGB")
        upright.thumbnail((MOST_WIDTH, MOST_HEIGHT))
    except Exception:  # the decoders of Pillow raise many kinds
        return None
    return upright


def drawn(image: Image, protocol: Protocol) -> str:
    """Return what makes a terminal show an image."""
    if protocol == "sixel":
        return "".join(_sixels(image))
    file = io.BytesIO()
    image.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode("ascii")
    columns = max(1, image.width // CELL_WIDTH)
    if protocol == "iterm2":
        size = len(file.getvalue())
        options = f"inline=1;size={size};width={columns};preserveAspectRatio=1"
        return f"\x1b]1337;File={options}:{data}\x07"
    return "".join(_kitty(data, columns))


def _kitty(data: str, columns: int) -> Iterator[str]:
    """Yield the commands that transmit and show a PNG file; q=2: without an answer."""
    chunks = [data[start : start + _CHUNK] for start in range(0, len(data), _CHUNK)]
    for index, chunk in enumerate(chunks):
        more = int(index < len(chunks) - 1)
        options = f"a=T,f=100,q=2,c={columns},m={more}" if index == 0 else f"m={more}"
        yield f"\x1b_G{options};{chunk}\x1b\\"


def _sixels(image: Image) -> Iterator[str]:
    """Yield an image as sixels: columns of six pixels, a layer for each colour of a band."""
    indexed = image.quantize(_COLOURS)
    pixels = np.asarray(indexed)
    palette = indexed.getpalette() or []
    yield f'\x1bP0;1q"1;1;{image.width};{image.height}'
    for index in range(len(palette) // 3):
        red, green, blue = (value * 100 // 255 for value in palette[3 * index : 3 * index + 3])
        yield f"#{index};2;{red};{green};{blue}"
    weights = 1 << np.arange(_SIXEL_ROWS)[:, None]
    for top in range(0, image.height, _SIXEL_ROWS):
        band = pixels[top : top + _SIXEL_ROWS]
        for colour in np.unique(band):
            columns = ((band == colour) * weights[: len(band)]).sum(axis=0)
            yield f"#{colour}{_runs(columns)}$"
        yield "-"
    yield "\x1b\\"


def _runs(columns: np.ndarray) -> str:
    """Return the columns as characters, runs of one character as their number."""
    starts = np.flatnonzero(np.concatenate(([True], columns[1:] != columns[:-1])))
    ends = [*starts[1:], len(columns)]
    found = []
    for start, end in zip(starts, ends, strict=True):
        length, character = end - start, chr(63 + int(columns[start]))
        found.append(f"!{length}{character}" if length > 3 else character * length)
    return "".join(found)
