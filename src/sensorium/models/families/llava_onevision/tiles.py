"""Tiles of LLaVA-OneVision (Li et al., 2024).

An image is fitted into a grid, padded, and unpadded again.

An image of 500 x 300 pixels and tiles of 384: of the pinpoints that keep all of it 768 x 384 is the
smallest, so that it is enlarged to 640 x 384 and put into the middle of two tiles:

    +------------+------------+
    |..##########|##########..|
    |..##########|##########..|        .  padding, black       #  the image
    |..##########|##########..|
    +------------+------------+

The tower makes 27 x 27 features of each tile; of these 54 x 27 the 46 x 27 in the middle are kept.

More features than those of ``most`` tiles are scaled down to about that many. A newline ends each
row; the whole image, squeezed into one tile, goes before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sensorium.models.media.pixels import resize

Pinpoints = tuple[tuple[int, int], ...]
"""Heights and widths."""
_SLACK = 1.1
CANVAS_PIXELS = 1 << 22
MAX_SQUARE = 8192
"""Longest edge that is padded to a square as it is; longer images are first shrunk to it."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Place of an image in its grid.

    ``tile_rows`` and ``tile_columns`` in tiles; the kept features, from ``top`` and ``left``, in
    features.
    """

    tile_rows: int
    tile_columns: int
    top: int
    left: int
    height: int
    width: int
    scaled: tuple[int, int] | None
    """Height and width that the kept features are scaled down to; None when they stay."""

    @property
    def rows_and_columns(self) -> tuple[int, int]:
        """Rows and columns of features that become embeddings, without newlines."""
        return self.scaled or (self.height, self.width)

    @property
    def num_tiles(self) -> int:
        """Number of tiles of the grid."""
        return self.tile_rows * self.tile_columns


@dataclass(frozen=True, slots=True)
class Grids:
    """Grids of a model. ``tile``: edge of a tile in pixels; ``side``: in features."""

    tile: int
    side: int
    pinpoints: Pinpoints
    most: int

    @property
    def num_base(self) -> int:
        """Number of features of one tile."""
        return self.side**2

    @property
    def num_several(self) -> int:
        """Number of embeddings of an image among several: one tile and a newline."""
        return self.num_base + 1

    @property
    def pooled_side(self) -> int:
        """Edge of a video's frame in embeddings."""
        return -(-self.side // 2)

    def pinpoint(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the smallest grid that keeps most pixels of an image."""

        def kept_and_waste(grid: tuple[int, int]) -> tuple[int, int]:
            scale = min(grid[1] / width, grid[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - grid[0] * grid[1]

        return max(self.pinpoints, key=kept_and_waste)

    def layout(self, height: int, width: int) -> Layout:
        """Return the place of an image of this size in its grid."""
        tall, wide = self.pinpoint(height, width)
        tile_rows, tile_columns = tall // self.tile, wide // self.tile
        rows, columns = tile_rows * self.side, tile_columns * self.side
        top = left = 0
        if width / height > columns / rows:
            top = (rows - int(round(height * (columns / width), 7))) // 2
        else:
            left = (columns - int(round(width * (rows / height), 7))) // 2
        rows, columns = rows - 2 * top, columns - 2 * left
        ratio = math.sqrt(rows * columns / (self.most * self.num_base))
        scaled = None
        if ratio > _SLACK:
            scaled = max(1, int(rows // ratio)), max(1, int(columns // ratio))
        return Layout(tile_rows, tile_columns, top, left, rows, columns, scaled)

    def num_embeds(self, height: int, width: int) -> int:
        """Return the number of embeddings of an image of this size that is alone in its prompt."""
        rows, columns = self.layout(height, width).rows_and_columns
        return self.num_base + rows * (columns + 1)

    def cut(self, image: np.ndarray, resample: int) -> np.ndarray:
        """Cut (H, W, 3) uint8 into (1 + tiles, tile, tile, 3) uint8.

        The whole image, then its grid row by row.
        """
        height, width = image.shape[:2]
        tall, wide = self.pinpoint(height, width)
        rows, columns = _fitted(height, width, tall, wide)
        canvas = np.zeros((tall, wide, 3), np.uint8)
        top, left = (tall - rows) // 2, (wide - columns) // 2
        canvas[top : top + rows, left : left + columns] = resize(image, rows, columns, resample)
        size = self.tile
        grid = canvas.reshape(tall // size, size, wide // size, size, 3).swapaxes(1, 2)
        found = np.empty((1 + grid.shape[0] * grid.shape[1], size, size, 3), np.uint8)
        found[0] = resize(image, size, size, resample)
        found[1:] = grid.reshape(-1, size, size, 3)
        return found


def _fitted(height: int, width: int, tall: int, wide: int) -> tuple[int, int]:
    """Return the largest size within ``tall`` x ``wide`` of the image's aspect ratio."""
    if wide / width < tall / height:
        return min(math.ceil(height * (wide / width)), tall), wide
    return tall, min(math.ceil(width * (tall / height)), wide)


def pad_and_resize(
    image: np.ndarray, size: int, background: tuple[int, int, int], resample: int
) -> np.ndarray:
    """Pad (H, W, 3) uint8 to a square with the image centred, and resize it to (size, size, 3).

    ``background``: the colour of the padding. The result equals doing just that: Pillow resizes
    rows first, each by itself, then columns, so that neither the square nor its empty rows need to
    be made. Images with an edge above 8192 are shrunk to that first.
    """
    image = _shrunk(image, resample)
    height, width = image.shape[:2]
    edge = max(height, width)
    canvas = np.empty((edge, size, 3), np.uint8)
    canvas[:] = background
    top, left = (edge - height) // 2, (edge - width) // 2
    num_rows = max(1, CANVAS_PIXELS // edge)
    for start in range(0, height, num_rows):
        part = image[start : start + num_rows]
        strip = np.empty((len(part), edge, 3), np.uint8)
        strip[:] = background
        strip[:, left : left + width] = part
        first = top + start
        canvas[first : first + len(part)] = resize(strip, len(part), size, resample)
    return resize(canvas, size, size, resample)


def _shrunk(image: np.ndarray, resample: int) -> np.ndarray:
    height, width = image.shape[:2]
    scale = MAX_SQUARE / max(height, width)
    if scale >= 1:
        return image
    tall, wide = max(1, round(height * scale)), max(1, round(width * scale))
    return resize(image, tall, wide, resample)
