"""Selection of the dtype in which a model is held and computed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from sensorium.config import GIB
from sensorium.errors import ConfigError
from sensorium.models.configs import declared_dtype
from sensorium.processes.limits import available_memory

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

DTYPES = ("float32", "float16", "bfloat16")
LOADING = 1.25
"""Times the memory of its weights that a model may take while it is loaded."""


def dtype_of(wanted: str, config: Mapping[str, Any], stored: str | None) -> torch.dtype:
    """Return the wanted dtype.

    ``auto`` is the one that config.json declares, else that of the weights, else float32. Raises
    ConfigError for an unknown one.
    """
    import torch

    name = wanted if wanted != "auto" else declared_dtype(config) or stored or "float32"
    if name not in DTYPES:
        where = "config.json declares" if wanted == "auto" else "there is no"
        raise ConfigError(
            f"{where} dtype {name!r}; give one of {', '.join(DTYPES)}.", param="dtype"
        )
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def suited_to_cpu(
    dtype: torch.dtype, count: Callable[[], int], in_kernels: bool = True
) -> torch.dtype:
    """Return the dtype in which a CPU best runs a model of ``count()`` numbers stored as ``dtype``.

    That is its own where the CPU multiplies such numbers, or where the kernels of linear layers
    widen them as they go; else float32 where the memory allows it. ``in_kernels``: the model's
    linear layers run in these kernels. Logs the choice and its cost.
    """
    import torch

    from sensorium.kernels import ops

    if ops.has_units(dtype):
        return dtype
    name, size = str(dtype).removeprefix("torch."), count() * torch.float32.itemsize
    if in_kernels and ops.runs_well(dtype):
        logger.info(
            "this CPU has no units for %s: the weights stay in it (%.1f GiB) and are computed in "
            "float32, which reads half the memory of --dtype float32",
            name,
            size / 2 / GIB,
        )
        return dtype
    available = available_memory()
    if size * LOADING > available:
        logger.warning(
            "this CPU has no units for %s, so the model runs several times slower than it would in "
            "float32; but its weights in float32 (%.1f GiB, %.1f while loading) do not fit into "
            "the %.1f GiB of memory that are available. --dtype float32 tries all the same",
            name,
            size / GIB,
            size * LOADING / GIB,
            available / GIB,
        )
        return dtype
    logger.info(
        "this CPU has no units for %s: the weights are held as float32 (%.1f GiB), which is "
        "several times faster. --dtype %s keeps them as they are stored",
        name,
        size / GIB,
        name,
    )
    return torch.float32
