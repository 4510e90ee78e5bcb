"""Limits of a CPU for products of linear layers: reading, and multiply-adds by instruction.

    python -m benchmarks.roofline [--threads N ...] [--seconds N] [--gigabytes N ...] [--weights N ...] [--output FILE]

Reading is the best of several passes over more memory than the caches hold, in huge pages where the
system has them. The rates are those of loops in which twelve independent sums wait for nothing but
the units: ``fma`` (float32), ``madd`` (pairs of 16-bit integers by ``vpmaddwd``, added to 32 bits),
``maddubs`` (bytes by ``vpmaddubsw``, added in 16 bits) and ``dpbusd`` (four bytes, where the CPU has
VNNI). A decoder reads all its weights for each token of one sequence, and multiplies each of them
once for each token of a prompt; so these are the most tokens a second that any engine can reach.

``NUMBA_CPU_NAME`` and ``NUMBA_CPU_FEATURES`` restrict the instructions as they do for the engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import llvmlite.ir as ir
import torch
from numba import types
from numba.core import cgutils

from benchmarks.harness import Report, flag, settings_from_flags
from sensorium.kernels.cpu import huge_pages
from sensorium.kernels.cpu.launch import CFunc, Launcher, find_openmp, pack
from sensorium.kernels.cpu.linear import levels
from sensorium.kernels.cpu.numeric import (
    WIDTH,
    f32,
    fetch_add,
    intrinsic,
    load16,
    pointer,
    shifted,
    splat,
    store16,
)

SUMS = 12
"""Independent sums of a loop."""
SUM_BYTES = SUMS * 64
"""Bytes of a thread's sums, in the widest vectors."""
TASK_FLOATS = 64 * 1024
READ_BYTES = 512 * 1024 * 1024
TURNS = 1_000_000

