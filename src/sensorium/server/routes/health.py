"""``/health``, ``/ping``, ``/version`` and ``/metrics``."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from sensorium import __version__
from sensorium.metrics.prometheus import CONTENT_TYPE
from sensorium.server.context import ServingContext, context_of
from sensorium.server.payload import JsonResponse


def health_router() -> APIRouter:
    """Return the router of health, version and metrics."""
    router = APIRouter()

    @router.head("/health", response_model=None, include_in_schema=False)
    @router.get("/health", response_model=None)
    async def health(request: Request) -> Response:
        """Answer 200 while requests to at least one model can be served, else 503."""
        _check_alive(context_of(request))
        return JsonResponse({"status": "ok"})

    @router.post("/ping", response_model=None)
    @router.get("/ping", response_model=None)
    async def ping(request: Request) -> Response:
        """Answer as /health does, under the name that some platforms use."""
        _check_alive(context_of(request))
        return JsonResponse({"status": "ok"})

    @router.get("/version", response_model=None)
    async def version() -> Response:
        """Return the version of Sensorium."""
        return JsonResponse({"version": __version__})

    @router.get("/metrics", response_model=None)
    async def metrics(request: Request) -> Response:
        """Return all metrics in Prometheus' text format, those of other processes for HTTP as well.

        While a model has no engine its metrics keep their last values.
        """
        context = context_of(request)
        ask = context.ask_others
        others = None if ask is None else asyncio.create_task(ask())
        await context.update_metrics()
        gathered = None if others is None else await others
        text = await asyncio.to_thread(context.metrics.render, gathered)
        return Response(text, headers={"content-type": CONTENT_TYPE})

    return router


def _check_alive(context: ServingContext) -> None:
    context.arrivals.check()
    if not context.models.is_available:
        context.models.default.check_available()
