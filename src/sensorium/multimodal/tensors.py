"""Whether a value is a torch tensor, asked where torch need not be there."""

from __future__ import annotations

import sys


def is_tensor(value: object) -> bool:
    """Whether the value is a torch tensor; torch is not imported for it.

    While another thread imports torch, the module is there already, without its classes: then nothing can be a tensor.
    """
    tensor = getattr(sys.modules.get("torch"), "Tensor", None)
    return tensor is not None and isinstance(value, tensor)
