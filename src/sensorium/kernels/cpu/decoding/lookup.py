"""Look-up of token embeddings in the tables that models have on the CPU.

A table is a plain tensor, or the packed weight of the head that it is tied to: panels of floats, or
panels of int8 with a scale for each row. The rows have the bits of ``PackedWeight.rows``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from numba import types

from sensorium.kernels.cpu.elementwise import launch
from sensorium.kernels.cpu.launch import Launcher, compile_kernel, pack
from sensorium.kernels.cpu.linear.floats import FloatWeight
from sensorium.kernels.cpu.linear.int8 import BIAS, Int8Weight
from sensorium.kernels.cpu.linear.integers import STEP
from sensorium.kernels.cpu.numeric import (
    ELEMENT,
    WIDTH,
    f32,
    fetch_add,
    load,
    load16,
    load_part,
    pointer,
    shifted,
    store,
    store16,
    store_part,
)

LookUp = Callable[[torch.Tensor], torch.Tensor]
"""ids (T,) int64 -> rows (T, K). Ids past the ends give the first or the last row."""


def build_plain(stored: Any, element: Any) -> Callable[[Any], None]:
    """Build the kernel that copies rows of a plain table.

    args: ids, table, out, last id, elements of a row.
    """

    def plain_rows(args: Any) -> None:
        ids, size = pointer(args[3], types.int64), args[7]
        full = size - size % WIDTH
        while True:
            task = fetch_add(args, 0, 1)
            if task >= args[2]:
                break
            row = shifted(pointer(args[4], stored), max(0, min(ids[task], args[6])) * size)
            out = shifted(pointer(args[5], element), task * size)
            for i in range(0, full, WIDTH):
                store16(out, i, load16(row, i))
            if full < size:
                store_part(out, full, load_part(row, full, size - full), size - full)

    return plain_rows


def build_panels(stored: Any, element: Any) -> Callable[[Any], None]:
    """Build the kernel that reads rows out of panels of floats.

    args: ids, table, out, last id, elements of a row, elements of a panel, inputs side by side.
    """

    def panel_rows(args: Any) -> None:
        ids, size, panel, step = pointer(args[3], types.int64), args[7], args[8], args[9]
        while True:
            task = fetch_add(args, 0, 1)
            if task >= args[2]:
                break
            index = max(0, min(ids[task], args[6]))
            place = index // WIDTH * panel + index % WIDTH * step
            row = shifted(pointer(args[4], stored), place)
            out = shifted(pointer(args[5], element), task * size)
            for i in range(size):
                store(out, i, load(row, i // step * (step * WIDTH) + i % step))

    return panel_rows


def build_int8(stored: Any, element: Any) -> Callable[[Any], None]:
    """Build the kernel that reads rows out of panels of int8.

    args: ids, table, out, last id, elements of a row, bytes of a panel, scales of the rows.
    """

    def int8_rows(args: Any) -> None:
        ids, size, panel = pointer(args[3], types.int64), args[7], args[8]
        scales = pointer(args[9], types.float32)
        while True:
            task = fetch_add(args, 0, 1)
            if task >= args[2]:
                break
            index = max(0, min(ids[task], args[6]))
            place = index // WIDTH * panel + index % WIDTH * STEP
            row = shifted(pointer(args[4], stored), place)
            out = shifted(pointer(args[5], element), task * size)
            for i in range(size):
                value = types.int64(row[i // STEP * (STEP * WIDTH) + i % STEP]) - BIAS
                store(out, i, f32(value) * scales[index])

    return int8_rows


@functools.cache
def _kernel(build: Any, stored: torch.dtype, dtype: torch.dtype) -> Launcher:
    names = [str(name).removeprefix("torch.") for name in (stored, dtype)]
    source = types.uint8 if stored == torch.uint8 else ELEMENT[stored]
    return compile_kernel(build(source, ELEMENT[dtype]), "_".join(names))


def bind(table: object, num_ids: int) -> LookUp | None:
    """Return the look-up of the first ``num_ids`` rows of a table; None if there is no kernel."""
    if isinstance(table, FloatWeight):
        panel = table.panels[0].numel()
        step = table.panels.shape[3] if table.panels.dim() == 4 else 1
        kernel = _kernel(build_panels, table.panels.dtype, table.dtype)
        return _bound(kernel, table.panels, table.shape[1], table.dtype, num_ids, (panel, step))
    if isinstance(table, Int8Weight):
        kernel = _kernel(build_int8, torch.uint8, table.dtype)
        layout = (table.packed[0].numel(),)
        own = (table.shape[1], table.dtype, num_ids, layout)
        return _bound(kernel, table.packed, *own, table.scales)
    if isinstance(table, torch.Tensor) and _is_plain(table):
        kernel = _kernel(build_plain, table.dtype, table.dtype)
        return _bound(kernel, table, table.shape[1], table.dtype, num_ids, ())
    return None


def _is_plain(table: torch.Tensor) -> bool:
    return table.is_cpu and table.dtype in ELEMENT and table.is_contiguous() and table.dim() == 2


def _bound(
    kernel: Launcher,
    values: torch.Tensor,
    size: int,
    dtype: torch.dtype,
    num_ids: int,
    layout: tuple[int, ...],
    scales: torch.Tensor | None = None,
) -> LookUp:
    """Return the look-up in a table whose numbers are ``values``, of rows of ``size`` elements.

    layout: the arguments of the kernel from the seventh on, but for the address of the scales.
    """

    def look_up(ids: torch.Tensor) -> torch.Tensor:
        if ids.dtype != torch.int64 or not ids.is_contiguous():
            raise ValueError(f"ids {tuple(ids.shape)} {ids.dtype} to look up")
        num_rows = ids.shape[0]
        out = torch.empty((num_rows, size), dtype=dtype)
        places = (ids.data_ptr(), values.data_ptr(), out.data_ptr())
        last = () if scales is None else (scales.data_ptr(),)
        args = pack(num_rows, *places, num_ids - 1, size, *layout, *last)
        launch(kernel, args, num_rows * size)
        return out

    return look_up
