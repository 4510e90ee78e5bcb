"""Encoding of media outside an engine: the encoders of a model alone, without its decoder."""

from __future__ import annotations

import logging
from typing import cast

import numpy as np
import torch

from sensorium.config import MIB, EngineConfig
from sensorium.engine.loading import load_model, numerics, same_on_threads
from sensorium.kernels import ops
from sensorium.kernels.cpu import threads
from sensorium.models import loader
from sensorium.models.interface import LoadableModel
from sensorium.models.loading.fill import weight_bytes
from sensorium.multimodal.items import Features
from sensorium.runtime.soundness import finite_parts

logger = logging.getLogger(__name__)


class ItemEncoder:
    """Towers and projectors of a model; the weights of its decoder are not read.

    Called by one thread at a time. ``num_threads``: of computing on CPUs, as chosen if None.
    ``engine_threads``: those of the engine whose bits are wanted, which count where bits depend on
    them. ``dtype`` and ``numerics``: as in ``EngineFacts``.

    Raises ConfigError when the model cannot be loaded or has no encoders that run alone.
    """

    def __init__(
        self, config: EngineConfig, num_threads: int | None = None, engine_threads: int = 0
    ) -> None:
        device = loader.find_device(config.model.device)
        used = 0
        if device.type == "cpu":
            used = threads.configure(config.model.num_threads or num_threads).number
        loaded = load_model(config, str(device), encoders_only=True)
        model = loaded.model
        if used and engine_threads and not same_on_threads(loaded.family, model.dtype):
            used = threads.configure(engine_threads).number
        ops.warm_up(model.dtype, device)
        self._model = model
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.numerics = numerics(loaded.family, model.dtype, model.device, used)
        self.weight_bytes = weight_bytes(cast(LoadableModel, model))
        logger.info("weights of the encoders: %.1f MiB", self.weight_bytes / MIB)

    def encode(self, features: Features) -> np.ndarray | None:
        """Return the embeddings of an item with the bits that an engine would make of it.

        uint8 (num_embeds, bytes of one), of numbers in ``dtype``. None where that fails, which is
        logged, or the embeddings are not finite.
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
                bits: np.ndarray = held.view(torch.uint8).numpy()
                return bits
        except Exception:
            logger.exception("an item could not be encoded")
            return None
