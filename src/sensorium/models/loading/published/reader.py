"""Finding of the weights of a checkpoint that are stored quantized, by their tensors' names.

The names decide for each weight: what tools were told not to convert, such as towers and heads, has
a plain weight. The settings say what names and shapes leave open.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from sensorium.models.interface import Part
from sensorium.models.loading.coded import CodedWeight
from sensorium.models.loading.published.awq import AwqWeight
from sensorium.models.loading.published.bitsandbytes import STATES, FourBitWeight, Int8Rows
from sensorium.models.loading.published.compressed_tensors import CompressedWeight
from sensorium.models.loading.published.fp8 import Fp8Weight
from sensorium.models.loading.published.gptq import GptqWeight
from sensorium.models.loading.published.mlx import MlxWeight
from sensorium.models.loading.published.settings import Settings
from sensorium.models.loading.published.tensors import FP8, Tensors

_WEIGHT = ".weight"
UNUSED = (
    r".*\.(input|output|activation|k|v|q|prob)_scale",
    r".*\.(input|output)_(zero_point|global_scale)",
    r".*\.input_scale_ub",
    r".*\.weight_format",
    r".*\.g_idx",
)
"""Regular expressions of names of tensors beside quantized weights that are not needed: of
activations, which are quantized as they come, and of caches."""


class StoredWeight(Protocol):
    """A weight in the form of one format."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of its tensors."""
        ...

    def check(self, shape: tuple[int, int]) -> None:
        """Raise ConfigError unless the tensors hold a weight (N, K). Reads none of them."""
        ...

    def read(self, shape: tuple[int, int]) -> CodedWeight:
        """Return the weight (N, K). Raises ConfigError for values that cannot be."""
        ...


class PublishedWeights:
    """Quantized weights among the tensors of a checkpoint."""

    def __init__(self, tensors: Tensors, settings: Settings | None) -> None:
        """Look among ``tensors``; settings: None where the checkpoint says nothing."""
        self._tensors = tensors
        self.has_settings = settings is not None
        self._settings = settings or Settings("unknown method", {}, "config.json")

    def find(self, name: str) -> StoredWeight | None:
        """Return the weight of this name, such as ``layers.0.mlp.down_proj.weight``.

        None where it is stored plain, or not at all.
        """
        if not name.endswith(_WEIGHT):
            return None
        base, tensors = name.removesuffix(_WEIGHT), self._tensors
        if name in tensors:
            make = self._beside(base, name)
        elif f"{base}.qweight" in tensors:
            make = AwqWeight if self._is_awq(base) else GptqWeight
        elif f"{base}.weight_packed" in tensors:
            make = CompressedWeight
        else:
            make = None
        return None if make is None else make(base, tensors, self._settings)

    def _beside(self, base: str, name: str) -> Callable[..., StoredWeight] | None:
        """Return the form of a weight that is stored under its own name."""
        tensors = self._tensors
        if any(f"{name}.{state}" in tensors for state in STATES):
            return FourBitWeight
        dtype = tensors.dtype(name)
        is_bitsandbytes = self._settings.method == "bitsandbytes"
        if f"{base}.SCB" in tensors or (dtype == "I8" and is_bitsandbytes):
            return Int8Rows
        if dtype == "U32" or all(f"{base}.{end}" in tensors for end in ("scales", "biases")):
            return MlxWeight
        if dtype in FP8 and self._is_scaled(base):
            return Fp8Weight
        return CompressedWeight if dtype == "I8" and self._is_scaled(base) else None

    def _is_scaled(self, base: str) -> bool:
        """Return whether there are scales, or whether there should be."""
        scales = f"{base}.weight_scale", f"{base}.weight_scale_inv"
        return self._settings.problem() is None or any(name in self._tensors for name in scales)

    def _is_awq(self, base: str) -> bool:
        """Return whether ``qweight`` is AWQ's; by shapes where no settings say it."""
        if self._settings.method in ("awq", "gptq"):
            return self._settings.method == "awq"
        words, scales = f"{base}.qweight", f"{base}.scales"
        if scales not in self._tensors or f"{base}.g_idx" in self._tensors:
            return False
        widths = [self._tensors.shape(name)[-1:] for name in (words, scales)]
        return widths[0] != widths[1]

    @property
    def has_channels_last(self) -> bool:
        """Kernels of convolutions have their channels last, as MLX has them."""
        return self._settings.method == "mlx"

    def check(self, part: Part, stored: StoredWeight) -> None:
        """Raise ConfigError unless a weight has the shape of its part."""
        stored.check(_matrix(part, stored, self._tensors))

    def read(self, part: Part, stored: StoredWeight) -> CodedWeight:
        """Return a weight, checked."""
        shape = _matrix(part, stored, self._tensors)
        stored.check(shape)
        return stored.read(shape)


def _matrix(part: Part, stored: StoredWeight, tensors: Tensors) -> tuple[int, int]:
    """Return the shape of a part. Raises ConfigError if it is no matrix."""
    if len(part.shape) != 2:
        raise tensors.error(stored.names[0], f"is quantized, though its shape is {part.shape}")
    return part.shape[0], part.shape[1]
