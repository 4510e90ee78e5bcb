"""Tensors of a checkpoint's files, checked before they are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sensorium.errors import ConfigError

FLOATS = ("F32", "F16", "BF16")
"""Types of plain numbers, as safetensors names them."""
FP8 = ("F8_E4M3", "F8_E5M2")
MOST_SMALL_BYTES = 1 << 16
"""Bytes of a tensor that holds text."""


class Tensors:
    """Tensors of open safetensors files by our names."""

    def __init__(self, files: Mapping[str, tuple[Any, str]]) -> None:
        """Take (open file, name in it) by our names."""
        self._files = files

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def own_name(self, name: str) -> str:
        """Return a tensor's name in its file, for messages."""
        return self._files[name][1] if name in self._files else name

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor that is there."""
        file, own = self._files[name]
        return tuple(file.get_slice(own).get_shape())

    def dtype(self, name: str) -> str:
        """Return the type of a tensor that is there, such as ``BF16``."""
        file, own = self._files[name]
        return str(file.get_slice(own).get_dtype())

    def check(
        self, name: str, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[str, ...]
    ) -> None:
        """Raise ConfigError unless a tensor is there with one of the shapes and types."""
        if name not in self._files:
            raise self.error(name, "is missing")
        shape, dtype = self.shape(name), self.dtype(name)
        if dtype not in dtypes:
            raise self.error(name, f"is stored as {dtype}, not {' or '.join(dtypes)}")
        if shape not in shapes:
            expected = " or ".join(map(str, shapes))
            raise self.error(name, f"is {shape}, not {expected}, as the layer needs")

    def check_rank(self, name: str, rank: int, dtypes: tuple[str, ...]) -> None:
        """Raise ConfigError unless a tensor is there with so many axes and one of the types."""
        if name not in self._files:
            raise self.error(name, "is missing")
        shape, dtype = self.shape(name), self.dtype(name)
        if len(shape) != rank or dtype not in dtypes:
            expected = " or ".join(dtypes)
            raise self.error(name, f"is {shape} {dtype}, not {rank} axes of {expected}")

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, mapped."""
        file, own = self._files[name]
        tensor: torch.Tensor = file.get_tensor(own)
        return tensor

    def read_finite(self, name: str) -> torch.Tensor:
        """Return a tensor, mapped. Raises ConfigError if it has numbers that are not finite."""
        tensor = self.read(name)
        if not bool(tensor.float().isfinite().all()):
            raise self.error(name, "has numbers that are not finite")
        return tensor

    def error(self, name: str, problem: str) -> ConfigError:
        """Return the error of a tensor."""
        return ConfigError(
            f"The quantized checkpoint is damaged or of an unknown form: tensor "
            f"{self.own_name(name)} {problem}.",
            param="model",
        )
