"""Files that people would drop on the page, with a question and its true answer."""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from PIL import Image
from training.clips import draw_clip
from training.media import FPS, wave_file
from training.picture import Turn
from training.pictures import draw_picture
from training.sounds import draw_sound


@dataclass(frozen=True)
class Medium:
    """A file, what is asked about it, and the answer."""

    path: Path
    question: str
    answer: str


def _first(turns: list[Turn], *kinds: str) -> Turn:
    return next(turn for turn in turns if turn.kind in kinds)


def picture(folder: Path, seed: int = 298, scene: str = "shapes", kind: str = "count") -> Medium:
    """A drawing of shapes."""
    drawn = draw_picture(seed, scene)
    path = folder / f"{scene}-{seed}.png"
    drawn.image.save(path)
    turn = _first(drawn.turns, kind)
    return Medium(path, turn.question, turn.answer)


def document(folder: Path, seed: int = 298) -> Medium:
    """The same drawing as the page of a PDF."""
    drawn = draw_picture(seed, "shapes")
    path = folder / f"shapes-{seed}.pdf"
    drawn.image.save(path, resolution=72.0)
    turn = _first(drawn.turns, "count")
    return Medium(path, turn.question, turn.answer)


def clip(folder: Path, seed: int = 4) -> Medium:
    """A clip in which something moves, in a format that browsers play."""
    drawn = draw_clip(seed, "moves", (240, 180))
    path = folder / "clip.webm"
    path.write_bytes(webm(drawn.frames))
    turn = _first(drawn.turns, "motion_what", "motion_where")
    return Medium(path, turn.question, turn.answer)


def sound(folder: Path, seed: int = 0) -> Medium:
    """Some beeps."""
    drawn = draw_sound(seed, None, "beeps")
    path = folder / "beeps.wav"
    path.write_bytes(wave_file(drawn.samples))
    turn = _first(drawn.turns, "beeps")
    return Medium(path, turn.question, turn.answer)


def webm(frames: list[Image.Image]) -> bytes:
    """Frames as VP8, nearly without loss."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="webm") as container:
        stream = container.add_stream("libvpx", rate=FPS, options={"crf": "4", "b": "4M"})
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, FPS)
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_image(image)
            frame.pts = number
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return file.getvalue()
