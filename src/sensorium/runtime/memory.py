"""Size of the KV cache, from the configuration and the available memory."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from sensorium.config import GIB, CacheConfig
from sensorium.errors import ConfigError
from sensorium.kernels.batch import KVCacheLayout
from sensorium.processes.limits import available_memory, resident_memory

logger = logging.getLogger(__name__)

CPU_FRACTION = 0.4
"""Part of the memory that is free after loading the model which the cache may take on a CPU by
default."""


@dataclass(frozen=True, slots=True)
class CacheGeometry:
    """The size of the KV cache, as found by measuring, and the context that fits it."""

    num_blocks: int
    block_size: int
    max_model_len: int


def cache_geometry(
    config: CacheConfig,
    layout: KVCacheLayout,
    *,
    max_model_len: int | None,
    max_position: int,
    max_num_seqs: int,
    free_bytes: int,
) -> CacheGeometry:
    """Number of blocks and longest context.

    Without ``kv_cache_memory_bytes`` the cache gets a fixed part of the free memory, but never more
    than ``max_num_seqs`` sequences of full length could use. A ``max_model_len`` that was asked for
    and does not fit, or is beyond what the model was made for (``max_position``), is a ConfigError;
    the model's own is lowered with a warning.
    """
    if max_model_len is not None and max_model_len > max_position:
        raise ConfigError(
            f"max_model_len is {max_model_len}, but the model's context ends at {max_position}. "
            "Lower it, or, where the model's makers say how it goes further, set hf_overrides "
            "accordingly.",
            param="max_model_len",
        )
    wanted_len = max_model_len or max_position
    blocks_per_seq = -(-wanted_len // layout.block_size)
    if config.num_kv_blocks is not None:
        num_blocks = config.num_kv_blocks
    elif config.kv_cache_memory_bytes is not None:
        num_blocks = config.kv_cache_memory_bytes // layout.bytes_per_block
    else:
        num_blocks = min(free_bytes // layout.bytes_per_block, blocks_per_seq * max_num_seqs)
    if num_blocks < 1:
        raise ConfigError(
            f"The KV cache would have no block: one block of {layout.block_size} tokens takes "
            f"{layout.bytes_per_block} bytes. Raise kv_cache_memory_bytes."
        )
    capacity = num_blocks * layout.block_size
    if capacity < wanted_len:
        if max_model_len is not None:
            raise ConfigError(
                f"max_model_len is {max_model_len}, but the KV cache holds {capacity} tokens "
                f"({num_blocks} blocks of {layout.block_size}). Lower max_model_len or raise "
                f"kv_cache_memory_bytes to {blocks_per_seq * layout.bytes_per_block}.",
                param="max_model_len",
            )
        logger.warning(
            "the KV cache holds %d tokens: the context is limited to that (the model's is %d)",
            capacity,
            wanted_len,
        )
        wanted_len = capacity
    return CacheGeometry(num_blocks, layout.block_size, wanted_len)


def cache_dtype(name: str, model_dtype: torch.dtype) -> torch.dtype:
    """Return the data type of keys and values that ``kv_cache_dtype`` names.

    Raises ConfigError for a floating-point type that is not the model's.
    """
    wanted = {"auto": model_dtype, "int8": torch.int8}.get(name)
    if wanted is None:
        wanted = getattr(torch, name)
    if wanted not in (model_dtype, torch.int8):
        own = str(model_dtype).removeprefix("torch.")
        raise ConfigError(
            f"kv_cache_dtype is {name}, but the model runs in {own}: keys and values are kept in "
            "the model's data type or in int8. Leave kv_cache_dtype at auto, or set dtype to "
            f"{name}.",
            param="kv_cache_dtype",
        )
    return wanted


def log_cache(layout: KVCacheLayout, geometry: CacheGeometry) -> None:
    """Say at start how large the cache is."""
    logger.info(
        "KV cache: %d tokens (%d blocks of %d) in %s, up to %.2f GiB",
        geometry.num_blocks * geometry.block_size,
        geometry.num_blocks,
        geometry.block_size,
        str(layout.dtype).removeprefix("torch."),
        geometry.num_blocks * layout.bytes_per_block / GIB,
    )


def free_memory(device: torch.device, config: CacheConfig, num_ranks: int = 1) -> int:
    """Return the bytes that the cache may take on this device, beside the loaded model.

    num_ranks: processes that share the model, a CPU's memory and what ``max_memory_gb`` allows.
    Raises ConfigError when ``max_memory_gb`` leaves nothing.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        found = max(0, int(free - total * (1.0 - config.gpu_memory_utilization)))
        taken = torch.cuda.memory_reserved(device)
    else:
        found = int(available_memory() * CPU_FRACTION) // num_ranks
        taken = resident_memory()
    most = config.max_memory_gb
    if most is None:
        return found
    left = int(most * GIB) // num_ranks - taken
    if left <= 0:
        raise ConfigError(
            f"max_memory_gb is {most:.2f}, but without the KV cache this model takes "
            f"{num_ranks * taken / GIB:.2f} GiB already; raise it (--max-memory-gb, "
            "or --models-memory-gb of several models).",
            param="max_memory_gb",
        )
    return min(found, left)


def warn_when_scarce(num_bytes: int, device: torch.device) -> None:
    """Warn at start of a cache on the host that may outgrow its memory, since pages come late."""
    if device.type != "cpu":
        return
    available = available_memory()
    if num_bytes > available:
        logger.warning(
            "the KV cache may grow to %.1f GiB, but only %.1f GiB of memory are available: the "
            "system may end this process then. Lower kv_cache_memory_bytes (or num_kv_blocks)",
            num_bytes / GIB,
            available / GIB,
        )
