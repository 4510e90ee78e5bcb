"""Check that the media of a model can be encoded apart from its engine."""

from __future__ import annotations

from sensorium.config import EngineConfig
from sensorium.errors import ConfigError
from sensorium.models import loader
from sensorium.models.encoders import check_separable
from sensorium.models.registry import resolve


def check_encoders(config: EngineConfig) -> None:
    """Raise ConfigError for a model whose media cannot be encoded apart from its engine.

    Reads the checkpoint's configuration, and no weights.
    """
    model = config.model
    if model.load_format == "dummy":
        raise ConfigError(
            "encoder_replicas: with load_format dummy each process has random weights of its own, "
            "so embeddings made apart are not the engines'; leave it at 0.",
            param="encoder_replicas",
        )
    loaded = loader.read_config_of(model)
    processor = check_separable(loaded, resolve(loaded.config))
    if all(config.media.limit(m) == 0 for m in processor.modalities):
        raise ConfigError(
            "encoder_replicas: all media are switched off by limit_mm_per_prompt, so there is "
            "nothing to encode; leave it at 0.",
            param="encoder_replicas",
        )
