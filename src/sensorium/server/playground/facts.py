"""Facts of a server that its page shows and acts on."""

from __future__ import annotations

from typing import Any

from sensorium import __version__
from sensorium.server.context import ServingContext


def facts(context: ServingContext) -> dict[str, Any]:
    """Return the model, what it takes, its limits and its sampling defaults."""
    processor = context.frontend.input_processor
    modalities = processor.modalities
    generates = processor.runner != "pooling"
    return {
        "version": __version__,
        "model": context.model_names[0],
        "runner": processor.runner,
        "modalities": ["text", *modalities],
        "documents": "image" in modalities,
        "max_model_len": context.frontend.max_model_len,
        "max_body_bytes": context.config.max_body_bytes,
        "metrics_prefix": context.config.metrics_prefix,
        "sampling": processor.default_params if generates else {},
    }
