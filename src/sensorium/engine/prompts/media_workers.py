"""Builds the media pipeline of a model, with the worker processes that decode for it."""

from __future__ import annotations

import dataclasses
import importlib

from sensorium.config import GIB, EngineConfig
from sensorium.engine import wire
from sensorium.errors import ConfigError, InvalidRequestError
from sensorium.multimodal.cache.features import FeatureCache, NamedFeatures
from sensorium.multimodal.decode.loaders import check_loading_options
from sensorium.multimodal.pipeline import MediaPipeline
from sensorium.multimodal.processor import Processor
from sensorium.multimodal.shared_memory import SharedArraysFolder
from sensorium.multimodal.workers.pool import ProcessDecoders
from sensorium.processes.fork_server import ForkServerCommand
from sensorium.processes.start import child_environment, python_module

UNBOUNDED_BYTES = 1 << 50


def media_pipeline(
    config: EngineConfig,
    processor: Processor | None,
    *,
    shared: bool,
    package_files: bool,
    elsewhere: NamedFeatures | None = None,
) -> MediaPipeline | None:
    """Return the pipeline of a model; None for one that takes text alone.

    shared: the engine is another process, which must be able to open all features; workers are then
    started at once. package_files: whether the assets of this package may be read, as in ``Guard``.
    elsewhere: as in ``MediaPipeline``.
    Raises ConfigError for loading options that cannot be.
    """
    media, cache = config.media, config.cache
    if processor is None:
        try:
            check_loading_options(media.media_io_kwargs, ())
        except InvalidRequestError as error:
            raise ConfigError(error.message, param=error.param) from None
        return None
    folder = SharedArraysFolder()
    decoders = process_decoders(config, folder)
    if shared:
        decoders.start()
        if media.enable_mm_embeds:
            # Not at the first embeddings: the import holds up every other thread for as long as it
            # takes.
            importlib.import_module("torch")
    else:
        # A batch of one caller takes room from nobody, and should wait rather than be refused.
        media = dataclasses.replace(media, max_media_bytes_in_flight=UNBOUNDED_BYTES)
    kept = min(int(cache.mm_processor_cache_gb * GIB), folder.capacity_bytes)
    return MediaPipeline(
        media,
        processor,
        FeatureCache(kept),
        decoders=decoders,
        shared_folder=folder if shared else None,
        package_files=package_files,
        ids_matter=cache.mm_processor_cache_gb > 0 or cache.enable_prefix_caching,
        elsewhere=elsewhere,
    )


def process_decoders(config: EngineConfig, folder: SharedArraysFolder) -> ProcessDecoders:
    """Return decoders whose processes build the model's processor."""
    command = ForkServerCommand(
        python_module("sensorium.engine.prompts.media_worker", str(folder.path)),
        child_environment(one_thread=True),
        wire.encode(wire.Configure(config)),
    )
    return ProcessDecoders(command, config.media, folder)
