"""Sensorium on Ray: replicas of an engine, online with Ray Serve and offline with Ray Data.

Needs the extra: ``pip install "sensorium[ray]"``. Nothing here is imported with ``sensorium``.

- ``build_app``: the application of a Serve configuration file,
  ``import_path: sensorium.ray:build_app``.
"""

from __future__ import annotations

from typing import Any

__all__ = ["build_app"]

_PLACES = {"build_app": "sensorium.ray.serving.app"}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name in _PLACES:
        import importlib

        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
