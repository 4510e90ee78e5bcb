"""Facts of a server that its page shows and acts on."""

from __future__ import annotations

from typing import Any

from sensorium import __version__
from sensorium.server.context import ServingContext
from sensorium.server.models.served import ServedModel


def facts(context: ServingContext, name: str | None = None) -> dict[str, Any]:
    """Return a model, what it takes, its limits and its sampling defaults, and all models' states.

    ``name``: a name of the model; None: the first. What is not known before the first load of a
    model is None. Raises ModelNotFoundError.
    """
    model = context.models.find(name)
    known = model.facts
    modalities = known.modalities if known is not None else None
    return {
        "version": __version__,
        "model": model.name if name is None else name,
        "root": model.name,
        "models": [_state(model) for model in context.models],
        "runner": known.runner if known is not None else None,
        "modalities": ["text", *modalities] if modalities is not None else None,
        "documents": modalities is None or "image" in modalities,
        "max_model_len": known.max_model_len if known is not None else None,
        "max_body_bytes": context.config.max_body_bytes,
        "metrics_prefix": context.config.metrics_prefix,
        "sampling": known.sampling if known is not None else {},
    }


def _state(model: ServedModel) -> dict[str, Any]:
    return {"name": model.name, "state": model.state, "reason": model.reason}
