"""A model whose decoder is never loaded: towers and projectors alone, which encode media."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from sensorium.errors import ConfigError
from sensorium.models.interface import Family, LoadableModel, LoadedConfig, WeightSlot

if TYPE_CHECKING:
    import torch

    from sensorium.multimodal.processor import Processor

_DECODER = r".*"
"""All weights of the checkpoint that no slot takes are the decoder's."""


class Encoders:
    """The encoders of a model as a ``LoadableModel``; nothing but ``encode`` can be called.

    Layers have no memory before they are loaded, so the decoder behind it takes none.
    """

    ignored_weights: tuple[str, ...] = (_DECODER,)

    def __init__(self, model: LoadableModel) -> None:
        self.shape = model.shape
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.has_encoder = model.has_encoder
        self.encode = model.encode
        self._model = model

    def slots(self) -> Iterator[WeightSlot]:
        """Return the slots of towers and projectors; see ``LoadableModel``."""
        return (slot for slot in self._model.slots() if slot.role == "encoder")


def encoders_of(model: LoadableModel) -> LoadableModel:
    """Return the encoders of a model without weights. Raises ConfigError where it has none."""
    if not model.has_encoder:
        raise ConfigError(
            "The model has no encoder, as it takes no media or all of them are switched off.",
            param="model",
        )
    return cast(LoadableModel, Encoders(model))


def check_separable(loaded: LoadedConfig, family: Family) -> Processor:
    """Return the processor of a model whose encoders can be loaded without its decoder.

    Raises ConfigError for a model that has no encoders, or whose encoders need the decoder.
    """
    processor = family.build_processor(loaded)
    name = (loaded.config.get("architectures") or [family.name])[0]
    if processor is None:
        raise ConfigError(
            f"encoder_replicas: the model ({name}) takes no media, so there is nothing to encode; "
            "leave it at 0.",
            param="encoder_replicas",
        )
    if not family.separable:
        raise ConfigError(
            f"encoder_replicas: the model ({name}) runs through the code of transformers, which "
            "loads encoders and decoder together; leave it at 0.",
            param="encoder_replicas",
        )
    return processor
