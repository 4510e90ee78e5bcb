"""Extension of griffe, which reads docstrings for the site.

Defaults and ranges of dataclasses' fields.

``n: int = bounded(1, ge=1, le=16384)`` is shown with the default 1, and its range follows its
description.
"""

from __future__ import annotations

import ast
import importlib
import re
from typing import Any

import griffe

from sensorium.bounds import UNBOUNDED, bounds_of


class Ranges(griffe.Extension):
    """Show fields made by ``sensorium.bounds.bounded`` as what they are."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Replace the call by its first argument, the default."""
        value = attr.value
        if isinstance(value, griffe.ExprCall) and str(value.function) == "bounded":
            attr.value = value.arguments[0]

    def on_class_members(self, *, cls: griffe.Class, node: ast.AST | Any, **_: Any) -> None:
        """Add the ranges to the descriptions."""
        if cls.docstring is None or "dataclass" not in decorators(node):
            return
        fields = getattr(importlib.import_module(cls.module.path), cls.name).__dataclass_fields__
        for name, field in fields.items():
            if (bounds := bounds_of(field)) != UNBOUNDED:
                described = rf"^( +{name}: .*(?:\n {{8,}}\S.*)*)"
                text = re.sub(described, rf"\1 Range: {bounds}.", cls.docstring.value, flags=re.M)
                cls.docstring.value = text


def decorators(node: Any) -> set[str]:
    """Return the names of a class's decorators."""
    found = [getattr(one, "func", one) for one in getattr(node, "decorator_list", [])]
    return {one.id for one in found if isinstance(one, ast.Name)}
