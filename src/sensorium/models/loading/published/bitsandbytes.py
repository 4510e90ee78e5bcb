"""bitsandbytes: 4 bits (NF4, FP4; Dettmers et al., 2023) and LLM.int8() (2022).

4 bits: ``weight`` holds N K / 2 bytes, of any type and shape; the first of two numbers lies in the
higher half. ``weight.quant_map`` (16) has the number of each code, ``weight.absmax`` the factor of
each block of 64 numbers, counted through the whole weight row by row. Quantized twice,
``weight.absmax`` is uint8: ``weight.nested_quant_map`` (256) has the number of each code,
``weight.nested_absmax`` the factor of each 256 of them, and an offset is added to all.
``weight.quant_state.bitsandbytes__nf4`` is a JSON text in bytes: sizes, shape and offset.

int8: ``weight`` (N, K) int8 and ``SCB`` (N): w[n, k] = weight * SCB[n] / 127.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch

from sensorium.kernels.weight import QuantizedTensor
from sensorium.models.loading.coded import CodedWeight
from sensorium.models.loading.published.settings import Settings
from sensorium.models.loading.published.tensors import FLOATS, MOST_SMALL_BYTES, Tensors

STATES = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")
_STORAGE = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4}
_BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096, 32)
_ROWS = 0
"""Layout by rows, the one that files have."""


@dataclass(frozen=True, slots=True)
class FourBitWeight:
    """The tensor ``weight`` in 4 bits of a layer, and those below its name."""

    base: str
    tensors: Tensors
    settings: Settings

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the tensors."""
        ends = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *STATES)
        own = (f"{self._weight}.{end}" for end in ends)
        return (self._weight, *(name for name in own if name in self.tensors))

    @property
    def _weight(self) -> str:
        return f"{self.base}.weight"

    def _name(self, end: str) -> str:
        return f"{self._weight}.{end}"

    @property
    def _state_name(self) -> str:
        return next(n for n in map(self._name, STATES) if n in self.tensors)

    def check(self, shape: tuple[int, int]) -> None:
        """Raise ConfigError unless the tensors hold a weight (N, K)."""
        size = math.prod(shape)
        stored, dtype = self.tensors.shape(self._weight), self.tensors.dtype(self._weight)
        num_bytes = math.prod(stored) * _STORAGE.get(dtype, 0)
        if num_bytes != -(-size // 2):
            raise self.tensors.error(
                self._weight, f"is {stored} {dtype}, which is not {size} numbers of 4 bits"
            )
        self.tensors.check(self._name("quant_map"), ((16,),), ("F32",))
        state = self._state(shape)
        blocks = -(-size // state["blocksize"])
        if not self._is_nested:
            self.tensors.check(self._name("absmax"), ((blocks,),), ("F32",))
            return
        outer = -(-blocks // state["nested_blocksize"])
        self.tensors.check(self._name("absmax"), ((blocks,),), ("U8",))
        self.tensors.check(self._name("nested_absmax"), ((outer,),), ("F32",))
        self.tensors.check(self._name("nested_quant_map"), ((256,),), ("F32",))

    @property
    def _is_nested(self) -> bool:
        return self._name("nested_absmax") in self.tensors

    def _state(self, shape: tuple[int, int]) -> dict[str, Any]:
        """Return what the JSON text says. Raises ConfigError."""
        name = self._state_name
        stored = self.tensors.shape(name)
        if self.tensors.dtype(name) != "U8" or math.prod(stored) > MOST_SMALL_BYTES:
            raise self.tensors.error(name, "is no short text")
        try:
            state = json.loads(bytes(self.tensors.read(name).flatten().tolist()))
            block, own_shape = state["blocksize"], [int(size) for size in state["shape"]]
            offset = float(state.get("nested_offset") or 0.0)
            nested = state.get("nested_blocksize") or 256
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError, AttributeError):
            raise self.tensors.error(
                name, "cannot be read as JSON with shape and blocksize"
            ) from None
        if own_shape != list(shape):
            raise self.tensors.error(name, f"says shape {own_shape}, not {list(shape)}")
        sizes_known = all(type(size) is int and size in _BLOCKS for size in (block, nested))
        if not sizes_known or not math.isfinite(offset):
            raise self.tensors.error(name, "has impossible sizes of blocks or no finite offset")
        return {"blocksize": block, "nested_blocksize": nested, "nested_offset": offset}

    def read(self, shape: tuple[int, int]) -> CodedWeight:
        """Return the weight (N, K), decoded by rows."""
        state = self._state(shape)
        num_inputs, size, block = shape[1], math.prod(shape), state["blocksize"]
        stored = self.tensors.read(self._weight).flatten().view(torch.uint8)
        numbers = self.tensors.read_finite(self._name("quant_map"))
        factors = self._factors(state)

        def read(first: int, end: int) -> torch.Tensor:
            low = first * num_inputs // block * block
            high = min(-(-end * num_inputs // block) * block, size)
            own = stored[low // 2 : -(-high // 2)]
            codes = torch.stack((own >> 4, own & 0x0F), dim=-1).flatten()[: high - low]
            blocks = factors[low // block : -(-high // block)]
            found: torch.Tensor = numbers[codes.long()]
            found *= blocks.repeat_interleave(block)[: high - low]
            return found[first * num_inputs - low : end * num_inputs - low].view(-1, num_inputs)

        kind = "nf4" if self._state_name.endswith("nf4") else "fp4"
        label = f"bitsandbytes, {kind}, blocks of {block}"
        return CodedWeight(shape, label, read, (stored,))

    def _factors(self, state: dict[str, Any]) -> torch.Tensor:
        """Return the factor of each block as float32."""
        if not self._is_nested:
            return self.tensors.read_finite(self._name("absmax"))
        outer = self.tensors.read_finite(self._name("nested_absmax"))
        numbers = self.tensors.read_finite(self._name("nested_quant_map"))
        codes = self.tensors.read(self._name("absmax"))
        outer = outer.repeat_interleave(state["nested_blocksize"])[: len(codes)]
        factors: torch.Tensor = numbers[codes.long()] * outer
        return factors + float(state["nested_offset"])


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """The tensors ``weight`` in int8 and ``SCB`` of a layer."""

    base: str
    tensors: Tensors
    settings: Settings

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the tensors."""
        layout = f"{self.base}.weight_format"
        own = f"{self.base}.weight", f"{self.base}.SCB"
        return (*own, layout) if layout in self.tensors else own

    def check(self, shape: tuple[int, int]) -> None:
        """Raise ConfigError unless the tensors hold a weight (N, K)."""
        self.tensors.check(self.names[0], (shape,), ("I8",))
        self.tensors.check(self.names[1], ((shape[0],),), FLOATS)
        for layout in self.names[2:]:
            self.tensors.check(layout, ((), (1,)), ("U8",))
            if int(self.tensors.read(layout)) != _ROWS:
                raise self.tensors.error(layout, "says another layout than rows, as no file has it")

    def read(self, shape: tuple[int, int]) -> CodedWeight:
        """Return the weight (N, K), decoded by rows."""
        weight = self.tensors.read(self.names[0])
        scales = self.tensors.read_finite(self.names[1]).float()[:, None] / 127

        def read(first: int, end: int) -> QuantizedTensor:
            return QuantizedTensor(weight[first:end], scales[first:end], 8, shape[1])

        return CodedWeight(shape, "bitsandbytes, 8 bits, a scale per output", read, (weight,))
