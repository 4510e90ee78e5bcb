"""Rotary position factors, plain and multi-axis, with the length scalings of checkpoints."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Scaling = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Frequencies:
    """Rotary frequencies in radians per position, with the factor of cos and sin.

    ``inverse``: (rotary_dim / 2,) float32. ``for_length``: for scalings that depend on it, a
    function from a sequence's length beyond the original one to its ``inverse``.
    """

    inverse: torch.Tensor
    factor: float
    for_length: Callable[[int], torch.Tensor] | None = None


class Rotary:
    """Rotary embedding: cos and sin of each position times each frequency.

    head_dim: number of rotated dimensions of a head (all of them unless rotary is partial).
    rope_scaling: the checkpoint's dictionary (``rope_scaling`` or ``rope_parameters``) or None; its
    ``rope_type`` (or ``type``) is default, mrope, linear, dynamic, llama3, yarn, or longrope (also
    "su"). max_position: ``max_position_embeddings``. original_max_position:
    ``original_max_position_embeddings`` where it is outside the dictionary.

    Longrope has a second set of frequencies for sequences beyond the original maximum, and
    "dynamic" one for each length beyond it. Keys that were cached with one set are invalid for
    another, so a request keeps its choice.
    """

    def __init__(
        self,
        head_dim: int,
        theta: float,
        rope_scaling: Scaling | None = None,
        max_position: int = 0,
        original_max_position: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        scaling = dict(rope_scaling or {})
        if original_max_position is not None:
            scaling.setdefault("original_max_position_embeddings", original_max_position)
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        if kind not in _KINDS:
            raise ValueError(f"unknown rope type {kind!r}; known are {', '.join(sorted(_KINDS))}")
        frequencies = _KINDS[kind](head_dim, theta, scaling, max_position)
        self.rotary_dim = head_dim
        self.inverse = frequencies.inverse.to(device)
        self.factor = frequencies.factor
        for_length = frequencies.for_length
        self._for_length = (
            None
            if for_length is None
            else functools.lru_cache(maxsize=1024)(lambda length: for_length(length).to(device))
        )
        section = scaling.get("mrope_section")
        self.axes = (
            None
            if section is None
            else axis_of_frequency(
                [int(size) for size in section],
                head_dim // 2,
                interleaved=bool(scaling.get("mrope_interleaved", False)),
            ).to(device)
        )

    def cos_sin(
        self, positions: torch.Tensor, lengths: Sequence[tuple[int, int]] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos, sin (T, rotary_dim / 2) float32 of positions.

        positions: (T,), or (3, T): time, height, width; without ``mrope_section`` the first row
        counts. lengths: (length, number of rows) of consecutive runs of rows, T rows in all; the
        length is 0 for sequences within the original maximum, as when none are given.
        """
        if positions.dim() == 2 and self.axes is None:
            positions = positions[0]
        place = positions.to(torch.float32)
        rows = place[:, None] if place.dim() == 1 else place.t()[:, self.axes]
        angle = rows * self._frequencies(lengths)
        cos, sin = angle.cos(), angle.sin()
        if self.factor != 1.0:
            cos, sin = cos * self.factor, sin * self.factor
        return cos, sin

    def _frequencies(self, lengths: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Return (rotary_dim / 2,) of all rows, or (T, rotary_dim / 2) where rows differ."""
        choose = self._for_length
        if choose is None or not any(length for length, _ in lengths):
            return self.inverse
        sets = [choose(length) if length else self.inverse for length, _ in lengths]
        counts = torch.tensor([num_rows for _, num_rows in lengths], device=self.inverse.device)
        num_rows = sum(num_rows for _, num_rows in lengths)
        return torch.stack(sets).repeat_interleave(counts, dim=0, output_size=num_rows)


def axis_of_frequency(section: list[int], size: int, interleaved: bool) -> torch.Tensor:
    """Return the axis (0 time, 1 height, 2 width) of each of ``size`` frequencies, int64.

    Chunked (Qwen2-VL): section[0] frequencies of time, then height, then width. Interleaved
    (Qwen3-VL): t h w t h w … as long as the sections of height and width last, and time for the
    rest.
    """
    if sum(section) != size:
        raise ValueError(f"mrope_section {section} must sum to {size}, half the rotary dimensions")
    axes = torch.zeros(size, dtype=torch.int64)
    if interleaved:
        for axis in (1, 2):
            axes[axis : section[axis] * 3 : 3] = axis
        return axes
    start = 0
    for index, length in enumerate(section):
        axes[start : start + length] = index % 3
        start += length
    return axes


def axial_cos_sin(
    positions: torch.Tensor, head_dim: int, theta: float = 10000.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos, sin (T, head_dim / 2) float32 for (T, 2) row and column positions.

    Half the frequencies follow each axis: the two-dimensional rotary of the Qwen vision towers.
    """
    inverse = inverse_frequencies(head_dim // 2, theta).to(positions.device)
    angle = (positions.to(torch.float32)[:, :, None] * inverse).flatten(1)
    return angle.cos(), angle.sin()


def inverse_frequencies(dim: int, theta: float) -> torch.Tensor:
    """Return theta^(-2 i / dim) for i in [0, dim / 2), float32."""
    return 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))


