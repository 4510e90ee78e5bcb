"""Loading of the model, and the layout of its KV cache, as an engine's options say."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sensorium import environment
from sensorium.config import GIB, EngineConfig
from sensorium.errors import ConfigError
from sensorium.kernels import ops
from sensorium.kernels.batch import KVCacheLayout, LayerCache
from sensorium.kernels.cpu.linear import levels
from sensorium.models import loader
from sensorium.models.interface import Family, TextShape
from sensorium.models.loading.quantize import WeightFormats
from sensorium.models.loading.weights_cache import CacheSettings
from sensorium.runtime.memory import cache_dtype

if TYPE_CHECKING:
    from sensorium.distributed.collectives import Collectives

LEAST_KEPT = 32 << 20
"""Bytes of quantized weights from which they are kept by default: fewer are made in a moment."""


def load_model(
    config: EngineConfig,
    device: str,
    proceed: Callable[[], object] = lambda: None,
    *,
    collectives: Collectives | None = None,
    skip_modalities: Collection[str] = (),
    encoders_only: bool = False,
    chosen: loader.Chosen = loader.ignored,
) -> loader.LoadedModel:
    """Load the model as its options say.

    collectives: the ranks that share it. skip_modalities: those that are left out beside the ones
    that are switched off. encoders_only: the decoder is not loaded. chosen: called with the folder
    and the dtype before weights are read.
    """
    return loader.load(
        config.model.model,
        mmproj=config.model.mmproj,
        dtype=config.model.dtype,
        device=device,
        load_format=config.model.load_format,
        hf_overrides=config.model.hf_overrides,
        revision=config.model.revision,
        seed=config.model.seed,
        skip_modalities=switched_off(config).union(skip_modalities),
        runner=config.model.runner,
        download_dir=config.model.download_dir,
        formats=weight_formats(config),
        weights_cache=weights_cache(config),
        replay=not config.model.enforce_eager,
        int8_cache=config.cache.kv_cache_dtype == "int8",
        collectives=collectives,
        encoders_only=encoders_only,
        chosen=chosen,
        proceed=proceed,
    )


def cache_layout(
    config: EngineConfig, shape: TextShape, dtype: torch.dtype, collectives: Collectives | None
) -> KVCacheLayout:
    """Return the layout of the KV cache of a model that runs in ``dtype``. Raises ConfigError.

    With several ranks it is that of this one, which has some of the heads.
    """
    kept = cache_dtype(config.cache.kv_cache_dtype, dtype)
    heads = shape.num_kv_heads
    if collectives is not None:
        first, end = collectives.shard.shared_part(heads)
        heads = end - first
    return KVCacheLayout(shape.num_layers, heads, shape.head_dim, config.cache.block_size, kept)


def allocate_cache(
    layout: KVCacheLayout, num_blocks: int, device: torch.device
) -> list[LayerCache]:
    """Allocate the KV cache. Raises ConfigError when the system refuses that much memory."""
    try:
        return ops.allocate_cache(layout, num_blocks, device)
    except MemoryError:
        raise ConfigError(
            f"The KV cache would take {num_blocks * layout.bytes_per_block} bytes ({num_blocks} "
            f"blocks of {layout.bytes_per_block}), more than the system gives; lower "
            "kv_cache_memory_bytes (or num_kv_blocks).",
            param="kv_cache_memory_bytes",
        ) from None


def switched_off(config: EngineConfig) -> frozenset[str]:
    """Return the modalities with a limit of 0, whose encoders are not loaded."""
    return frozenset(m for m in config.media.limit_mm_per_prompt if config.media.limit(m) == 0)


def same_on_threads(family: Family, dtype: torch.dtype) -> bool:
    """Return True where the number of threads of a CPU changes no bit of what a model computes."""
    return family.same_on_threads and ops.has_own_product(dtype)


def numerics(family: Family, dtype: torch.dtype, device: torch.device, num_threads: int) -> str:
    """Return what decides last bits on a device, besides weights, options and inputs.

    Two processes where this is equal make the same bits: kind of device, instructions or name of
    it, dtype, version of torch, and, where they matter, threads.
    """
    name = str(dtype).removeprefix("torch.")
    if device.type != "cpu":
        return f"{device.type} {device_name(device)} {name} torch {torch.__version__}"
    of_threads = "" if same_on_threads(family, dtype) else f" {num_threads} threads"
    return f"cpu {levels.level()} {name} torch {torch.__version__}{of_threads}"


def device_name(device: torch.device) -> str:
    """Return the kind of a GPU and its compute capability; nothing for a CPU."""
    if device.type != "cuda":
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} {major}.{minor}"


def weight_formats(config: EngineConfig) -> WeightFormats:
    """Return the formats in which the weights of a model are held."""
    head = config.model.quantization_head
    if head == "auto":
        head = "none" if config.model.weight_format in (None, "none") else "int8"
    return WeightFormats(
        decoder=config.model.weight_format or "none",
        encoder=config.model.quantization_towers,
        head=head,
        dequantize=config.model.weight_format == "none",
    )


def weights_cache(config: EngineConfig) -> CacheSettings | None:
    """Return where quantized weights are kept; None for nowhere."""
    where, most = config.model.weights_cache, int(config.model.weights_cache_gb * GIB)
    if where == "off" or most == 0:
        return None
    if where != "auto":
        return CacheSettings(Path(where).expanduser().absolute(), most)
    root = environment.cache_root()
    return CacheSettings(root / "sensorium", most, LEAST_KEPT) if root.is_absolute() else None
