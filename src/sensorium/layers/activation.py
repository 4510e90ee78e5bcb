"""Activation functions by the names that model configurations use."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sensorium.kernels.reference import ACTIVATIONS

Activation = Callable[[torch.Tensor], torch.Tensor]


def activation(name: str) -> Activation:
    """Return the function that configurations call ``name``.

    Raises ValueError with the known names for any other.
    """
    try:
        return ACTIVATIONS[name]
    except KeyError:
        known = ", ".join(sorted(ACTIVATIONS))
        raise ValueError(f"unknown activation {name!r}; known are {known}") from None
