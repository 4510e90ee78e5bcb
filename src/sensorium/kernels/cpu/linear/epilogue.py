"""Activation functions at the end of a product, on vectors of sixteen float32."""

from __future__ import annotations

from typing import Any

from sensorium.kernels.cpu.numeric import INLINE, exp16, f32, fma, largest, njit, splat

LARGEST = 3.4028234663852886e38
"""Largest finite float32."""
NONE, RELU, GELU, GELU_TANH, QUICK_GELU, SILU = range(6)
CODES: dict[str | None, int] = {
    None: NONE,
    "gelu": GELU,
    "gelu_fast": GELU_TANH,
    "gelu_new": GELU_TANH,
    "gelu_pytorch_tanh": GELU_TANH,
    "gelu_tanh": GELU_TANH,
    "quick_gelu": QUICK_GELU,
    "relu": RELU,
    "silu": SILU,
    "swish": SILU,
}
"""Codes of the activation functions by the keys of ``reference.ACTIVATIONS``."""


@njit(**INLINE)
def _times_sigmoid(x: Any, slope: Any) -> Any:
    """Compute x / (1 + e^-slope)."""
    return x / (splat(f32(1.0)) + exp16(splat(f32(0.0)) - slope))


@njit(**INLINE)
def _gelu(x: Any) -> Any:
    """Compute x (1 + erf(x / sqrt 2)) / 2.

    erf within 1.5e-7: Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 7.1.26.
    """
    zero, one = splat(f32(0.0)), splat(f32(1.0))
    z = largest(x, zero - x) * splat(f32(0.7071067811865476))
    t = one / fma(z, splat(f32(0.3275911)), one)
    p = fma(t, splat(f32(1.061405429)), splat(f32(-1.453152027)))
    p = fma(p, t, splat(f32(1.421413741)))
    p = fma(p, t, splat(f32(-0.284496736)))
    p = fma(p, t, splat(f32(0.254829592)))
    # half of 1 - erf z: what is missing to x on the right of zero, what is there on its left.
    # Infinity keeps its value, as the tail is 0 there: it is taken for the largest number.
    tail = splat(f32(0.5)) * p * t * exp16(zero - z * z)
    size = zero - largest(zero - largest(x, zero - x), splat(f32(-LARGEST)))
    return largest(x, zero) - size * tail


@njit(**INLINE)
def activate(x: Any, code: Any) -> Any:
    """Apply the activation function of a code; NaN stays NaN."""
    if code == NONE:
        return x
    if code == RELU:
        return largest(splat(f32(0.0)), x)
    if code == GELU:
        return _gelu(x)
    x = largest(splat(f32(-1e4)), x)  # below, the exponential is not large enough
    if code == GELU_TANH:
        # (1 + tanh u) / 2 is the logistic function of 2 u
        cubic = fma(x * x, splat(f32(0.044715)), splat(f32(1.0)))
        return _times_sigmoid(x, x * cubic * splat(f32(1.5957691216057308)))
    if code == QUICK_GELU:
        return _times_sigmoid(x, x * splat(f32(1.702)))
    return _times_sigmoid(x, x)
