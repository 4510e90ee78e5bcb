"""Lines of the log that replicas write, and what Ray says of lost processes, in our own log."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

from sensorium import environment

logger = logging.getLogger(__name__)

_RAY_HANDLER = "ray_print_logs"
_RAYLET = "raylet"
_MEMORY = "memory pressure"
"""In what Ray says where it has ended processes since memory ran out."""


def show_logs() -> None:
    """Write the lines of replicas as they are, in place of what Ray makes of them.

    Messages of Ray's own processes are left out. Where Ray has changed inside, its way stays.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

        dispatcher.remove_handler(_RAY_HANDLER)
        dispatcher.add_handler(_RAY_HANDLER, _write)


@contextlib.contextmanager
def losses_logged() -> Iterator[None]:
    """Log what Ray's own processes say, in place of the pages that Ray prints for each loss.

    That a process was lost, or a call of it failed, is news of a level below warnings: its rows run
    again, and the run says what has become of them. That memory has run out is a warning. Where Ray
    has changed inside, and while debugging, its way stays.
    """
    from ray._private import worker

    before = getattr(worker, "print_to_stdstream", None)
    if before is None or environment.log_level() == "DEBUG":
        yield
        return
    setattr(worker, "print_to_stdstream", _log)  # noqa: B010
    try:
        yield
    finally:
        setattr(worker, "print_to_stdstream", before)  # noqa: B010


def _log(batch: dict[str, Any], *_: Any, **__: Any) -> None:
    """Log a message of Ray's own processes."""
    if batch.get("pid") != _RAYLET:
        return
    for text in batch.get("lines", ()):
        level = logging.WARNING if _MEMORY in text.lower() else logging.INFO
        logger.log(level, "Ray: %s", text)


def _write(batch: dict[str, Any]) -> None:
    """Write a batch of lines of one process."""
    actor = str(batch.get("actor_name") or "")
    if not actor.startswith("ServeReplica:"):
        return
    # Of "ServeReplica:<application>:<deployment>" the deployment.
    name = f"{actor.rpartition(':')[2]} {batch.get('pid')}"
    for line in batch.get("lines", ()):
        print(f"[{name}] {line}", file=sys.stderr, flush=True)
