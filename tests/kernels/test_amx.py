"""Matrix tiles: their emulation against the manual, and the machine code of tile kernels."""

from __future__ import annotations

import faulthandler
import hashlib
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.ir as ir
import numpy as np
import pytest
from numba import types

from sensorium.kernels.cpu import amx
from sensorium.kernels.cpu.amx_emulation import EMULATION
from sensorium.kernels.cpu.launch import Args, Launcher, compile_kernel
from sensorium.kernels.cpu.linear import levels
from sensorium.kernels.cpu.numeric import intrinsic, pointer
from tests.kernels.tiles import UNITS, needs_emulation, tdpbf16ps

ROW = 80
"""Bytes between rows in memory: more than a tile has."""
C, A, B = 3, 1, 6


def shapes_of(rows: int, columns: int, words: int) -> bytes:
    """Return a configuration for a product of (rows, words) and (words, columns), in 32 bits."""
    shapes = [(0, 0)] * amx.NUM_TILES
    shapes[C], shapes[A], shapes[B] = (rows, 4 * columns), (rows, 4 * words), (words, 4 * columns)
    return amx.configuration(shapes)


def kernel_of(unit: amx.Unit, shapes: bytes, name: str, emit: Callable[..., None]) -> Launcher:
    """Compile a kernel: configure, ``emit(builder, state, *three addresses)``, release."""
    tiles = amx.operations(unit, shapes)
    own_state, configure, release = tiles.state, tiles.configure, tiles.release

    def body(typingctx: Any, state: Any, c: Any, a: Any, b: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            emit(builder, *args)
            return context.get_dummy_value()

        return types.void(state, c, a, b), codegen

    emitted = intrinsic(body)

    def run(args: Any) -> None:
        state = own_state()
        configure(state)
        emitted(
            state,
            pointer(args[3], types.uint8),
            pointer(args[4], types.uint8),
            pointer(args[5], types.uint8),
        )
        release(state)

    digest = hashlib.sha256(shapes).hexdigest()[:8]
    return compile_kernel(run, f"{name}_{digest}_{unit.name}")


def product_kernel(unit: amx.Unit, kind: str, shape: tuple[int, int, int]) -> Launcher:
    stride = ir.IntType(64)(ROW)

    def emit(builder: ir.IRBuilder, state: ir.Value, *places: ir.Value) -> None:
        for tile, place in zip((C, A, B), places, strict=True):
            unit.load(builder, state, tile, place, stride)
        unit.dot(builder, state, kind, C, A, B)
        unit.store(builder, state, C, places[0], stride)

    return kernel_of(unit, shapes_of(*shape), kind, emit)


def rows_of(values: np.ndarray) -> np.ndarray:
    """Return rows of ROW bytes that begin with the given ones, filled up with 0xAB."""
    memory = np.full((16, ROW), 0xAB, np.uint8)
    raw = np.ascontiguousarray(values).view(np.uint8)
    memory[: raw.shape[0], : raw.shape[1]] = raw
    return memory


def run(kernel: Launcher, *arrays: np.ndarray) -> None:
    kernel.serial(Args(0, 0, 1, *(array.ctypes.data for array in arrays)))


SHAPES = [(16, 16, 16), (5, 3, 7), (1, 16, 1)]


def random_bf16(generator: np.random.Generator, shape: Sequence[int], exponents: Any) -> np.ndarray:
    """Return bits of bf16 with exponents (biased by 127) in a range."""
    sign = generator.integers(0, 2, shape) << 15
    exponent = generator.integers(*exponents, shape) << 7
    return (sign | exponent | generator.integers(0, 128, shape)).astype(np.uint16)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "exponents",
    [(120, 132), (0, 70), (55, 75), (150, 180)],
    ids=["usual", "zeros", "tiny", "large"],
)
def test_products_of_bf16_are_those_of_the_manual(
    unit: amx.Unit, shape: tuple[int, int, int], exponents: tuple[int, int]
) -> None:
    rows, columns, words = shape
    generator = np.random.default_rng(words)
    a = random_bf16(generator, (rows, 2 * words), exponents)
    b = random_bf16(generator, (words, 2 * columns), exponents)
    high = max(1, 2 * exponents[0] - 130), 2 * exponents[1] - 120
    c_bits = random_bf16(generator, (rows, columns), high).astype(np.uint32) << 16
    c = (c_bits | generator.integers(0, 1 << 16, c_bits.shape).astype(np.uint32)).view(np.float32)
    memory = rows_of(c)
    run(product_kernel(unit, "tdpbf16ps", shape), memory, rows_of(a), rows_of(b))
    expected = rows_of(tdpbf16ps(c, a, b).astype(np.float32))
    assert np.array_equal(memory, expected)


