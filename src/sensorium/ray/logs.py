"""Lines of the log that replicas write, in this program's own log."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

_RAY_HANDLER = "ray_print_logs"


def show_logs() -> None:
    """Write the lines of replicas as they are, in place of what Ray makes of them.

    Messages of Ray's own processes are left out. Where Ray has changed inside, its way stays.
    """
    with contextlib.suppress(ImportError, AttributeError):
        from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

        dispatcher.remove_handler(_RAY_HANDLER)
        dispatcher.add_handler(_RAY_HANDLER, _write)


def _write(batch: dict[str, Any]) -> None:
    """Write a batch of lines of one process."""
    actor = str(batch.get("actor_name") or "")
    if not actor.startswith("ServeReplica:"):
        return
    # Of "ServeReplica:<application>:<deployment>" the deployment.
    name = f"{actor.rpartition(':')[2]} {batch.get('pid')}"
    for line in batch.get("lines", ()):
        print(f"[{name}] {line}", file=sys.stderr, flush=True)
