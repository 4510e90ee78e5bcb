"""Settings that Ray reads when it is imported."""

from __future__ import annotations

import os

_QUIET = {
    "RAY_DEDUP_LOGS": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
}


def prepare_serving() -> None:
    """Keep messages of Ray Serve from among ours, and Ray from what signals do here.

    Only before Ray is imported; what the environment sets is kept.
    """
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
