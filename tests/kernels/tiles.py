"""Matrix tiles for tests: which units there are, and the manual's operations in plain Python."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from sensorium.kernels.cpu import amx
from sensorium.kernels.cpu.amx_emulation import EMULATION
from sensorium.kernels.cpu.linear import levels

needs_emulation = pytest.mark.skipif(
    not (levels.is_x86() and levels.has("fma")),
    reason="the emulation of tiles needs an x86 CPU with fused multiply-adds",
)
UNITS = [
    pytest.param(EMULATION, id="emulated", marks=needs_emulation),
    pytest.param(
        amx.INSTRUCTIONS,
        id="instructions",
        marks=pytest.mark.skipif(not amx.available(), reason="this CPU has no matrix tiles (AMX)"),
    ),
]


def float_of(bf16: int) -> float:
    """Return the number of bf16's bits; denormal ones are zero."""
    number = np.array([int(bf16) << 16], np.uint32).view(np.float32)[0].item()
    return math.copysign(0.0, number) if abs(number) < 2.0**-126 else number


def rounded(exact: Fraction, sign: float) -> float:
    """Round to 24 bits, nearest even, and flush what is below 2^-126; ``sign`` is that of zero."""
    if exact == 0:
        return math.copysign(0.0, sign)
    exponent = math.floor(math.log2(abs(exact)))
    while abs(exact) < Fraction(2) ** exponent:
        exponent -= 1
    while abs(exact) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    unit = Fraction(2) ** (exponent - 23)
    nearest = round(exact / unit) * unit  # Python rounds ties of fractions to even
    if abs(nearest) < Fraction(2) ** -126:
        return math.copysign(0.0, exact)
    return float(nearest)


def fma(a: float, b: float, c: float) -> float:
    """Compute a * b + c with one rounding, for finite numbers."""
    product = Fraction(a) * Fraction(b)
    sign = math.copysign(1.0, a) * math.copysign(1.0, b)
    zero = 1.0 if sign > 0 or math.copysign(1.0, c) > 0 else -1.0
    return rounded(product + Fraction(c), zero)


def tdpbf16ps(c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return C += A B as the manual writes TDPBF16PS: c (M, N) float32; a, b bits of bf16.

    a: (M, 2 K), b: (K, 2 N).
    """
    result = c.copy()
    for m in range(c.shape[0]):
        temp = [0.0] * (2 * c.shape[1])
        for k in range(b.shape[0]):
            for n in range(c.shape[1]):
                for i in range(2):
                    x, y = float_of(a[m, 2 * k + i]), float_of(b[k, 2 * n + i])
                    temp[2 * n + i] = fma(x, y, temp[2 * n + i])
        for n in range(c.shape[1]):
            both = fma(1.0, temp[2 * n], temp[2 * n + 1])
            result[m, n] = fma(1.0, flushed(c[m, n]), both)
    return result


def flushed(number: float) -> float:
    return math.copysign(0.0, number) if abs(number) < 2.0**-126 else float(number)
