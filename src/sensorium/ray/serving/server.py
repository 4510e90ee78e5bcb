"""The deployment that answers HTTP requests: the whole application, without an engine."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi import FastAPI
from ray import serve
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sensorium import environment
from sensorium.config import GIB, EngineConfig, ServedConfig
from sensorium.engine.serving.frontend import Frontend
from sensorium.ray.encoders.client import Encoders, share_of_store
from sensorium.ray.media.features import FeaturesOut
from sensorium.ray.media.names import NamesElsewhere
from sensorium.ray.serving.engines import RayEngines
from sensorium.ray.serving.scrape import Answer, Neighbours, to_all
from sensorium.server.app import build_app
from sensorium.server.context import ServingContext
from sensorium.server.http.loop_lag import LagSampler
from sensorium.server.launch import configure_logging, drain, reduce_pauses
from sensorium.server.models.lookup import ServedModels
from sensorium.server.models.served import ServedModel

logger = logging.getLogger("sensorium.server")


class Server:
    """One process that answers HTTP requests, in front of the engines behind ``handle``.

    ``names``: handle of the directory of the media that clients name by ids, None for one process
    alone. ``encoders``: handle of the encoders, None where engines encode media.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits it
        self, config: ServedConfig, handle: Any, names: Any = None, encoders: Any = None
    ) -> None:
        configure_logging(config.server)
        environment.set_progress(False)
        self._config = config
        features = FeaturesOut()
        apart = None if encoders is None else self._encoders(encoders, features)
        self._engines = RayEngines(handle, features, apart)
        self._names = None if names is None else NamesElsewhere(names, features)
        self._models = ServedModels([ServedModel(config, self._start)], None)
        self._app = build_app(self._models, config.server)
        self._context: ServingContext = self._app.state.context
        await self._models.start()
        self._lag = LagSampler(self._context.metrics.loop_lag)
        self._lag.__enter__()
        self._name = serve.get_replica_context().replica_id.unique_id
        if config.server.api_server_count > 1:
            num_servers = config.server.api_server_count
            self._context.ask_others = Neighbours(self._name, num_servers, to_all("metrics")).ask
        reduce_pauses()

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the application; Ray Serve asks for it after the start."""
        return _Answers(self._app)

    async def metrics(self) -> Answer:
        """Return the metrics of this process, for another one that is scraped."""
        await self._context.update_metrics()
        return self._name, await asyncio.to_thread(self._context.metrics.of_process)

    async def drain(self) -> None:
        """Refuse new requests, and let running ones end, or end them when their time is over."""
        await self._context.batches.close()
        await drain(self._context, asyncio.Event())
        await self._engines.stop()

    async def __del__(self) -> None:
        self._lag.__exit__()
        await self._context.batches.close()
        await self._models.close()
        self._context.files.close()

    async def _start(self, engine: EngineConfig) -> Frontend:
        return await Frontend.start(
            engine,
            trust_request_chat_template=self._config.server.trust_request_chat_template,
            engine=self._engines,
            elsewhere=self._names,
        )

    def _encoders(self, handle: Any, features: FeaturesOut) -> Encoders:
        server = self._config.server
        share = share_of_store(server.api_server_count)
        most_kept = int(server.shared_embeddings_gb * GIB) // server.api_server_count
        return Encoders(handle, features, most_kept=min(most_kept, share), most_waiting=share)


class _Answers:
    """The application, without the header that Ray Serve's proxy adds itself.

    The proxy gives each request an ``X-Request-Id``, and each answer the same one.
    """

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if headers.get("x-request-id") == given:
                    del headers["x-request-id"]
            await send(message)

        await self._app(scope, receive, answer)


def ingress() -> Any:
    """Return the class of the deployment."""
    return serve.ingress()(Server)
