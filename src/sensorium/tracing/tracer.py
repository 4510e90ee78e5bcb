"""Destinations of the traces of requests: a folder, a collector."""

from __future__ import annotations

import logging

from sensorium.tracing.chrome import TraceWriter
from sensorium.tracing.stations import (
    RequestTrace,
    Work,
    Writer,
    asked_model,
    caller_span,
    logger,
)


class Tracer:
    """Makes the traces of requests, where they are wanted.

    Args:
        folder: Where Chrome traces are written, if anywhere.
        endpoint: URL of the OpenTelemetry collector that gets spans, if any.
        model: The model of the requests, as configured.

    Raises:
        ConfigError: The folder cannot be written to, or spans cannot be sent.
    """

    def __init__(self, folder: str | None, endpoint: str | None = None, model: str = "") -> None:
        writers: list[Writer] = []
        if endpoint is not None:
            from sensorium.tracing.otel import SpanWriter

            writers.append(SpanWriter(endpoint))
        if folder is not None:
            writers.append(TraceWriter(folder))
        self._writers = tuple(writers)
        self._model = model

    def request(
        self, request_id: str, arrival: float, *, operation: str = "", adapter: str = ""
    ) -> RequestTrace | None:
        """Begin the trace of a request; None when neither the log nor a writer wants it.

        operation, adapter: as in ``Work``.
        """
        if not self._writers and not logger.isEnabledFor(logging.DEBUG):
            return None
        asked = asked_model.get() or adapter or self._model
        work = Work(operation, asked, self._model, adapter)
        return RequestTrace(request_id, arrival, self._writers, caller_span.get(), work)

    def close(self) -> None:
        """Write what is left."""
        for writer in self._writers:
            writer.close()
