"""Conversion of floating-point pixel values, in numpy arrays and torch tensors, to bytes.

The published processors take such values as 0 to 255, and so does this module. Only where no value
is above 1 and some lie between 0 and 1 are they taken as 0 to 1. All frames of a video share one
scale: a dark frame is not brightened.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import numpy as np

from sensorium.errors import InvalidRequestError
from sensorium.multimodal.items import is_tensor

WHITE = 255.0


def is_floating(value: Any) -> bool:
    """Return True for an array or a tensor of floating-point numbers."""
    if isinstance(value, np.ndarray):
        return bool(value.dtype.kind == "f")
    return is_tensor(value) and value.is_floating_point()


def scale_of(arrays: Iterable[Any], what: str = "image") -> float:
    """Return the factor that makes 0 to 255 of the values of all floating-point arrays together.

    1 or 255.

    Other members of ``arrays`` are passed over. Raises InvalidRequestError for values outside 0 to
    255 and for NaN; ``what`` names their owner in the message.
    """
    most, some_between = 0.0, False
    for array in arrays:
        if not is_floating(array):
            continue
        low, high = _range(array)
        if not (low >= 0.0 and high <= WHITE):
            hint = "; undo the normalisation first" if low < 0.0 else ""
            raise InvalidRequestError(
                f"A floating-point {what} must have values from 0 to 255, or from 0 to 1, got "
                f"{low:g} to {high:g}{hint}."
            )
        most = max(most, high)
        if most <= 1.0 and not some_between:
            values = _numpy(array)
            some_between = bool((values != np.floor(values)).any())
    return WHITE if some_between and most <= 1.0 else 1.0


def to_bytes(array: Any, scale: float) -> np.ndarray:
    """Return floating-point values times ``scale``, rounded to uint8, in the same shape."""
    return np.rint(_numpy(array) * np.float32(scale)).astype(np.uint8)


def _range(array: Any) -> tuple[float, float]:
    if isinstance(array, np.ndarray):
        return float(array.min()), float(array.max())
    low, high = sys.modules["torch"].aminmax(array.detach().float())
    return float(low), float(high)


def _numpy(array: Any) -> np.ndarray:
    values: np.ndarray = (
        array if isinstance(array, np.ndarray) else array.detach().float().cpu().numpy()
    )
    return values
