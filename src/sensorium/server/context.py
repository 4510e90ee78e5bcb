"""State that the routes of one server share, and the part of it that belongs to one model."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from fastapi import Request

from sensorium.config import ServerConfig
from sensorium.errors import InvalidRequestError
from sensorium.metrics.prometheus import ServerMetrics
from sensorium.metrics.servers import OtherServers
from sensorium.models.embedder import POOLS
from sensorium.server.admission import Admission, Arrivals
from sensorium.server.http.encoding import MOST_AT_ONCE
from sensorium.server.responses.store import ResponseStore
from sensorium.server.turns import Turns
from sensorium.text.detokenizer import TokenSpelling
from sensorium.text.tools.forms import AnswerForms

if TYPE_CHECKING:
    from sensorium.engine.serving.frontend import Frontend
    from sensorium.server.batches.store import BatchStore
    from sensorium.server.files.store import FileStore
    from sensorium.server.models.lookup import ServedModels
    from sensorium.server.models.served import ServedModel


@dataclass(slots=True)
class ServingContext:
    """The models, the configuration, and the state of the HTTP server itself.

    ``models`` finds the model of a request. ``metrics``: those of requests that name no model.
    ``num_in_flight`` counts HTTP requests that have not been answered completely. ``turns`` spreads
    work that blocks the event loop; ``unpacking`` limits how many bodies are decompressed at once.
    ``background``: by tenant and id, the responses that are made without a connection.
    ``ask_others``: gets the metrics of other processes for HTTP; None where there are none.
    """

    config: ServerConfig
    models: ServedModels
    metrics: ServerMetrics
    responses: ResponseStore
    files: FileStore
    batches: BatchStore = field(init=False)
    arrivals: Arrivals = field(default_factory=Arrivals)
    started_at: int = field(default_factory=lambda: int(time.time()))
    num_in_flight: int = 0
    turns: Turns = field(default_factory=Turns)
    unpacking: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MOST_AT_ONCE))
    background: dict[tuple[str, str], asyncio.Task[None]] = field(default_factory=dict)
    ask_others: Callable[[], Coroutine[Any, Any, OtherServers]] | None = None
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    async def update_metrics(self) -> None:
        """Set the statistics of all engines, and of media, for the next answer of ``/metrics``."""
        found = await asyncio.gather(*(model.stats() for model in self.models))
        for model, stats in zip(self.models, found, strict=True):
            up = model.state == "ready" and not self.arrivals.draining
            if replicas := await model.replica_stats():
                model.metrics.update_replicas(replicas, model.media_stats(), up=up)
                model.metrics.update_encoders(model.encoder_stats())
            else:
                model.metrics.update(stats, up=up)

    def engine_id(self, request_id: str) -> str:
        """Return an id that is unique in this server, though callers may repeat theirs."""
        return f"{request_id}-{next(self._numbers)}"


@dataclass(frozen=True, slots=True)
class ModelContext:
    """One model while its engine runs: the front of the engine, and the state of the server.

    ``server``: the state that all models share. ``config``: the server's options as they hold for
    this model. ``forms``: how the model writes tool calls and reasoning.
    """

    server: ServingContext
    model: ServedModel
    config: ServerConfig
    frontend: Frontend
    admission: Admission
    spelling: TokenSpelling
    forms: AnswerForms

    @property
    def files(self) -> FileStore:
        """Return the uploads, which all models share."""
        return self.server.files

    @property
    def responses(self) -> ResponseStore:
        """Return the stored responses, which all models share."""
        return self.server.responses

    def model_name(self, asked: str | None) -> str:
        """Return the model's name in an answer: the one that the request uses, else its first."""
        return self.model.names[0] if asked is None else asked

    def check_generates(self) -> None:
        """Raise InvalidRequestError when the model computes embeddings and generates no text."""
        if self.frontend.input_processor.runner == "pooling":
            raise InvalidRequestError(POOLS)

    def engine_id(self, request_id: str) -> str:
        """Return an id that is unique in this server."""
        return self.server.engine_id(request_id)


def context_of(request: Request) -> ServingContext:
    """Return the context of the application that got ``request``."""
    return cast(ServingContext, request.app.state.context)


def tenant_of_key(key: bytes) -> str:
    """Return a name for the holder of an API key that does not reveal the key."""
    return hashlib.sha256(b"sensorium tenant\0" + key).hexdigest()[:32]


def tenant_of(request: Request) -> str:
    """Return the tenant of a request; empty when the server asks for no key."""
    return str(request.scope["state"].get("tenant", ""))


def priority_of(request: Request, wanted: int | None) -> int:
    """Return the priority of a request, whose client wants one; those of batches come last."""
    return (wanted or 0) + int(request.scope["state"].get("priority", 0))


def request_id_of(request: Request, wanted: str | None) -> str:
    """Return the id of a request: that of its body, else of the ``X-Request-Id`` header, else new.

    The answer's ``X-Request-Id`` header has it, too.
    """
    state = request.scope["state"]
    if wanted:
        state["request_id"] = wanted
    return str(state["request_id"])
