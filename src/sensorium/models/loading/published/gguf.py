"""The weights of a GGUF file, under the names and with the rows that transformers has."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from sensorium.errors import ConfigError
from sensorium.kernels.weight import QuantizedTensor
from sensorium.models.gguf import split
from sensorium.models.gguf.architectures import architecture_of
from sensorium.models.gguf.blocks import GRIDS, SIZES, Codes
from sensorium.models.gguf.config import count
from sensorium.models.gguf.encoders.find import encoder_kind
from sensorium.models.gguf.encoders.stored import TowerWeight
from sensorium.models.gguf.reader import GgufFile, TensorInfo
from sensorium.models.interface import Part
from sensorium.models.loading.coded import CodedWeight
from sensorium.models.loading.memory import MappedFiles
from sensorium.models.loading.published.gguf_tower import read_weight
from sensorium.models.loading.weight_files import FileState
from sensorium.models.loading.weights import check_names, renamed

BAND = 1 << 20
"""Weights that are dequantized at once: bounds temporary memory."""
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufWeights:
    """Weights of a GGUF file, by our names: ``renames`` are applied to those of transformers.

    The file is mapped, and read as weights are asked for. Raises ConfigError for a damaged file,
    UnsupportedModelError for one that is not run.
    """

    def __init__(
        self, path: Path, renames: Sequence[tuple[str, str]] = (), encoder: Path | None = None
    ) -> None:
        self.paths = [*split.present(path), *([] if encoder is None else [encoder])]
        self.states = [FileState.of(own) for own in self.paths]
        self._file = split.read(path)
        self._kind = architecture_of(self._file)
        rules = [(re.compile(pattern), replacement) for pattern, replacement in renames]
        self._bytes = _mapped(self._file)
        self._tower: dict[str, TowerWeight] = {}
        self._tower_bytes: list[torch.Tensor] = []
        text_name: Callable[[str], str] = str
        if encoder is not None:
            own = split.read_encoder(encoder)
            kind = encoder_kind(own)
            text_name, self._tower_bytes = kind.text_name, _mapped(own)
            self._tower = {renamed(name, rules): w for name, w in kind.weights(own).items()}
        self._tensors: dict[str, TensorInfo] = {}
        for info in self._file.tensors.values():
            name = self._kind.name(info.name)
            if name is not None:
                self._tensors[renamed(text_name(name), rules)] = info

    @property
    def names(self) -> list[str]:
        """Return the names of all weights."""
        return list(self._tensors)

    def first_dtype(self) -> str | None:
        """Return the dtype of the first floating tensor of several dimensions, or None."""
        for info in self._tensors.values():
            if len(info.shape) > 1 and info.kind.name in _PLAIN:
                return str(_PLAIN[info.kind.name]).removeprefix("torch.")
        return None

    def num_weights(self) -> int:
        """Return the total number of elements."""
        tower = sum(math.prod(weight.shape) for weight in self._tower.values())
        return tower + sum(info.num_values for info in self._tensors.values())

    def check(self, parts: Iterable[Part], ignored: Sequence[str]) -> None:
        shapes = {name: info.shape for name, info in self._tensors.items()}
        shapes |= {name: weight.shape for name, weight in self._tower.items()}
        check_names(shapes, parts, ignored, "the GGUF file is of this model")

    def has(self, part: Part) -> bool:
        return part.name in self._tensors or part.name in self._tower

    @property
    def is_quantized(self) -> bool:
        """Return whether a weight is stored in blocks."""
        return any(self._is_coded(info) for info in self._tensors.values())

    def is_coded(self, part: Part) -> bool:
        info = self._tensors.get(part.name)
        return info is not None and self._is_coded(info)

    @staticmethod
    def _is_coded(info: TensorInfo) -> bool:
        return not info.kind.is_plain and len(info.shape) == 2

    def mapped(self) -> MappedFiles:
        return MappedFiles(self.paths)

    def read(self, part: Part) -> torch.Tensor | CodedWeight:
        if part.name in self._tower:
            return self._of_tower(part.name)
        info = self._tensors[part.name]
        order = self._order(info)
        if not self._is_coded(info):
            return self._plain(info, order)
        raw, kind = self._rows_of(info), info.kind.name
        num_outputs, num_inputs = info.shape
        rows = partial(_rows, raw, order, kind)
        return CodedWeight((num_outputs, num_inputs), kind, rows, (raw,))

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each weight by its name, as numbers of ``dtype`` in memory of their own."""
        for name in self._tower:
            yield name, self._of_tower(name).to(dtype, copy=True)
        for name, info in self._tensors.items():
            if not self._is_coded(info):
                yield name, self._plain(info, self._order(info)).to(dtype, copy=True)
            else:
                yield name, self._dequantized(info, dtype)

    def _of_tower(self, name: str) -> torch.Tensor:
        return read_weight(self._tower[name], partial(_numbers, self._tower_bytes))

    def _dequantized(self, info: TensorInfo, dtype: torch.dtype) -> torch.Tensor:
        """Return the numbers of a quantized matrix, made in bands of rows."""
        order, raw = self._order(info), self._rows_of(info)
        whole = torch.empty(info.shape, dtype=dtype)
        step = max(1, BAND // info.shape[1])
        for start in range(0, info.shape[0], step):
            stop = min(start + step, info.shape[0])
            codes = _codes(raw, order, info.kind.name, start, stop)
            whole[start:stop] = codes.floats().view(stop - start, -1)
        return whole

    def _rows_of(self, info: TensorInfo) -> torch.Tensor:
        """Return the bytes of a matrix, (N, bytes of a row)."""
        return _raw(self._bytes, info).view(info.shape[0], -1)

    def _plain(self, info: TensorInfo, order: torch.Tensor | None) -> torch.Tensor:
        tensor = _numbers(self._bytes, info)
        if self._kind.norms_plus_one and info.name.endswith("norm.weight"):
            return tensor.float() - 1
        return tensor if order is None else tensor[order]

    def _order(self, info: TensorInfo) -> torch.Tensor | None:
        """Return which stored row each row is, where those of Q and K are interleaved.

        Stored row 2 j + h of a head is row j of its half h.
        """
        if not self._kind.is_permuted(info.name):
            return None
        heads = count(self._file, "attention.head_count")
        if ".attn_k." in info.name:
            heads = count(self._file, "attention.head_count_kv", heads)
        if info.shape[0] % (2 * heads):
            raise ConfigError(
                f"{self._file.path.name}: the {info.shape[0]} rows of {info.name} are not those of "
                f"{heads} heads.",
                param="model",
            )
        rows = torch.arange(info.shape[0]).view(heads, -1, 2)
        return rows.transpose(1, 2).reshape(-1)


def _mapped(file: GgufFile) -> list[torch.Tensor]:
    """Return the bytes of a file's parts, mapped."""
    return [torch.from_file(str(path), False, size, dtype=torch.uint8) for path, size in file.parts]


def _raw(data: Sequence[torch.Tensor], info: TensorInfo) -> torch.Tensor:
    return data[info.part][info.start : info.start + info.nbytes]


def _numbers(data: Sequence[torch.Tensor], info: TensorInfo) -> torch.Tensor:
    """Return the numbers of a tensor: as they are stored where they are plain, else float32."""
    raw = _raw(data, info)
    if not info.kind.is_plain:
        kind = info.kind.name
        return GRIDS[kind].take_apart(raw.view(-1, SIZES[kind])).floats().view(info.shape)
    dtype = _PLAIN[info.kind.name]
    if info.start % dtype.itemsize:
        raw = raw.clone()
    return raw.view(dtype).view(info.shape)


def _codes(
    raw: torch.Tensor, order: torch.Tensor | None, kind: str, start: int, stop: int
) -> Codes:
    """Take the rows from ``start`` to ``stop`` of a quantized matrix apart, block by block.

    raw: (N, bytes of a row). order: which stored row each row is.
    """
    own = raw[start:stop] if order is None else raw[order[start:stop]]
    return GRIDS[kind].take_apart(own.reshape(-1, SIZES[kind]))


def _rows(
    raw: torch.Tensor, order: torch.Tensor | None, kind: str, start: int, stop: int
) -> QuantizedTensor | torch.Tensor:
    """Return rows as the loader takes them: integers, or float32 where no product takes these."""
    codes, num_rows, grid = _codes(raw, order, kind, start, stop), stop - start, GRIDS[kind]
    if not grid.has_product:
        return codes.floats().view(num_rows, -1)
    values, scales = codes.values.view(num_rows, -1), codes.scales.reshape(num_rows, -1)
    if codes.minimums is None:
        return QuantizedTensor(values, scales, grid.bits, grid.group)
    minimums = codes.minimums.reshape(num_rows, -1)
    return QuantizedTensor(values, scales, grid.bits, grid.group, minimums=minimums)
