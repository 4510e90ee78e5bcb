"""Quantization of weights while a model is loaded: int8 per output, int4 in groups of 32 inputs.

Symmetric: a weight is a small integer times the scale of its group. The scale is the one of least
squared error among a few candidates; no data are needed. For given integers q of a group of weights
w, the best scale is <w, q> / <q, q>, with the error |w|^2 - <w, q>^2 / <q, q>. So the candidates'
integers are compared by <w, q>^2 / <q, q>, which must be large. The same search is made by the
k-quants of llama.cpp (Kawrakow, 2023).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from sensorium.errors import ConfigError
from sensorium.kernels import ops
from sensorium.kernels.weight import QuantizedTensor
from sensorium.models.interface import Family, WeightSlot

INT4_GROUP = 32
INT8_GROUP = 32
INT4_STEPS = (8.0, 7.8, 8.2, 7.6, 8.5, 7.3, 6.9, 8.9)
"""Integers, without sign, to which the weight of largest magnitude in a group is scaled in turn.

It gets the sign that -8 has, as -8 has no opposite. Beyond 8 it is cut off at -8."""
INT8_STEPS = (127.0, 131.0, 136.0, 144.0, 155.0)
"""Integers to which the largest weight of an output is scaled in turn; from 127.5 on, weights are
cut off at 127."""
BAND = 1 << 18
"""Weights that are quantized at once: their float32 copies stay in the CPU's caches."""

LEAST_SHARE = 0.01
"""Weight in the squared error of an input that is always zero; the mean of all is 1."""
_TINY = 1e-30

Quantize = Callable[[torch.Tensor], QuantizedTensor]
"""(N, K) of a floating dtype -> its quantized form."""


def int8(weight: torch.Tensor) -> QuantizedTensor:
    """Quantize (N, K) to 8 bits with a float32 scale per output. Integers are -127 to 127."""
    num_outputs, num_inputs = weight.shape
    values = torch.empty((num_outputs, num_inputs), dtype=torch.int8, device=weight.device)
    scales = torch.empty((num_outputs, 1), dtype=torch.float32, device=weight.device)
    for start, band in _bands(weight):
        own = slice(start, start + len(band))
        peaks = band.abs().amax(dim=1, keepdim=True)
        scale = _best_scale(band, peaks, INT8_STEPS, (-127, 127), dim=1)
        scales[own] = scale
        values[own] = _integers(band, scale, (-127, 127))
    return QuantizedTensor(values, scales, 8, num_inputs)


def int8_groups(weight: torch.Tensor) -> QuantizedTensor:
    """Quantize (N, K) to 8 bits with a scale per group of 32 inputs: nearly without loss."""
    num_inputs = weight.shape[1]
    padding = -num_inputs % INT8_GROUP
    groups = torch.nn.functional.pad(weight.float(), (0, padding)).unflatten(1, (-1, INT8_GROUP))
    scales = groups.abs().amax(dim=2) / 127
    values = _integers(groups, scales[:, :, None], (-127, 127)).flatten(1)[:, :num_inputs]
    return QuantizedTensor(values.contiguous(), scales, 8, INT8_GROUP)


