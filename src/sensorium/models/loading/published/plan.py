"""Fate of a quantized checkpoint's weights on this machine, told before it is loaded.

No torch: the configuration is all that is known.
"""

from __future__ import annotations

from dataclasses import dataclass

from sensorium.models.loading.published.settings import FP8_METHODS, Settings

BYTES_HELD = {"int8": 1.07, "int4": 0.6}
"""Bytes of a weight with its scales and zero points."""
_SCALES = 1.05
"""Times the bytes of its integers that a weight takes in a file."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Format of the weights in memory, and bytes of each there and in the file, about."""

    format: str
    """``int8``, ``int4``, or the data type of plain numbers."""
    is_kept: bool
    """The integers of the file are kept as they are."""
    bytes_held: float
    bytes_stored: float

    def text(self) -> str:
        """Return what becomes of the weights, such as ``int4, as they are``."""
        return f"{self.format}, {'as they are' if self.is_kept else 'made when loaded'}"


def plan_of(
    settings: Settings, wanted: str | None, has_products: bool, dtype: str, dtype_bytes: int
) -> Plan:
    """Return what becomes of the weights of linear layers.

    wanted: the option ``quantization``. has_products: this device multiplies with int8 and int4.
    dtype: data type of plain numbers, of ``dtype_bytes`` bytes.
    """
    bits = settings.stored_bits()
    stored = bits / 8 * _SCALES
    if not has_products or wanted == "none":
        return Plan(dtype, False, dtype_bytes, stored)
    own = _kept_format(settings, bits)
    form = wanted or own or "int8"
    return Plan(form, form == own, BYTES_HELD[form], stored)


def _kept_format(settings: Settings, bits: int) -> str | None:
    """Return the format whose product takes the integers as they are; None if none does."""
    if settings.method in FP8_METHODS or settings.has_act_order or settings.is_float:
        return None
    return f"int{bits}"
