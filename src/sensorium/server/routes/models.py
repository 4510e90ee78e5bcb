"""``GET /v1/models`` and ``GET /v1/models/{id}``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from sensorium.server.context import ServingContext, context_of
from sensorium.server.models.served import ServedModel, entry
from sensorium.server.payload import JsonResponse


def models_router() -> APIRouter:
    """Return the router of models."""
    router = APIRouter()

    @router.get("/v1/models", response_model=None)
    async def list_models(request: Request) -> Response:
        """List all names of all models, with the state of each, and their adapters."""
        context = context_of(request)
        cards = [
            _card(context, model, name)
            for model in context.models
            for name in (*model.names, *model.adapters)
        ]
        return JsonResponse({"object": "list", "data": cards})

    @router.get("/v1/models/{name:path}", response_model=None)
    async def get_model(request: Request, name: str) -> Response:
        """Return one name of a model."""
        context = context_of(request)
        return JsonResponse(_card(context, context.models.find(name), name))

    return router


def _card(context: ServingContext, model: ServedModel, name: str) -> dict[str, Any]:
    adapter = context.models.adapter_of(name)
    return {
        "id": name,
        "object": "model",
        "created": context.started_at,
        "owned_by": "sensorium",
        "root": adapter or model.name,
        "parent": model.name if adapter else None,
        **entry(model),
    }
