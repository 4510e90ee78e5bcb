"""``GET /v1/models`` and ``GET /v1/models/{id}``."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from sensorium.server.context import ServingContext, context_of
from sensorium.server.payload import JsonResponse


def models_router() -> APIRouter:
    """Return the router of models."""
    router = APIRouter()

    @router.get("/v1/models", response_model=None)
    async def list_models(request: Request) -> Response:
        """List all names of the model."""
        context = context_of(request)
        cards = [_card(context, name) for name in context.model_names]
        return JsonResponse({"object": "list", "data": cards})

    @router.get("/v1/models/{name:path}", response_model=None)
    async def get_model(request: Request, name: str) -> Response:
        """Return one name of the model."""
        context = context_of(request)
        return JsonResponse(_card(context, context.check_model(name)))

    return router


def _card(context: ServingContext, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": context.started_at,
        "owned_by": "sensorium",
        "root": context.model_names[0],
        "parent": None,
        "max_model_len": context.frontend.max_model_len,
        "modalities": ["text", *context.frontend.input_processor.modalities],
    }
