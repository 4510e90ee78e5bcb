"""Images in terminals: which protocol, and what is sent."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sensorium.cli.chat import pictures


def checked(colours: tuple[int, int] = (40, 26)) -> Image.Image:
    """An image of four colours, one for each quarter."""
    width, height = colours
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 255, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 255)
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("environ", "answer", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, None, "kitty"),
        ({"TERM": "xterm-256color", "KITTY_WINDOW_ID": "1"}, None, "kitty"),
        ({"TERM": "xterm-ghostty"}, None, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, None, "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, None, "iterm2"),
        ({"TERM": "xterm-256color"}, b"\x1b_Gi=31;OK\x1b\\\x1b[?62;c", "kitty"),
        ({"TERM": "xterm-256color"}, b"\x1b_Gi=31;ENOTSUPPORTED\x1b\\\x1b[?62;4;22c", "sixel"),
        ({"TERM": "xterm-256color"}, b"\x1b[?62;4c", "sixel"),
        ({"TERM": "xterm-256color"}, b"\x1b[?62;22c", None),
        ({"TERM": "xterm-256color"}, b"\x1b[?64;14;44c", None),
        ({"TERM": "xterm-256color"}, b"", None),
        ({"TERM": "tmux-256color", "TMUX": "x", "KITTY_WINDOW_ID": "1"}, b"\x1b[?1;2;4c", "sixel"),
        ({"TERM": "screen", "TERM_PROGRAM": "iTerm.app"}, b"\x1b[?1;2c", None),
        ({"TERM": "dumb"}, None, None),
        ({"TERM": "linux"}, None, None),
        ({}, None, None),
    ],
)
def test_the_protocol_of_a_terminal(
    environ: dict[str, str], answer: bytes | None, protocol: str | None
) -> None:
    def ask(query: str) -> bytes:
        assert answer is not None, "it is not asked"
        assert ("_Gi=31" in query) == ("TMUX" not in environ and environ["TERM"] != "screen")
        return answer

    assert pictures.detect(environ, ask) == protocol


def test_kitty_gets_a_png_in_pieces() -> None:
    noise = np.random.Generator(np.random.PCG64(1)).integers(0, 256, (90, 120, 3), np.uint8)
    image = Image.fromarray(noise)
    commands = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", pictures.drawn(image, "kitty"))
    assert len(commands) > 2
    assert commands[0][0] == "a=T,f=100,q=2,c=12,m=1"
    assert [options for options, _ in commands[1:]] == [*["m=1"] * (len(commands) - 2), "m=0"]
    assert all(len(data) <= 4096 for _, data in commands)
    file = io.BytesIO(base64.b64decode("".join(data for _, data in commands)))
    assert np.array_equal(np.asarray(Image.open(file)), noise)


def test_iterm2_gets_a_png() -> None:
    shown = pictures.drawn(checked(), "iterm2")
    options, data = re.fullmatch(r"\x1b\]1337;File=([^:]*):([^\x07]*)\x07", shown).groups()
    file = base64.b64decode(data)
    assert f"size={len(file)};width=4;" in options
    assert Image.open(io.BytesIO(file)).size == (40, 26)


def test_sixels_paint_every_pixel_in_its_colour() -> None:
    image = checked()
    assert np.array_equal(painted(pictures.drawn(image, "sixel")), np.asarray(image))


def painted(sixels: str) -> np.ndarray:
    """Return the pixels that a terminal would paint."""
    head, body = re.fullmatch(r'\x1bP0;1q"1;1;(\d+;\d+)(.*)\x1b\\', sixels, re.DOTALL).groups()
    width, height = map(int, head.split(";"))
    pixels = np.zeros((-(-height // 6) * 6, width, 3), np.uint8)
    palette: dict[str, list[int]] = {}
    x = y = 0
    colour = ""
    for token in re.findall(r"#\d+;2;\d+;\d+;\d+|#\d+|!\d+.|[-$?-~]", body):
        if token.startswith("#") and ";" in token:
            name, _, *rgb = token[1:].split(";")
            palette[name] = [round(int(value) * 255 / 100) for value in rgb]
        elif token.startswith("#"):
            colour = token[1:]
        elif token == "$":
            x = 0
        elif token == "-":
            x, y = 0, y + 6
        else:
            count = int(token[1:-1]) if token.startswith("!") else 1
            bits = ord(token[-1]) - 63
            for row in range(6):
                if bits >> row & 1:
                    pixels[y + row, x : x + count] = palette[colour]
            x += count
    return pixels[:height]


def test_a_thumbnail_is_small_and_upright(tmp_path: Path) -> None:
    image = Image.new("RGBA", (4000, 1000), "red")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.convert("RGB").save(tmp_path / "a.jpg", exif=exif)
    small = pictures.thumbnail(str(tmp_path / "a.jpg"))
    assert small.size == (80, 320)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_has_no_thumbnail(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    assert pictures.thumbnail(str(tmp_path / "a.png")) is None


def test_without_a_terminal_there_is_no_answer() -> None:
    import subprocess
    import sys

    code = "from sensorium.cli.chat.pictures import ask_terminal; print(ask_terminal('x', 60))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        start_new_session=True,
        timeout=300,
    )
    assert done.stdout == "b''\n"
