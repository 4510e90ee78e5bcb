"""Table of products: which one a weight of each number format runs through on this CPU.

A weight lies in one layout only, so one product serves all numbers of rows. The choice is the least
geometric mean of measured times over these numbers, among the products that this CPU and these
libraries have. ``measured.json`` has the times of each level, made by ``sensorium bench kernels``,
and the CPU that they are from; a level that was not measured follows the next lower one that was. A
file ``sensorium/products.json`` in the user's cache folder, made by ``sensorium bench kernels
--write`` on this machine, takes precedence for the formats in it.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sensorium import environment
from sensorium.kernels.cpu import amx
from sensorium.kernels.cpu.linear import floats, integers, levels, onednn
from sensorium.kernels.weight import PackedWeight

logger = logging.getLogger(__name__)

Times = dict[str, dict[str, dict[str, float]]]
"""Microseconds by format, number of rows and product."""

SHIPPED = Path(__file__).with_name("measured.json")
PANELS, ONEDNN, TORCH = "panels", "oneDNN", "torch"
FLOATS = ("float32", "bfloat16", "float16")
INTEGERS = ("int8", "int4")
TILE_LEVELS = ("amx-bf16", "amx-int8")
INTEGER_NAMES = {"avx2": "AVX2", "vnni256": "VNNI of 256 bits", "vnni512": "VNNI of 512 bits"}
"""Names of the forms of integer products, of which each CPU has one."""
_ROWS = re.compile("[1-9][0-9]{0,8}")
"""Number of rows, as a key of measured times."""


@dataclass(frozen=True)
class Product:
    """A way to multiply with float weights."""

    available: Callable[[str], bool]
    """Tell if this CPU and these libraries have the product for a format."""
    pack: Callable[[torch.Tensor], PackedWeight]
    """Pack a (N, K) weight, which gives its type to activations and results."""


PRODUCTS = {
    PANELS: Product(floats.available, floats.pack_weight),
    ONEDNN: Product(lambda form: onednn.packs(dtype_of(form)), onednn.pack_weight),
    TORCH: Product(lambda form: True, onednn.keep_weight),
}
"""Products of this engine, in oneDNN, and in torch with the plain weight."""


def dtype_of(form: str) -> torch.dtype:
    """Return the dtype of a float format."""
    dtype: torch.dtype = getattr(torch, form)
    return dtype


def format_of(dtype: torch.dtype) -> str:
    """Return the format of a dtype."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def choose(form: str) -> str:
    """Return the name in ``PRODUCTS`` of the product for a float format on this CPU."""
    names = [name for name, product in PRODUCTS.items() if product.available(form)]
    if len(names) == 1:
        return names[0]
    times = measured().get(form, {}).values()
    timed = [name for name in names if any(name in row for row in times)]
    if form == "float16" and ONEDNN in names and ONEDNN not in timed:
        return ONEDNN  # it has units for fp16 here; the CPU that was measured had none
    whole = [row for row in times if all(name in row for name in timed)]
    if not (timed and whole):
        # Without a measurement: a library that packs weights of a type is made for it.
        return ONEDNN if ONEDNN in names else names[0]
    return min(timed, key=lambda name: sum(math.log(row[name]) for row in whole))


def choose_again() -> None:
    """Forget what ``choose`` and ``measured`` have found."""
    choose.cache_clear()
    measured.cache_clear()


def pack_weight(weight: torch.Tensor) -> PackedWeight:
    """Pack a (N, K) weight for the product that suits its dtype best."""
    return PRODUCTS[choose(format_of(weight.dtype))].pack(weight)


def warm_up(dtype: torch.dtype) -> None:
    """Compile or load the kernels of products with activations of ``dtype``."""
    if choose(format_of(dtype)) == PANELS:
        floats.warm_up(dtype)


def runs_well(dtype: torch.dtype) -> bool:
    """Return whether products with weights of ``dtype`` are about as fast as those of float32.

    False only where each number would be emulated.
    """
    return onednn.has_units(dtype) or choose(format_of(dtype)) == PANELS


def is_own(dtype: torch.dtype) -> bool:
    """Return whether weights of ``dtype`` run through this engine's own product.

    Its bits depend on no number of threads; the libraries promise nothing.
    """
    return choose(format_of(dtype)) == PANELS


def summary() -> str:
    """Return the level of this CPU and the product of each format, in one line."""
    products = ", ".join(f"{form} {name}" for form, name in chosen().items())
    return f"CPU level {levels.level()}; linear layers: {products}"


def chosen() -> dict[str, str]:
    """Return the name of the product for each format of weights, float and integer."""
    found = integers.forms()
    integer = INTEGER_NAMES[found[-1]] if found else "torch, dequantized"
    unit = amx.unit()
    if found and unit is not None and amx.has_bytes(unit):
        integer += ", AMX for many rows"
    return {form: choose(form) for form in FLOATS} | dict.fromkeys(INTEGERS, integer)


# -- measured times -------------------------------------------------------------------------------


@functools.cache
def measured() -> Times:
    """Return the measured times that hold for this CPU, for each format its own or the shipped."""
    return _shipped() | _own()


def _own() -> Times:
    """Return the times of this machine; none where the file is damaged or of another level."""
    found = _read(own_file())
    if found.get("level") != levels.level():
        return {}
    try:
        return checked(found.get("times"))
    except ValueError as error:
        logger.warning(
            "the measured times of products in %s are not used: %s; "
            "'sensorium bench kernels --write' measures again",
            own_file(),
            error,
        )
        return {}


def _shipped() -> Times:
    shipped = _read(SHIPPED)
    order = [name for name, _ in levels.X86_LEVELS]
    known = levels.level() in order
    below = order[order.index(levels.level()) :] if known else [levels.level()]
    found = next((name for name in below if name in shipped), None)
    times = {} if found is None else checked(shipped[found]["times"])
    if levels.has("amx-bf16") and found not in TILE_LEVELS:
        times.pop("bfloat16", None)  # without tiles, oneDNN's times say nothing of those with them
    return times


def checked(times: object) -> Times:
    """Return ``times`` if it has the form of ``Times``, else raise ValueError."""
    if not isinstance(times, dict):
        raise ValueError("there is no object of times")
    for form, by_rows in times.items():
        for rows, by_product in by_rows.items() if isinstance(by_rows, dict) else [(None, None)]:
            values: list[Any] = [*by_product.values()] if isinstance(by_product, dict) else [None]
            if rows is not None and not _ROWS.fullmatch(rows):
                raise ValueError(f"{form}: {rows!r} is no number of rows")
            if not all(type(value) in (int, float) and 0 < value < math.inf for value in values):
                where = form if rows is None else f"{form}, {rows} rows"
                raise ValueError(f"{where}: microseconds by product were expected")
    return times


def own_file() -> Path:
    """Return where the times of this machine are kept."""
    return environment.cache_root() / "sensorium" / "products.json"


def _read(path: Path) -> dict[str, Any]:
    """Read a JSON object; an empty one where there is none, or none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("the measured times of products in %s cannot be read: %s", path, error)
        return {}
    if not isinstance(found, dict):
        logger.warning("the measured times of products in %s are no JSON object", path)
        return {}
    return found