def _plain(dim: int, theta: float, scaling: Scaling, max_position: int) -> Frequencies:
    return Frequencies(inverse_frequencies(dim, theta), 1.0)


def _linear(dim: int, theta: float, scaling: Scaling, max_position: int) -> Frequencies:
    return Frequencies(inverse_frequencies(dim, theta) / float(scaling["factor"]), 1.0)


def _dynamic(dim: int, theta: float, scaling: Scaling, max_position: int) -> Frequencies:
    """NTK-aware scaling of theta for lengths above the trained one."""
    factor = float(scaling["factor"])

    def for_length(length: int) -> torch.Tensor:
        growth = factor * max(length, max_position) / max_position - (factor - 1)
        return inverse_frequencies(dim, theta * growth ** (dim / (dim - 2)))

    return Frequencies(inverse_frequencies(dim, theta), 1.0, for_length)


def _llama3(dim: int, theta: float, scaling: Scaling, max_position: int) -> Frequencies:
    """Llama 3.1: slow frequencies divided by ``factor``, fast ones kept, a linear blend between."""
    factor = float(scaling["factor"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    original = float(scaling["original_max_position_embeddings"])
    inverse = inverse_frequencies(dim, theta)
    wavelength = 2 * math.pi / inverse
    blend = (original / wavelength - low) / (high - low)
    smooth = (1 - blend) * inverse / factor + blend * inverse
    scaled = torch.where(wavelength > original / low, inverse / factor, smooth)
    return Frequencies(torch.where(wavelength < original / high, inverse, scaled), 1.0)


def _yarn(dim: int, theta: float, scaling: Scaling, max_position: int) -> Frequencies:
    """YaRN scaling (Peng et al., 2023).

    Slow frequencies are interpolated, fast ones kept, with a ramp between; attention is sharpened.
    """
    original = scaling.get("original_max_position_embeddings") or max_position
    declared = scaling.get("factor")
    factor = max_position / original if declared is None else float(declared)

    def dimension_of(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension_of(scaling.get("beta_fast") or 32)
    high = dimension_of(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    power = theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    keep = 1 - ramp
    inverse = 1.0 / (factor * power) * (1 - keep) + 1.0 / power * keep
    return Frequencies(inverse, _yarn_factor(scaling, factor))


def _yarn_factor(scaling: Scaling, factor: float) -> float:
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])

    def sharpness(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    top, bottom = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if top and bottom:
        return sharpness(float(top)) / sharpness(float(bottom))
    return sharpness(1.0)


def _longrope(dim: int, theta: float, scaling: Scaling, max_position: int) -> Frequencies:
    """LongRoPE scaling (Ding et al., 2024): a factor per frequency.

    There is one set of factors for short and one for long sequences.
    """
    original = int(scaling.get("original_max_position_embeddings") or max_position)
    exponent = torch.arange(0, dim, 2, dtype=torch.float32) / dim

    def inverse(name: str) -> torch.Tensor:
        factors = torch.tensor(scaling[name], dtype=torch.float32)
        if factors.shape != (dim // 2,):
            raise ValueError(f"{name} has {factors.numel()} entries, expected {dim // 2}")
        return 1.0 / (factors * theta**exponent)

    short, long = inverse("short_factor"), inverse("long_factor")
    if scaling.get("attention_factor") is not None:
        grown = float(scaling["attention_factor"])
    else:
        ratio = float(scaling.get("factor") or max_position / original)
        grown = 1.0 if ratio <= 1 else math.sqrt(1 + math.log(ratio) / math.log(original))
    return Frequencies(short, grown, lambda _: long)


_KINDS: dict[str, Callable[[int, float, Scaling, int], Frequencies]] = {
    "default": _plain,
    "mrope": _plain,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,
}
