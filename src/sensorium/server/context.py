"""What the routes of one server share. It hangs on the application; there are no module globals."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from fastapi import Request

from sensorium.config import ServerConfig
from sensorium.errors import InvalidRequestError, ModelNotFoundError
from sensorium.metrics.prometheus import ServingMetrics
from sensorium.models.embedder import POOLS
from sensorium.server.admission import Admission
from sensorium.server.http.encoding import MOST_AT_ONCE
from sensorium.server.openai.logprobs import TokenSpelling
from sensorium.server.turns import Turns

if TYPE_CHECKING:
    from sensorium.engine.serving.frontend import Frontend


@dataclass(slots=True)
class ServingContext:
    """The front end, the configuration, and the little state that the server has of its own.

    ``num_in_flight`` counts HTTP requests that have not been answered completely. ``turns`` are for work that holds the
    event loop, ``unpacking`` has places for compressed bodies.
    """

    frontend: Frontend
    config: ServerConfig
    metrics: ServingMetrics
    admission: Admission
    spelling: TokenSpelling
    started_at: int = field(default_factory=lambda: int(time.time()))
    num_in_flight: int = 0
    turns: Turns = field(default_factory=Turns)
    unpacking: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MOST_AT_ONCE))
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names that requests may use; the first is the one that answers carry."""
        return self.config.served_model_name or (self.frontend.config.model.model,)

    def check_model(self, name: str | None) -> str:
        """The name for the answer. Raises ModelNotFoundError when ``name`` is not served here."""
        if name is None:
            return self.model_names[0]
        if name not in self.model_names:
            served = ", ".join(map(repr, self.model_names))
            raise ModelNotFoundError(
                f"Model {name[:200]!r} is not served here; it is {served}.", param="model"
            )
        return name

    def check_generates(self) -> None:
        """Raise InvalidRequestError when the model returns embeddings here."""
        if self.frontend.input_processor.runner == "pooling":
            raise InvalidRequestError(POOLS)

    def engine_id(self, request_id: str) -> str:
        """An id that no other request of this server has, though callers may repeat theirs."""
        return f"{request_id}-{next(self._numbers)}"


def context_of(request: Request) -> ServingContext:
    """The context of the application that got ``request``."""
    return cast(ServingContext, request.app.state.context)


def tenant_of_key(key: bytes) -> str:
    """A name for the holder of an API key, from which the key cannot be told."""
    return hashlib.sha256(b"sensorium tenant\0" + key).hexdigest()[:32]


def tenant_of(request: Request) -> str:
    """Whose request this is; empty when the server asks for no key."""
    return str(request.scope["state"].get("tenant", ""))


def request_id_of(request: Request, wanted: str | None) -> str:
    """The id of the request: the body's, else the one that the gate gave it. The answer's header
    carries it too.
    """
    state = request.scope["state"]
    if wanted:
        state["request_id"] = wanted
    return str(state["request_id"])