_I64 = ir.IntType(64)


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured."""

    threads: tuple[int, ...] = flag((1, 2), "numbers of threads")
    seconds: float = flag(2.0, "seconds for each measurement", quick=0.1)
    gigabytes: tuple[float, ...] = flag(
        (), "gigabytes that a token reads, for a bound of tokens a second", type=float
    )
    weights: tuple[float, ...] = flag(
        (),
        "billions of weights that a token of a prompt is multiplied with, for a bound",
        type=float,
    )


@dataclass(frozen=True)
class Operation:
    """One step of a sum."""

    lanes: Callable[[int], ir.VectorType]
    """Type of the operands for vectors of so many bits."""
    emit: Callable[[ir.IRBuilder, ir.Value, ir.Value, ir.Value], ir.Value]
    """Return the next sum for a sum and two operands; each has the type of the operands."""
    products_per_byte: float
    """Multiply-adds per byte of a vector."""


def _call(builder: ir.IRBuilder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def _fma(builder: ir.IRBuilder, total: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    return _call(builder, f"llvm.fma.v{total.type.count}f32", total.type, a, b, total)


def _madd(builder: ir.IRBuilder, total: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    words = ir.VectorType(ir.IntType(32), a.type.count // 2)
    name = "llvm.x86.avx2.pmadd.wd" if a.type.count == 16 else "llvm.x86.avx512.pmaddw.d.512"
    products = _call(builder, name, words, a, b)
    return builder.bitcast(builder.add(builder.bitcast(total, words), products), total.type)


def _maddubs(builder: ir.IRBuilder, total: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    shorts = ir.VectorType(ir.IntType(16), a.type.count // 2)
    wide = a.type.count == 64
    name = "llvm.x86.avx512.pmaddubs.w.512" if wide else "llvm.x86.avx2.pmadd.ub.sw"
    products = _call(builder, name, shorts, a, b)
    return builder.bitcast(builder.add(builder.bitcast(total, shorts), products), total.type)


def _dpbusd(builder: ir.IRBuilder, total: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    words = ir.VectorType(ir.IntType(32), a.type.count // 4)
    name = f"llvm.x86.avx512.vpdpbusd.{8 * a.type.count}"
    args = [builder.bitcast(value, words) for value in (total, a, b)]
    return builder.bitcast(_call(builder, name, words, *args), total.type)


def _vectors(element: ir.Type, size: int) -> Callable[[int], ir.VectorType]:
    return lambda bits: ir.VectorType(element, bits // size)


OPERATIONS = {
    "fma": Operation(_vectors(ir.FloatType(), 32), _fma, 1 / 4),
    "madd": Operation(_vectors(ir.IntType(16), 16), _madd, 1 / 2),
    "maddubs": Operation(_vectors(ir.IntType(8), 8), _maddubs, 1),
    "dpbusd": Operation(_vectors(ir.IntType(8), 8), _dpbusd, 1),
}


def _loop(operation: Operation, bits: int) -> Any:
    """Return the intrinsic that runs an operation ``turns`` times on each sum."""

    @intrinsic
    def run(typingctx: Any, turns: Any, place: Any) -> Any:
        def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
            kind = operation.lanes(bits)
            memory = builder.bitcast(args[1], kind.as_pointer())
            start = builder.load(memory, align=1)
            slots = [cgutils.alloca_once_value(builder, start) for _ in range(SUMS)]
            other = cgutils.alloca_once_value(builder, start)
            # Behind code that LLVM cannot look into, operands are new ones in each step.
            hidden = ir.FunctionType(kind, [kind])
            with cgutils.for_range(builder, args[0]):
                for slot in slots:
                    own = builder.asm(hidden, "", "=x,0", [builder.load(other)], side_effect=True)
                    builder.store(own, other)
                    builder.store(operation.emit(builder, builder.load(slot), own, start), slot)
            # Each sum to a place of its own: LLVM leaves out sums that nobody reads.
            for number, slot in enumerate(slots):
                place = builder.gep(memory, [_I64(number)])
                builder.store(builder.load(slot), place, align=1)
            return context.get_dummy_value()

        return types.void(types.int64, place), codegen

    return run


def _compiled(function: Callable[[Any], None]) -> Launcher:
    signature = ((types.CPointer(types.int64),), types.void)
    options = {"error_model": "numpy", "boundscheck": False, "nopython": True, "nogil": True}
    compiled = CFunc(function, signature, locals={}, options=options)
    compiled.compile()
    _KEPT.append(compiled)
    return Launcher(compiled.address, find_openmp())


_KEPT: list[Any] = []


def build_read() -> Callable[[Any], None]:
    """Build the kernel that reads memory. args: address of floats, floats of a task, results."""

    def read(args: Any) -> None:
        data, size = pointer(args[3], types.float32), args[4]
        zero = splat(f32(0.0))
        a, b, c, d = zero, zero, zero, zero
        while True:
            task = fetch_add(args, 0, 1)
            if task >= args[2]:
                break
            own = shifted(data, task * size)
            for i in range(0, size, 4 * WIDTH):
                a = a + load16(own, i)
                b = b + load16(own, i + WIDTH)
                c = c + load16(own, i + 2 * WIDTH)
                d = d + load16(own, i + 3 * WIDTH)
        out = pointer(args[5], types.float32)
        store16(out, fetch_add(args, 1, 1) * WIDTH, a + b + (c + d))

    return read


def build_rate(operation: Operation, bits: int) -> Callable[[Any], None]:
    """Build the kernel of an operation. args: turns, ``SUM_BYTES`` for each thread."""
    run = _loop(operation, bits)

    def rate(args: Any) -> None:
        slot = fetch_add(args, 1, 1)
        run(args[3], shifted(pointer(args[4], types.uint8), slot * SUM_BYTES))

    return rate


def best(run: Callable[[], None], seconds: float) -> float:
    """Return the least time of runs for so many seconds, at least three."""
    times, end = [], time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def reading(threads: int, seconds: float) -> float:
    """Return the GB/s that some threads read."""
    data = huge_pages.zeros((READ_BYTES // 4,), torch.float32)
    data.zero_()
    out = torch.zeros(threads * WIDTH)
    kernel = _compiled(build_read())
    tasks = data.numel() // TASK_FLOATS
    launch = kernel.on(threads, 1 << 40)
    values = (data.data_ptr(), TASK_FLOATS, out.data_ptr())
    return data.nbytes / best(lambda: launch(pack(tasks, *values)), seconds) / 1e9


def rate(operation: Operation, threads: int, seconds: float) -> float:
    """Return the billions of multiply-adds a second that some threads run."""
    bits = 512 if levels.has_wide_registers() else 256
    memory = torch.zeros(threads * SUM_BYTES, dtype=torch.uint8)
    launch = _compiled(build_rate(operation, bits)).on(threads, 1 << 40)
    took = best(lambda: launch(pack(threads, TURNS, memory.data_ptr())), seconds)
    return threads * TURNS * SUMS * bits / 8 * operation.products_per_byte / took / 1e9


def main() -> int:
    """Measure, print and write."""
    settings, output = settings_from_flags(Settings, __doc__)
    shown = {name: getattr(settings, name) for name in settings.__slots__}
    report = Report("roofline", shown, output)
    figures: dict[str, Any] = {}
    for threads in settings.threads:
        torch.set_num_threads(threads)
        own: dict[str, float] = {"read GB/s": round(reading(threads, settings.seconds), 1)}
        for name, operation in OPERATIONS.items():
            if name != "dpbusd" or levels.has("avx512vnni"):
                own[f"{name} GMAC/s"] = round(rate(operation, threads, settings.seconds), 1)
        for size in settings.gigabytes:
            own[f"most tokens/s at {size:g} GB a token"] = round(own["read GB/s"] / size, 1)
        for count in settings.weights:
            for name in OPERATIONS:
                if f"{name} GMAC/s" in own:
                    key = f"most tokens/s of a prompt, {count:g} billion weights, {name}"
                    own[key] = round(own[f"{name} GMAC/s"] / count, 1)
        figures[f"{threads} threads"] = own
        print(threads, own, flush=True)
        report.write(level=levels.level(), limits=figures)
    print(report.path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
