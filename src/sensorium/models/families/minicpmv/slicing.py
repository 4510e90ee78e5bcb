"""Views of an image: a small one of the whole, and for large images the cells of a grid.

A view has about ``scale`` x ``scale`` pixels whatever its shape, in whole patches. 1920 x 1080
pixels, for scale 448 and patches of 14, become a source view of 602 x 336 and 4 x 2 cells of 420 x
476 (width x height).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from sensorium.models.media.pixels import BICUBIC, resize

Size = tuple[int, int]
"""Width and height, in pixels or in cells."""


@dataclass(frozen=True, slots=True)
class Slicing:
    """Slicing options: patches of ``patch`` pixels, views near ``scale`` pixels squared."""

    scale: int
    patch: int

    def layout(self, width: int, height: int, most: int) -> Layout:
        """Return the views of an image of this size, with at most ``most`` cells."""
        wanted = min(math.ceil(width * height / self.scale**2), most)
        if wanted <= 1:
            return Layout(self.fit(width, height, enlarge=True), None, (0, 0))
        columns, rows = grid = best_grid(width, height, wanted, most)
        wide, tall = divisible(width, columns) / columns, divisible(height, rows) / rows
        source = self.fit(width, height, enlarge=False)
        return Layout(source, grid, self.fit(wide, tall, enlarge=True))

    def fit(self, width: float, height: float, *, enlarge: bool) -> Size:
        """Return the size of a view of about the same shape, in whole patches.

        Smaller ones are enlarged or left as they are.
        """
        wide, tall = width, height
        if enlarge or width * height > self.scale**2:
            aspect = width / height
            tall = int(self.scale / math.sqrt(aspect))
            wide = int(tall * aspect)
        return self._patches(wide) * self.patch, self._patches(tall) * self.patch

    def _patches(self, length: float) -> int:
        return max(round(length / self.patch), 1)

    def views(self, image: np.ndarray, layout: Layout) -> list[np.ndarray]:
        """Cut an image (H, W, 3) uint8 into views (h, w, 3).

        The source comes first, then the cells row by row.
        """
        width, height = layout.source
        found = [resize(image, height, width, BICUBIC)]
        if layout.grid is None:
            return found
        (columns, rows), (wide, tall) = layout.grid, layout.cell
        canvas = resize(image, tall * rows, wide * columns, BICUBIC)
        return found + [
            canvas[row * tall : (row + 1) * tall, column * wide : (column + 1) * wide]
            for row in range(rows)
            for column in range(columns)
        ]


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of an image's views in pixels.

    ``source``, and ``grid`` (columns, rows) cells of ``cell``, or no grid.
    """

    source: Size
    grid: Size | None
    cell: Size

    @property
    def num_views(self) -> int:
        """Number of views: the source and the cells."""
        return 1 if self.grid is None else 1 + self.grid[0] * self.grid[1]


def best_grid(width: int, height: int, wanted: int, most: int) -> Size:
    """Return columns and rows of about ``wanted`` cells whose shape is nearest to the image's.

    The first of equals is returned.
    """
    best, least = (1, 1), math.inf
    for number in (wanted - 1, wanted, wanted + 1):
        if number == 1 or number > most:
            continue
        for columns in range(1, number + 1):
            rows, rest = divmod(number, columns)
            error = (
                abs(math.log(width / height) - math.log(columns / rows)) if not rest else math.inf
            )
            if error < least:
                best, least = (columns, rows), error
    return best


def divisible(length: int, parts: int) -> int:
    """Return the nearest multiple of ``parts``, at least ``parts``."""
    return max(round(length / parts) * parts, parts)


def write_patches(view: np.ndarray, size: int, out: np.ndarray) -> None:
    """Write the patches of a view (h, w, 3), row by row, into ``out``.

    out: (h * w / size^2, 3 * size * size).
    """
    rows, columns = view.shape[0] // size, view.shape[1] // size
    cells = view.reshape(rows, size, columns, size, 3).transpose(0, 2, 4, 1, 3)
    out.reshape(rows, columns, 3, size, size)[...] = cells