def int4(weight: torch.Tensor, importance: torch.Tensor | None = None) -> QuantizedTensor:
    """Quantize (N, K) to 4 bits with a scale per group of 32 inputs.

    Integers are -8 to 7. Scales are numbers of bfloat16, and chosen as such before the integers
    are. importance (K,) float32: weights of the inputs in the squared error, such as their mean
    squares; all alike where it is None.
    """
    num_outputs, num_inputs = weight.shape
    num_groups = -(-num_inputs // INT4_GROUP)
    padding = num_groups * INT4_GROUP - num_inputs
    values = torch.empty((num_outputs, num_inputs), dtype=torch.int8, device=weight.device)
    scales = torch.empty((num_outputs, num_groups), dtype=torch.float32, device=weight.device)
    shares = None
    if importance is not None:
        shares = torch.nn.functional.pad(importance / importance.mean() + LEAST_SHARE, (0, padding))
        shares = shares.view(num_groups, INT4_GROUP).t().contiguous()[:, None]
    for start, band in _bands(weight):
        own, rows = slice(start, start + len(band)), len(band)
        if padding:
            band = torch.nn.functional.pad(band, (0, padding))
        # The inputs of a group come first, so that sums run over whole vectors.
        groups = band.view(rows, num_groups, INT4_GROUP).permute(2, 0, 1).contiguous()
        low, high = groups.amin(dim=0, keepdim=True), groups.amax(dim=0, keepdim=True)
        peaks = torch.where(high > -low, high, low)
        scale = _best_scale(groups, -peaks, INT4_STEPS, (-8, 7), 0, shares).bfloat16().float()
        scales[own] = scale[0]
        chosen = _integers(groups, scale, (-8, 7)).permute(1, 2, 0).reshape(rows, -1)
        values[own] = chosen[:, :num_inputs]
    return QuantizedTensor(values, scales, 4, INT4_GROUP)


QUANTIZERS: dict[str, Quantize] = {"int8": int8, "int4": int4}
"""Quantizers by the format that they make."""


class Deferred(Mapping[str, torch.Tensor]):
    """Mapping that is made when it is first used."""

    def __init__(self, make: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        self._make = make

    @functools.cached_property
    def _values(self) -> Mapping[str, torch.Tensor]:
        return self._make()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@dataclass(frozen=True, slots=True)
class WeightFormats:
    """Formats of the weights of a model at rest, by what they belong to.

    Each is "int8", "int4" or "none" for the dtype of the model.
    """

    decoder: str = "none"
    encoder: str = "none"
    """Towers of images, videos and audio, and what projects their outputs."""
    head: str = "none"
    """Language-model head and token embedding."""
    dequantize: bool = False
    """Weights that are stored quantized become plain numbers where no format is asked for."""
    importance: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Weights (K,) of the inputs in the errors of int4 outside encoders, by a slot's first part. It
    may be a ``Deferred`` one, which is made when the first is asked for."""

    def of(self, slot: WeightSlot) -> str:
        """Return the format of a slot's weights; ``as stored`` where none is asked for.

        Weights that are stored as plain numbers then have the dtype of the model.
        """
        chosen: str = getattr(self, slot.role)
        return chosen if chosen in QUANTIZERS or self.dequantize else "as stored"

    def quantizer(self, slot: WeightSlot) -> Quantize | None:
        """Return the quantizer for the layers of a slot; None to leave them."""
        make = QUANTIZERS.get(getattr(self, slot.role))
        if make is not int4 or slot.role == "encoder" or not slot.parts:
            return make
        known, cut = self.importance.get(slot.parts[0].name), slot.parts[0].cut
        if known is not None and cut is not None and cut.columns is not None:
            known = known[slice(*cut.columns)]
        return make if known is None else partial(int4, importance=known)

    def bytes_of(self, slot: WeightSlot) -> int:
        """Return about how many bytes the weights of a slot take, 0 if they are not quantized."""
        bits = {"int8": 8, "int4": 4.5}.get(getattr(self, slot.role), 0)
        shapes = [part.own_shape for part in slot.parts if len(part.shape) > 1]
        return int(sum(map(math.prod, shapes)) * bits // 8)

    def first_option(self) -> str | None:
        """Return the option that asks for quantized weights, the first of several; None if none."""
        for option, name in (
            ("quantization", self.decoder),
            ("quantization_towers", self.encoder),
            ("quantization_head", self.head),
        ):
            if name in QUANTIZERS:
                return option
        return None

    def check(self, family: Family, device: torch.device) -> None:
        """Raise ConfigError where models of a family, or on a device, cannot be quantized."""
        param = self.first_option()
        if param is None:
            return
        if not family.quantizable:
            raise ConfigError(
                f"{param} is set, but this model runs through the code of transformers, whose "
                "layers cannot be quantized here: leave it out.",
                param=param,
            )
        if device.type != "cpu":
            raise ConfigError(
                f"{param} is set, but quantized weights run on CPUs alone, not on {device}: leave "
                "it out, or use device='cpu'.",
                param=param,
            )
        if not ops.has_integer_products():
            raise ConfigError(
                f"{param} is set, but this CPU has no kernels for quantized weights, which need "
                "x86 with AVX2: leave it out.",
                param=param,
            )


def _bands(weight: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the first row and the rows, in float32, of one part of the weight after another."""
    step = max(1, BAND // max(1, weight.shape[1]))
    for start in range(0, len(weight), step):
        yield start, weight[start : start + step].float()


def _best_scale(
    weights: torch.Tensor,
    peaks: torch.Tensor,
    steps: Sequence[float],
    limits: tuple[int, int],
    dim: int,
    shares: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the scale of least squared error of each group, 0 for groups of zeros.

    weights: groups lie along ``dim``. peaks: of each group, its number of largest magnitude, with
    the sign that the scale is to have. steps: integers that the peak is scaled to. shares: weights
    of squared errors, which broadcast.
    """
    scale = torch.zeros_like(peaks)
    best = torch.zeros_like(peaks)
    q = torch.empty_like(weights)
    shared = weights if shares is None else weights * shares
    for step in steps:
        torch.mul(weights, _inverse(peaks, step), out=q)
        q.round_().clamp_(*limits)
        squares = q * q if shares is None else (q * q).mul_(shares)
        square = squares.sum(dim=dim, keepdim=True)
        product = q.mul_(shared).sum(dim=dim, keepdim=True)
        fit = product / square.clamp_(min=_TINY)
        score = fit * product
        scale = torch.where(score > best, fit, scale)
        best = torch.maximum(score, best)
    # Numbers that are not finite have no score: their scale says so.
    return torch.where(peaks.isfinite(), scale, peaks)


def _inverse(scale: torch.Tensor, numerator: float = 1.0) -> torch.Tensor:
    """Return numerator / scale, and 0 where the scale is 0."""
    return torch.where(scale == 0, 0.0, numerator / scale)


def _integers(weights: torch.Tensor, scale: torch.Tensor, limits: tuple[int, int]) -> torch.Tensor:
    """Return the integers that are nearest to weights / scale, within the limits."""
    return (weights * _inverse(scale)).round_().clamp_(*limits).nan_to_num_(0.0).to(torch.int8)
