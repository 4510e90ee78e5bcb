"""Encoding of media outside an engine: the encoders of a model alone, without its decoder."""

from __future__ import annotations

import logging
from typing import NamedTuple, cast

import numpy as np
import torch

from sensorium.config import MIB, EngineConfig
from sensorium.engine.loading import load_model
from sensorium.kernels import ops
from sensorium.kernels.cpu import threads
from sensorium.models import loader
from sensorium.models.interface import LoadableModel
from sensorium.models.loading.fill import weight_bytes
from sensorium.multimodal.items import Features
from sensorium.runtime.soundness import finite_parts

logger = logging.getLogger(__name__)


class Encoded(NamedTuple):
    """Bits of an item's embeddings, uint8 (num_embeds, bytes of one), of numbers in ``dtype``."""

    bits: np.ndarray
    dtype: str


class ItemEncoder:
    """Towers and projectors of a model; the weights of its decoder are not read.

    Called by one thread at a time. ``num_threads``: of computing on CPUs, as chosen if None. Raises
    ConfigError when the model cannot be loaded or has no encoders that run alone.
    """

    def __init__(self, config: EngineConfig, num_threads: int | None = None) -> None:
        device = loader.find_device(config.model.device)
        if device.type == "cpu":
            threads.configure(config.model.num_threads or num_threads)
        model = load_model(config, str(device), encoders_only=True).model
        ops.warm_up(model.dtype, device)
        self._model = model
        self.weight_bytes = weight_bytes(cast(LoadableModel, model))
        logger.info("weights of the encoders: %.1f MiB", self.weight_bytes / MIB)

    def encode(self, features: Features) -> Encoded | None:
        """Return the embeddings of an item with the bits that an engine would make of it.

        None where that fails, which is logged, or the embeddings are not finite.
        """
        try:
            with torch.inference_mode():
                [embeds] = self._model.encode([features])
                if embeds.shape[0] != features.num_embeds:
                    raise RuntimeError(
                        f"the encoder made {embeds.shape[0]} embeddings of {features.num_embeds}"
                    )
                if not finite_parts([embeds])[0]:
                    return None
                held = embeds.to(self._model.dtype).cpu().contiguous()
                dtype = str(held.dtype).removeprefix("torch.")
                return Encoded(held.view(torch.uint8).numpy(), dtype)
        except Exception:
            logger.exception("an item could not be encoded")
            return None
