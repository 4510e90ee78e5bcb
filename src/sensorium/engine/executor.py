"""Builds an engine in this process: loads the model, sizes the caches, wires the parts."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch

from sensorium.config import GIB, MIB, EngineConfig, SpeculationConfig
from sensorium.core.limits import SchedulerLimits
from sensorium.core.scheduler import Scheduler
from sensorium.core.speculation.speculator import SpeculationLimits
from sensorium.engine.adapters import EngineAdapters, found_adapters
from sensorium.engine.engine import Engine
from sensorium.engine.grammar.matchers import Matchers
from sensorium.engine.loading import (
    allocate_cache,
    cache_layout,
    load_model,
    numerics,
    same_on_threads,
)
from sensorium.engine.parallel.adapters import GroupLanes
from sensorium.engine.parallel.group import RankGroup
from sensorium.engine.parallel.model import ParallelModel
from sensorium.engine.stats import EngineFacts
from sensorium.errors import ConfigError
from sensorium.kernels import ops
from sensorium.kernels.batch import KVCacheLayout, LayerCache
from sensorium.kernels.cpu import threads
from sensorium.models import loader
from sensorium.models.interface import Family, LoadableModel, Model, TextShape
from sensorium.models.loading.fill import weight_bytes
from sensorium.processes import cores
from sensorium.runtime.adapters import AdapterSet
from sensorium.runtime.crowding import ThreadAdapter
from sensorium.runtime.encoder import FeatureStore
from sensorium.runtime.memory import (
    CacheGeometry,
    cache_geometry,
    free_memory,
    log_cache,
    warn_when_scarce,
)
from sensorium.runtime.runner import ModelRunner

logger = logging.getLogger(__name__)

DEFAULT_BATCHED_TOKENS = 2048
WINDOW_MARGIN = 64
"""Tokens before a sliding window that kernels may read, as they take steps of so many at most."""
SMALL_DECODER = 10_000_000
"""Number of weights, roughly counted, below which a decoder runs on one thread."""


@dataclass(frozen=True, slots=True)
class EngineParts:
    """Parts of an engine: scheduler, runner, store of features, facts, matchers, adapters."""

    scheduler: Scheduler
    runner: ModelRunner
    store: FeatureStore
    facts: EngineFacts
    matchers: Matchers
    traces: bool
    adapters: EngineAdapters
    release: Callable[[], object] = lambda: None
    """Ends the processes that compute a part of the model."""

    def engine(self, kind: type[Engine] = Engine) -> Engine:
        """Make the engine, of the class ``kind``."""
        return kind(
            self.scheduler,
            self.runner,
            self.store,
            self.facts,
            self.matchers,
            traces=self.traces,
            adapters=self.adapters,
            release=self.release,
        )


def build_engine(
    config: EngineConfig, *, own_process: bool = False, proceed: Callable[[], object] = lambda: None
) -> Engine:
    """Load the model and return an engine that can take requests.

    ``own_process``: nothing else runs here, so the process may be kept on some of the CPUs.
    ``proceed``: called while weights are loaded; what it raises ends that. Raises ConfigError when
    the configuration cannot be met on this machine.
    """
    return build_parts(config, own_process=own_process, proceed=proceed).engine()


_NOT_INVARIANT = (
    "batch_invariant: this model runs through the code of transformers, where plain decoders keep "
    "it, but mixtures of experts do not (docs/reproducibility.md)"
)


def build_parts(
    config: EngineConfig, *, own_process: bool = False, proceed: Callable[[], object] = lambda: None
) -> EngineParts:
    """Load the model and return the parts of its engine. Raises ConfigError as ``build_engine``."""
    group = _group(config, own_process)
    if group is None:
        return _build_parts(config, None, own_process, proceed)
    try:
        return _build_parts(config, group, own_process, proceed)
    except BaseException:
        group.close()
        raise


def _build_parts(
    config: EngineConfig,
    group: RankGroup | None,
    own_process: bool,
    proceed: Callable[[], object],
) -> EngineParts:
    started = time.monotonic()
    device = loader.find_device(config.model.device)
    asked = _own_threads(config, device, own_process)
    ranks = None if group is None else group.collectives
    folders, chosen = found_adapters(config), loader.ignored if group is None else group.begin
    loaded = load_model(config, str(device), proceed, collectives=ranks, chosen=chosen)
    shape, model = loaded.model.shape, loaded.model
    if group is not None:
        group.wait_loaded(model)  # memory is counted once all have theirs
    lanes = _lanes(config, loaded, group)
    adapters = EngineAdapters.of(lanes, config, folders)
    num_threads = _set_threads(asked, shape, config.model.num_threads is not None)
    layout = cache_layout(config, shape, model.dtype, ranks)
    geometry = cache_geometry(
        config.cache,
        layout,
        max_model_len=config.model.max_model_len,
        max_position=shape.max_position,
        max_num_seqs=config.scheduler.max_num_seqs,
        free_bytes=free_memory(device, config.cache, config.parallel.tensor_parallel_size),
    )
    caches = _allocated(layout, geometry, device, config.parallel.tensor_parallel_size)
    int8_cache = layout.records is not None
    ops.warm_up(model.dtype, device, encoders=model.has_encoder, int8_cache=int8_cache)
    if device.type == "cpu":
        logger.info("%s", ops.products())
    store = FeatureStore()
    invariant = is_batch_invariant(config, device, model.dtype)
    if config.model.batch_invariant and not loaded.family.invariant:
        logger.warning(_NOT_INVARIANT)
    adapts = _may_adapt(config, loaded.family, model.dtype, device, invariant)
    adapter = ThreadAdapter(num_threads if adapts else 1, threads.configure)
    runner = ModelRunner(
        model if group is None else _together(model, group, config, geometry.num_blocks, lanes),
        caches,
        store,
        batch_invariant=invariant,
        adapters=lanes,
        after_step=adapter.after_step,
    )
    facts = _facts(config, geometry, loaded, layout, num_threads, time.monotonic() - started)
    return EngineParts(
        Scheduler(_limits(config, geometry, model, loaded.family)),
        runner,
        store,
        facts,
        Matchers(_tokenizer_folder(config, loaded.config.folder), shape.vocab_size),
        traces=config.observability.traces,
        adapters=adapters,
        release=(lambda: None) if group is None else group.close,
    )


def _group(config: EngineConfig, own_process: bool) -> RankGroup | None:
    """Start the other ranks that share the model, if there are any. Raises ConfigError."""
    size = config.parallel.tensor_parallel_size
    if size == 1:
        return None
    device = loader.find_device(config.model.device)
    if device.type != "cpu":
        raise ConfigError(
            f"tensor_parallel_size is {size}, but the device is {device}: so far a model is "
            "divided between processes on CPUs alone; use --device cpu, or leave it at 1.",
            param="tensor_parallel_size",
        )
    return RankGroup(config, on_loss=(lambda: os._exit(1)) if own_process else (lambda: None))


def _own_threads(config: EngineConfig, device: torch.device, own_process: bool) -> int | None:
    """Set the threads with which the model is loaded. Return how many are asked for later.

    In a process of its own, the engine stays on the CPUs that are chosen.
    """
    asked, size = config.model.num_threads, config.parallel.tensor_parallel_size
    is_cpu = device.type == "cpu"
    if size > 1 and is_cpu:
        asked = threads.share(0, size, asked, keeps=own_process)
    elif own_process and is_cpu:
        threads.bind(asked)
    threads.configure(asked)
    return asked


def _together(
    model: Model, group: RankGroup, config: EngineConfig, num_blocks: int, lanes: AdapterSet | None
) -> Model:
    """Meet the other ranks, and return the model that all compute together.

    Raises what kept one of them from it.
    """
    group.start(num_blocks)
    sizes = [weight_bytes(cast(LoadableModel, model)), *group.weight_bytes]
    logger.info(
        "weights of linear layers and embeddings by rank: %s",
        ", ".join(f"{size / MIB:.1f} MiB" for size in sizes),
    )
    rows, shares_items = None if lanes is None else lanes.rows, _all_encode(config)
    return ParallelModel(model, group, shares_items=shares_items, rows=rows)


def _all_encode(config: EngineConfig) -> bool:
    return config.parallel.encoder_ranks == "all"


def _facts(
    config: EngineConfig,
    geometry: CacheGeometry,
    loaded: loader.LoadedModel,
    layout: KVCacheLayout,
    num_threads: int,
    load_seconds: float,
) -> EngineFacts:
    model = loaded.model
    return EngineFacts(
        max_model_len=geometry.max_model_len,
        num_kv_blocks=geometry.num_blocks,
        block_size=geometry.block_size,
        max_num_batched_tokens=_batched_tokens(config, geometry.max_model_len),
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        num_threads=num_threads,
        load_seconds=load_seconds,
        embed_bytes=model.shape.embed_size * model.dtype.itemsize,
        cache_dtype=str(layout.dtype).removeprefix("torch."),
        num_ranks=config.parallel.tensor_parallel_size,
        numerics=numerics(loaded.family, model.dtype, model.device, num_threads),
    )


def _lanes(
    config: EngineConfig, loaded: loader.LoadedModel, group: RankGroup | None
) -> AdapterSet | None:
    """Prepare the model for adapters, where they are enabled. Raises ConfigError if it cannot."""
    if not config.lora.enable_lora:
        return None
    if not loaded.family.quantizable:
        raise ConfigError(
            "enable_lora: this model runs through the code of transformers, whose layers take no "
            "adapters; merge the adapter into its weights.",
            param="enable_lora",
        )
    model = cast(LoadableModel, loaded.model)
    return AdapterSet(
        model,
        loaded.family,
        max_loras=config.lora.max_loras,
        max_rank=config.lora.max_lora_rank,
        most_bytes=int(config.lora.max_lora_memory_gb * GIB),
        others=None if group is None else GroupLanes(group, have_encoders=_all_encode(config)),
    )


def _may_adapt(
    config: EngineConfig,
    family: Family,
    dtype: torch.dtype,
    device: torch.device,
    invariant: bool,
) -> bool:
    """Return whether the number of threads may change while the engine runs."""
    if config.model.num_threads is not None or device.type != "cpu":
        return False
    return not invariant or same_on_threads(family, dtype)


def _tokenizer_folder(config: EngineConfig, folder: str) -> str:
    """Return the folder of ``--tokenizer``, or of the model."""
    if config.model.tokenizer is None:
        return folder
    return loader.read_config(config.model.tokenizer, download_dir=config.model.download_dir).folder


def is_batch_invariant(config: EngineConfig, device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if a row must have the same bits in every step.

    That is as configured; by default where it costs next to nothing. Raises ConfigError when it is
    asked for and not possible.
    """
    wanted, block_size = config.model.batch_invariant, config.cache.block_size
    if wanted is False:
        return False
    obstacle = None
    if device.type != "cpu":
        obstacle = f"on {device.type}: run on the CPU, or leave it out"
    elif not ops.has_block_size(block_size):
        obstacle = f"with block_size {block_size}: make it a multiple of 16"
    if wanted and obstacle:
        raise ConfigError(f"batch_invariant cannot be had {obstacle}.", param="batch_invariant")
    # Over a cache in int8 all rows take one kernel anyway.
    may_vary = wanted is None and config.cache.kv_cache_dtype != "int8"
    if obstacle or (may_vary and ops.has_faster_variant(dtype)):
        logger.info(
            "the last bits of a request's log-probabilities, and so rarely a token, may depend on "
            "what else is in the batch%s",
            "" if obstacle else "; --batch-invariant rules that out, at a cost for long prompts",
        )
        return False
    return True


