"""The extra ``ray``: the check that it is there, and what Ray reads when it is imported."""

from __future__ import annotations

import importlib.util
import os
import secrets

from sensorium.errors import ConfigError

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_DISABLE_FAILURE_SIGNAL_HANDLER": "1",
}
"""No report of use to Ray's makers, no messages of Ray among ours, and our own end at a signal."""
_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Where clusters of several machines are off, as elsewhere by default, Ray keeps to 127.0.0.1."""


def require_ray(*, own_cluster: bool) -> None:
    """Check that Ray Serve can be imported, and set what it reads at its import.

    ``own_cluster``: one is to be started here. Whoever reaches the ports of a cluster runs code on
    it, so a secret of this start guards them. Raises ConfigError, which says what to install.
    """
    if importlib.util.find_spec("ray") is None or importlib.util.find_spec("uvloop") is None:
        raise ConfigError(
            'Replicas run on Ray, which is not installed: pip install "sensorium[ray]".',
            param="data_parallel_size",
        )
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if own_cluster:
        os.environ.update(_LOOPBACK)
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
