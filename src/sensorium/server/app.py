"""The application: routes, middleware, and the description of the API."""

from __future__ import annotations

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware

from sensorium import __version__
from sensorium.config import ServerConfig
from sensorium.metrics.prometheus import ServerMetrics, ServingMetrics
from sensorium.server.adapters.routes import adapters_router
from sensorium.server.batches.calls import AppCaller
from sensorium.server.batches.store import BatchStore
from sensorium.server.context import ServingContext
from sensorium.server.errors import install_error_handlers
from sensorium.server.files.store import FileStore
from sensorium.server.http.auth import OPEN_PATHS, ApiKeyGuard, ApiKeys
from sensorium.server.http.middleware import BodyLimit, HeadAsGet, RequestTracking
from sensorium.server.models.lookup import ServedModels
from sensorium.server.openapi import describe
from sensorium.server.playground.routes import open_paths as playground_paths
from sensorium.server.playground.routes import playground_router
from sensorium.server.responses.store import ResponseStore
from sensorium.server.routes.audio import audio_router
from sensorium.server.routes.batches import batches_router
from sensorium.server.routes.chat import chat_router
from sensorium.server.routes.completions import completions_router
from sensorium.server.routes.embeddings import embeddings_router
from sensorium.server.routes.files import files_router
from sensorium.server.routes.health import health_router
from sensorium.server.routes.messages import messages_router
from sensorium.server.routes.models import models_router
from sensorium.server.routes.responses import responses_router
from sensorium.server.routes.scores import scores_router
from sensorium.server.routes.tokenize import tokenize_router

UPLOADS = "/v1/files"
FORM_BYTES = 1 << 20
"""Bytes of an upload besides its file."""


def build_app(models: ServedModels, config: ServerConfig) -> FastAPI:
    """Return the application that serves ``models``, which the caller starts and closes.

    Raises ConfigError for a metrics prefix that Prometheus does not allow.
    """
    kind, label = (ServingMetrics, models.default.name) if len(models) == 1 else (ServerMetrics, "")
    metrics = kind(config.metrics_prefix, model_name=label)
    context = ServingContext(
        config=config,
        models=models,
        metrics=metrics,
        responses=ResponseStore(
            config.response_store_entries,
            config.response_store_bytes,
            config.response_store_seconds,
            max_history_bytes=config.max_body_bytes,
        ),
        files=FileStore(config),
    )
    models.attach(context)
    app = FastAPI(
        title="Sensorium",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.context = context
    most_seqs = max(model.engine_config.scheduler.max_num_seqs for model in models)
    context.batches = BatchStore(
        config,
        context.files,
        lambda tenant: AppCaller(app, tenant, below=True),
        config.max_batch_requests or max(1, most_seqs // 2),
    )
    for router in _routers(config):
        app.include_router(router)
    install_error_handlers(app)
    _add_middleware(app, context)
    return app


def _routers(config: ServerConfig) -> list[APIRouter]:
    return [
        adapters_router(),
        audio_router(),
        batches_router(),
        chat_router(),
        completions_router(),
        responses_router(),
        messages_router(),
        embeddings_router(),
        scores_router(),
        files_router(),
        models_router(),
        tokenize_router(),
        health_router(),
        *([playground_router()] if config.playground else []),
    ]


def _add_middleware(app: FastAPI, context: ServingContext) -> None:
    """Add the middleware; the one added last is the outermost."""
    config = context.config
    open_paths = set(OPEN_PATHS)
    if not config.metrics_require_api_key:
        open_paths.add("/metrics")
    if config.playground:
        open_paths |= playground_paths()
    open_paths |= {config.root_path + path for path in open_paths}
    paths = frozenset(open_paths)
    app.add_middleware(ApiKeyGuard, keys=ApiKeys(config.api_key), open_paths=paths)
    describe(app, keys=bool(config.api_key), open_paths=paths)
    uploads = dict.fromkeys(
        (UPLOADS, config.root_path + UPLOADS), config.max_file_bytes + FORM_BYTES
    )
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes, uploads=uploads)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.allowed_origins),
            allow_methods=list(config.allowed_methods),
            allow_headers=list(config.allowed_headers),
            allow_credentials=config.allow_credentials,
            expose_headers=["X-Request-Id", "X-Sensorium-Warning"],
        )
    app.add_middleware(HeadAsGet)
    app.add_middleware(RequestTracking, context=context)
