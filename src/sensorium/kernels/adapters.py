"""Low-rank adapters of linear layers (Hu et al., LoRA, 2021), for several adapters in one batch.

An adapter adds ``scale * (x A^T) B^T`` to the result of a layer, for the rows that it belongs to,
and may multiply and shift each output of the sum, as DoRA (Liu et al., 2024) does. A place in a
model that adapters may take is a *lane*, numbered from 0. Which lane each row of the present step
has is in a ``RowAdapters``, which all adapted layers of a model share: runs of consecutive rows
with one lane. Rows outside of all runs have none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

TILE_ROWS = 4
"""Most rows of one lane that a kernel takes together."""
FIXED_ROWS = 64
"""Rows up to which the table of tiles of a whole step lies at the same place in every step."""
_FIELDS = 3


class Run(NamedTuple):
    """Rows ``start`` to ``stop - 1``, all of one lane."""

    lane: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class LowRank:
    """The part of an adapter for some outputs of a layer.

    a: (r, K). b: (N, r), for the outputs ``first`` to ``first + N - 1``. Both of the dtype of the
    layer's activations. affine: (2, N) float32 or None: a factor and a shift of each output, which
    the sum of the layer's result and of what the adapter adds is multiplied by and shifted by.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    first: int = 0
    affine: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.a.dim() != 2 or self.b.dim() != 2 or self.a.shape[0] != self.b.shape[1]:
            raise ValueError(
                f"an adapter's parts are {tuple(self.a.shape)} and {tuple(self.b.shape)}"
            )