def _set_threads(asked: int | None, shape: TextShape, is_configured: bool) -> int:
    """Set the number of threads, and return it: 1 for a decoder that fits one core's cache.

    is_configured: the user asks for them.
    A second thread costs more than it saves there, and very much more on a busy machine, where each
    of the many short parallel regions may wait for a thread that is not running.
    """
    num_weights = 12 * shape.num_layers * shape.hidden_size**2
    if not is_configured and num_weights < SMALL_DECODER:
        chosen = replace(threads.configure(1), reason="a small decoder")
    else:
        chosen = threads.configure(asked)
    found = cores.find()
    logger.info("threads of the engine: %d (%s)", chosen.number, chosen.reason)
    if chosen.number > len(found.allowed):
        logger.warning(
            "num_threads is %d, but this process may use %d CPUs only: every step waits for "
            "threads that cannot run",
            chosen.number,
            len(found.allowed),
        )
    elif found.quota is not None and chosen.number > found.num_usable:
        logger.warning(
            "num_threads is %d, but a control group limits this process to the time of %g CPUs: "
            "it will be stopped again and again in the middle of steps",
            chosen.number,
            found.quota,
        )
    return chosen.number


def _batched_tokens(config: EngineConfig, max_model_len: int) -> int:
    """Return the token budget of a step: as configured, else enough for what must run whole."""
    if config.scheduler.max_num_batched_tokens is not None:
        return config.scheduler.max_num_batched_tokens
    if not config.scheduler.enable_chunked_prefill:
        return max(DEFAULT_BATCHED_TOKENS, max_model_len)
    return DEFAULT_BATCHED_TOKENS


