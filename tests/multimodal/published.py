"""Functions of the published video processors, taken out of their source.

To import them takes torchvision.
"""

from __future__ import annotations

import ast
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch


def published(model: str, name: str) -> Callable[..., Any]:
    """The function or method ``name`` of ``models/<model>/video_processing_<model>.py`` of
    transformers.
    """
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.submodule_search_locations
    root = Path(spec.submodule_search_locations[0])
    source = (root / "models" / model / f"video_processing_{model}.py").read_text()
    found = next(
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef) and node.name == name
    )
    module = ast.Module([*ast.parse("from __future__ import annotations").body, found], [])
    scope: dict[str, Any] = {"math": math, "np": np, "torch": torch}
    exec(compile(module, "published", "exec"), scope)
    return scope[name]
