"""Facts of a model that can be told without its weights."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sensorium.config import EngineConfig
from sensorium.engine.prompts.defaults import generation_values, sampling_defaults
from sensorium.errors import SensoriumError
from sensorium.models import loader
from sensorium.models.embedder import embedder_of
from sensorium.models.loading import checkpoint
from sensorium.models.registry import resolve

if TYPE_CHECKING:
    from sensorium.engine.serving.frontend import Frontend

logger = logging.getLogger("sensorium.server")


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts of a model.

    Attributes:
        runner: "generate" or "pooling".
        modalities: Those that it takes besides text.
        sampling: Its default sampling parameters.
        max_model_len: Longest prompt and answer together in tokens; None until it has been loaded.
    """

    runner: str
    modalities: tuple[str, ...]
    sampling: Mapping[str, Any]
    max_model_len: int | None = None

    @classmethod
    def of(cls, frontend: Frontend) -> ModelFacts:
        """Return the facts of a model that runs."""
        processor = frontend.input_processor
        generates = processor.runner != "pooling"
        return cls(
            processor.runner,
            tuple(processor.modalities),
            processor.default_params if generates else {},
            frontend.max_model_len,
        )


def read_facts(config: EngineConfig) -> ModelFacts | None:
    """Return the facts in a model's files; None for one that would have to be downloaded.

    None, too, where the files cannot be read: loading the model says why.
    """
    options = config.model
    if not checkpoint.is_local(options.model):
        return None
    try:
        loaded = loader.read_config_of(options)
        family = resolve(loaded.config)
        embedder = embedder_of(loaded, family, options.runner)
        processor = family.build_processor(loaded)
        known = processor.modalities if processor is not None else ()
        modalities = tuple(name for name in known if config.media.limit(name) != 0)
        sampling = sampling_defaults(generation_values(loaded.generation, options))
    except SensoriumError as error:
        logger.warning("the files of the model %r cannot be used: %s", options.model, error.message)
        return None
    if embedder is not None:
        return ModelFacts("pooling", modalities, {})
    return ModelFacts("generate", modalities, sampling)