def _allocated(
    layout: KVCacheLayout, geometry: CacheGeometry, device: torch.device, num_ranks: int
) -> list[LayerCache]:
    """Allocate the KV cache. Raises ConfigError when the system refuses that much memory.

    num_ranks: processes that have as much each.
    """
    log_cache(layout, geometry)
    warn_when_scarce(num_ranks * geometry.num_blocks * layout.bytes_per_block, device)
    return allocate_cache(layout, geometry.num_blocks, device)


def _limits(
    config: EngineConfig, geometry: CacheGeometry, model: Model, family: Family
) -> SchedulerLimits:
    shape = model.shape
    batched_tokens = _batched_tokens(config, geometry.max_model_len)
    embed_bytes = shape.embed_size * model.dtype.itemsize
    kept = max(1, int(config.cache.mm_encoder_cache_gb * GIB) // embed_bytes)
    limits = SchedulerLimits(
        max_num_seqs=config.scheduler.max_num_seqs,
        max_num_batched_tokens=batched_tokens,
        max_model_len=geometry.max_model_len,
        num_blocks=geometry.num_blocks,
        block_size=geometry.block_size,
        # One item may fill the whole context; beyond that, encode about as much as a step takes in.
        encode_budget=min(kept, max(batched_tokens, geometry.max_model_len)),
        encoder_cache_size=kept,
        enable_prefix_caching=config.cache.enable_prefix_caching,
        enable_chunked_prefill=config.scheduler.enable_chunked_prefill,
        speculation=_speculation(config.speculation),
    )
    window = None if family.bidirectional else shape.window
    return limits if window is None else replace(limits, window=window + WINDOW_MARGIN)


def _speculation(config: SpeculationConfig) -> SpeculationLimits | None:
    """Return how tokens are tried; None for not at all."""
    if config.speculative is None:
        return None
    return SpeculationLimits(
        num_tokens=config.num_speculative_tokens,
        shortest=config.prompt_lookup_min,
        longest=config.prompt_lookup_max,
    )