@dataclass(frozen=True, slots=True)
class PackedPart:
    """A part of an adapter as a layer reads it: its tensors in the layout of its product.

    It has ``num_outputs`` outputs, from ``first`` on.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    rank: int
    first: int
    num_outputs: int
    affine: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        affine = 0 if self.affine is None else self.affine.nbytes
        return self.a.nbytes + self.b.nbytes + affine


class Tiles(NamedTuple):
    """Tiles of at most ``TILE_ROWS`` rows of one lane, as kernels read them.

    ``table``: int64, their number, then (lane, first row, number of rows) of each.
    """

    table: np.ndarray
    num_tiles: int


class RowAdapters:
    """Lanes of the rows that layers compute now. One for a model, used by one thread."""

    def __init__(self) -> None:
        self._runs: tuple[Run, ...] = ()
        self._everywhere: int | None = None
        self._step = (0, 0)
        self._span = self._step
        self._tiles: dict[tuple[int, int], Tiles] = {}
        self._fixed = np.zeros(1 + _FIELDS * FIXED_ROWS, np.int64)

    @property
    def active(self) -> bool:
        """True while at least one row has an adapter."""
        return self._everywhere is not None or bool(self._runs)

    @property
    def lane_of_all(self) -> int | None:
        """Lane that all rows have, however many they are; None where they are not given it so."""
        return self._everywhere

    @contextmanager
    def using(self, runs: Sequence[Run], num_rows: int) -> Iterator[None]:
        """Give rows of ``num_rows`` their lanes within the block.

        ``runs`` are ascending and disjoint.
        """
        before = self._runs, self._everywhere, self._step, self._span, self._tiles
        self._runs, self._everywhere = tuple(runs), None
        self._step = self._span = (0, num_rows)
        self._tiles = {}
        if runs and num_rows <= FIXED_ROWS:
            self.tiles(num_rows)  # a captured step reads them without asking
        try:
            yield
        finally:
            self._runs, self._everywhere, self._step, self._span, self._tiles = before

    @contextmanager
    def everywhere(self, lane: int | None) -> Iterator[None]:
        """Give all rows, however many, one lane within the block; None for no adapter."""
        before = self._runs, self._everywhere, self._span, self._tiles
        self._runs, self._everywhere, self._tiles = (), lane, {}
        try:
            yield
        finally:
            self._runs, self._everywhere, self._span, self._tiles = before

    @contextmanager
    def narrowed(self, start: int, stop: int) -> Iterator[None]:
        """Let layers compute the rows ``start`` to ``stop - 1`` alone within the block."""
        before = self._span
        self._span = (before[0] + start, before[0] + stop)
        try:
            yield
        finally:
            self._span = before

    def runs(self, num_rows: int) -> list[Run]:
        """Return the runs of the rows that are computed, counted from the first of them.

        Raises ValueError when these are not ``num_rows``.
        """
        if self._everywhere is not None:
            return [Run(self._everywhere, 0, num_rows)]
        first, end = self._rows(num_rows)
        return [
            Run(run.lane, max(run.start, first) - first, min(run.stop, end) - first)
            for run in self._runs
            if run.start < end and run.stop > first
        ]

    def tiles(self, num_rows: int) -> Tiles:
        """Return the tiles of ``num_rows`` rows, made once for all layers.

        Those of a whole step of few rows are at one place always, so that a captured step finds
        there the tiles of the step that is replayed.
        """
        key = (0, num_rows) if self._everywhere is not None else self._rows(num_rows)
        found = self._tiles.get(key)
        if found is None:
            whole = self._everywhere is None and key == self._step and num_rows <= FIXED_ROWS
            found = self._made(self.runs(num_rows), self._fixed if whole else None)
            self._tiles[key] = found
        return found

    def _rows(self, num_rows: int) -> tuple[int, int]:
        first, end = self._span
        if end - first != num_rows:
            raise ValueError(f"{num_rows} rows, but lanes of {end - first}")
        return self._span

    def _made(self, runs: Sequence[Run], into: np.ndarray | None) -> Tiles:
        if into is not None:
            tiles = [tile for run in runs for tile in _few_tiles(run)]
            into[0] = len(tiles)
            into[1 : 1 + _FIELDS * len(tiles)] = [value for tile in tiles for value in tile]
            return Tiles(into, len(tiles))
        parts = [np.empty(1, np.int64), *(_many_tiles(run) for run in runs)]
        table = np.concatenate(parts)
        table[0] = len(table) // _FIELDS
        return Tiles(table, int(table[0]))


def _few_tiles(run: Run) -> list[tuple[int, int, int]]:
    rows = range(run.start, run.stop, TILE_ROWS)
    return [(run.lane, row, min(TILE_ROWS, run.stop - row)) for row in rows]


def _many_tiles(run: Run) -> np.ndarray:
    first = np.arange(run.start, run.stop, TILE_ROWS)
    lanes = np.full_like(first, run.lane)
    counts = np.minimum(TILE_ROWS, run.stop - first)
    return np.stack((lanes, first, counts), axis=1).reshape(-1)


class AdaptedProduct(ABC):
    """The adapters of one layer, by lane."""

    def put(self, lane: int, parts: Sequence[LowRank]) -> None:
        """Set the adapter of a lane: parts for disjoint outputs; none where there is none."""
        self.set(lane, [self.pack(part) for part in parts])

    @abstractmethod
    def pack(self, part: LowRank) -> PackedPart:
        """Lay out a part as this layer reads it. Any thread may call it, beside the others.

        Raises ValueError for a part of another layer.
        """

    @abstractmethod
    def set(self, lane: int, parts: Sequence[PackedPart]) -> None:
        """Set the adapter of a lane, of parts that this layer has packed; as ``put`` otherwise."""

    @abstractmethod
    def packed_bytes(self, rank: int, num_outputs: int, is_affine: bool = False) -> int:
        """Return the bytes of a part of this rank, packed, with factors and shifts or without."""

    @abstractmethod
    def add(self, x: torch.Tensor, y: torch.Tensor, rows: RowAdapters) -> None:
        """Add to the results y (T, N) of rows x (T, K) what their adapters add, in place.

        Both are contiguous. A row of the result has the same bits whatever the other rows are.
        """


class PlainAdapted(AdaptedProduct):
    """Adapters in plain torch: the reference, and the way on other devices than CPUs."""

    def __init__(self, num_inputs: int, dtype: torch.dtype, device: torch.device) -> None:
        self._num_inputs, self._dtype, self._device = num_inputs, dtype, device
        self._parts: dict[int, tuple[PackedPart, ...]] = {}

    def pack(self, part: LowRank) -> PackedPart:
        a, b = (x.to(self._device, self._dtype) for x in (part.a, part.b))
        affine = None if part.affine is None else part.affine.to(self._device)
        return PackedPart(a, b, part.scale, a.shape[0], part.first, b.shape[0], affine)

    def set(self, lane: int, parts: Sequence[PackedPart]) -> None:
        self._parts.pop(lane, None)
        if parts:
            self._parts[lane] = tuple(parts)

    def packed_bytes(self, rank: int, num_outputs: int, is_affine: bool = False) -> int:
        numbers = rank * (self._num_inputs + num_outputs)
        return numbers * self._dtype.itemsize + 8 * num_outputs * is_affine

    def add(self, x: torch.Tensor, y: torch.Tensor, rows: RowAdapters) -> None:
        for lane, start, stop in rows.runs(x.shape[0]):
            for part in self._parts.get(lane, ()):
                hidden = x[start:stop].float() @ part.a.float().t()
                added = (hidden @ part.b.float().t()) * part.scale
                own = y[start:stop, part.first : part.first + part.num_outputs]
                result = own.float() + added
                if part.affine is not None:
                    result = result * part.affine[0] + part.affine[1]
                own.copy_(result)
