"""Conversion of decoded frames to RGB over white, in the orientation that the file asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import av

BAND_PIXELS = 1 << 20
"""Pixels blended per band; bounds temporary memory."""


class Converter:
    """Converter of the frames of one video, by one scaler that has no threads of its own.

    A frame that converts itself makes a scaler with a thread per core, and keeps it.
    """

    def __init__(self) -> None:
        from av.video.reformatter import VideoReformatter

        self._scaler = VideoReformatter()

    def oriented(self, frame: av.VideoFrame, width: int, height: int) -> np.ndarray:
        """Return (H, W, 3) uint8 RGB as it is to be shown.

        ``width`` and ``height`` are those of the first frame.

        The array may lie in the memory of the frame.
        """
        if any(component.is_alpha for component in frame.format.components):
            picture = _over_white(self._pixels(frame, "rgba", width, height))
        else:
            picture = self._pixels(frame, "rgb24", width, height)
        a, b, c, d = _display_matrix(frame)
        if abs(b) > abs(a):
            picture, across, down = picture.swapaxes(0, 1), c, b
        else:
            across, down = a, d
        return picture[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]

    def _pixels(self, frame: av.VideoFrame, form: str, width: int, height: int) -> np.ndarray:
        return self._scaler.reformat(frame, width, height, form, threads=1).to_ndarray()


def _over_white(pixels: np.ndarray) -> np.ndarray:
    """Blend (H, W, 4) RGBA uint8 with white into (H, W, 3)."""
    if pixels[..., 3].min() == 255:
        return np.ascontiguousarray(pixels[..., :3])
    picture = np.empty((*pixels.shape[:2], 3), np.uint8)
    num_rows = max(1, BAND_PIXELS // pixels.shape[1])
    for top in range(0, len(pixels), num_rows):
        band = pixels[top : top + num_rows]
        alpha = band[..., 3:].astype(np.uint16)
        mixed = band[..., :3] * alpha + 255 * (255 - alpha)
        picture[top : top + num_rows] = (mixed + 127) // 255
    return picture


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """a, b, c, d of the frame's display matrix.

    Column x and row y are shown at column a x + c y and row b x + d y, but for where the picture
    begins and a common factor (libavutil/display.h).
    """
    from av.sidedata.sidedata import Type

    side_data: Mapping[Any, Any] = frame.side_data
    data = side_data.get(Type.DISPLAYMATRIX)
    if data is None:
        return 1, 0, 0, 1
    matrix = np.frombuffer(bytes(data), dtype=np.int32)
    return int(matrix[0]), int(matrix[1]), int(matrix[3]), int(matrix[4])
