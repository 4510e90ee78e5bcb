"""The stations of requests: lines in the log at level debug, Chrome traces, OpenTelemetry spans.

A station is a moment on a request's way, or a piece of work that has just ended. Its line has the
request's id and the milliseconds since the request arrived. All times are those of
``time.monotonic``, which on Linux is one clock for all processes of a machine, so that the times of
the engine's process need no conversion.

Neither lines nor traces hold content of requests, only ids, numbers, sizes and places such as
``messages[0].content[1]``.
"""

from sensorium.tracing.stations import (
    Fact,
    RequestTrace,
    Work,
    active,
    asked_model,
    caller_span,
    log_station,
    logger,
    station,
)
from sensorium.tracing.tracer import Tracer

__all__ = [
    "Fact",
    "RequestTrace",
    "Tracer",
    "Work",
    "active",
    "asked_model",
    "caller_span",
    "log_station",
    "logger",
    "station",
]
