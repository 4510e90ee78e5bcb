"""Sensorium on Ray: replicas of an engine, online with Ray Serve and offline with Ray Data.

Needs the extra: ``pip install "sensorium[ray]"``. Nothing here is imported with ``sensorium``.

- ``build_app``: the application of a Serve configuration file,
  ``import_path: sensorium.ray:build_app``.
- ``build_processor``: a model as a step of a pipeline of Ray Data.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sensorium.ray.data.processor import Processor, build_processor
    from sensorium.ray.serving.app import build_app

__all__ = ["Processor", "build_app", "build_processor"]

_PLACES = {
    "build_app": "sensorium.ray.serving.app",
    "Processor": "sensorium.ray.data.processor",
    "build_processor": "sensorium.ray.data.processor",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used. Raises ConfigError where Ray is missing."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)