@pytest.mark.parametrize("unit", UNITS)
def test_infinity_and_not_a_number_stay_in_their_place(unit: amx.Unit) -> None:
    shape = (16, 16, 16)
    a, b = np.full((16, 32), 0x3F80, np.uint16), np.full((16, 32), 0x3F80, np.uint16)
    a[3, 5], b[7, 2 * 9] = 0x7FC0, 0x7F80
    memory = rows_of(np.zeros((16, 16), np.float32))
    run(product_kernel(unit, "tdpbf16ps", shape), memory, rows_of(a), rows_of(b))
    found = memory[:, :64].copy().view(np.float32)
    expected = np.full((16, 16), 32.0)
    expected[:, 9], expected[3] = np.inf, np.nan
    assert np.array_equal(found, expected, equal_nan=True)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        *(("tdpbsud", shape) for shape in SHAPES),
        *((kind, SHAPES[0]) for kind in ("tdpbssd", "tdpbusd", "tdpbuud")),
    ],
)
def test_products_of_bytes(unit: amx.Unit, kind: str, shape: tuple[int, int, int]) -> None:
    if unit is amx.INSTRUCTIONS and not levels.has("amx-int8"):
        pytest.skip("this CPU's tiles multiply no bytes")
    rows, columns, words = shape
    generator = np.random.default_rng(words)
    a = generator.integers(0, 256, (rows, 4 * words)).astype(np.uint8)
    b = generator.integers(0, 256, (words, 4 * columns)).astype(np.uint8)
    c = generator.integers(-(2**31), 2**31, (rows, columns)).astype(np.int32)
    wide_a = a.view(np.int8 if kind[4] == "s" else np.uint8).astype(np.int64)
    wide_b = b.view(np.int8 if kind[5] == "s" else np.uint8).astype(np.int64)
    steps = wide_b.reshape(words, columns, 4).transpose(0, 2, 1).reshape(4 * words, columns)
    memory = rows_of(c)
    run(product_kernel(unit, kind, shape), memory, rows_of(a), rows_of(b))
    assert np.array_equal(memory, rows_of((c + wide_a @ steps).astype(np.int32)))


@pytest.mark.parametrize("unit", UNITS)
def test_tiles_of_zeros(unit: amx.Unit) -> None:
    stride = ir.IntType(64)(ROW)

    def emit(builder: ir.IRBuilder, state: ir.Value, *places: ir.Value) -> None:
        unit.load(builder, state, C, places[0], stride)
        unit.zero(builder, state, C)
        unit.store(builder, state, C, places[0], stride)

    memory = rows_of(np.ones((16, 64), np.uint8))
    run(kernel_of(unit, shapes_of(5, 3, 7), "zero", emit), memory, memory, memory)
    expected = rows_of(np.ones((16, 64), np.uint8))
    expected[:5, :12] = 0
    assert np.array_equal(memory, expected)


def wrong_uses() -> dict[str, Launcher]:
    """Kernels that the CPU would end with an invalid-opcode fault."""
    stride = ir.IntType(64)(ROW)

    def released(builder: ir.IRBuilder, state: ir.Value, *places: ir.Value) -> None:
        EMULATION.release(builder, state)
        EMULATION.zero(builder, state, C)

    def unconfigured(builder: ir.IRBuilder, state: ir.Value, *places: ir.Value) -> None:
        EMULATION.load(builder, state, 0, places[0], stride)

    def unequal(builder: ir.IRBuilder, state: ir.Value, *places: ir.Value) -> None:
        EMULATION.dot(builder, state, "tdpbf16ps", A, C, B)

    def nothing(builder: ir.IRBuilder, state: ir.Value, *places: ir.Value) -> None:
        pass

    emits = {"released": released, "unconfigured": unconfigured, "unequal": unequal}
    kernels = {
        name: kernel_of(EMULATION, shapes_of(5, 3, 7), name, emit) for name, emit in emits.items()
    }
    tall = shapes_of(17, 3, 7)
    return kernels | {"tall": kernel_of(EMULATION, tall, "tall", nothing)}


@needs_emulation
@pytest.mark.skipif(not hasattr(os, "fork"), reason="the process that ends is a fork")
def test_wrong_use_ends_the_process_as_on_the_cpu() -> None:
    memory = rows_of(np.zeros((16, 64), np.uint8))
    for name, kernel in wrong_uses().items():
        child = os.fork()
        if child == 0:
            try:
                faulthandler.disable()
                signal.signal(signal.SIGILL, signal.SIG_DFL)
                run(kernel, memory, memory, memory)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), name
        assert os.WTERMSIG(status) == signal.SIGILL, name


def test_a_product_needs_three_tiles() -> None:
    builder = ir.IRBuilder(
        ir.Function(ir.Module(), ir.FunctionType(ir.VoidType(), []), "f").append_basic_block()
    )
    with pytest.raises(ValueError, match="three different"):
        EMULATION.dot(builder, ir.Constant(ir.IntType(8).as_pointer(), None), "tdpbssd", 1, 1, 2)


def test_the_configuration_is_that_of_the_manual() -> None:
    tiles = amx.full_tiles()
    assert len(tiles) == 64
    assert (tiles[0], tiles[1]) == (1, 0)
    widths = [int.from_bytes(tiles[i : i + 2], "little") for i in range(16, 32, 2)]
    assert widths == [64] * 8
    assert list(tiles[48:56]) == [16] * 8
    assert not any(tiles[2:16] + tiles[32:48] + tiles[56:])
