"""Weights that a checkpoint stores in another form than plain numbers.

Readers of quantized files hand them to the loader, which knows no file format: it asks for rows,
joins the parts of fused layers, cuts out what a rank takes, and keeps the integers where a product
takes them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from sensorium.distributed.shard import Cut, Range
from sensorium.kernels import ops
from sensorium.kernels.weight import PackedWeight, QuantizedTensor
from sensorium.models.interface import Part
from sensorium.models.loading.quantize import BAND, Quantize, int8, int8_groups

logger = logging.getLogger(__name__)

Rows = Callable[[int, int], QuantizedTensor | torch.Tensor]
"""(first, end) -> these rows of a weight (N, K): as integers, or (end - first, K) float32."""
AnyRows = QuantizedTensor | torch.Tensor


@dataclass(frozen=True, slots=True)
class CodedWeight:
    """Weight (N, K) of a checkpoint, decoded by rows when they are asked for."""

    shape: tuple[int, int]
    label: str
    """Form in the file, for the log, such as ``awq, 4 bits``."""
    read: Rows
    """Returns some rows. All rows have the same kind: integers of the same bits and groups, or
    float32 numbers."""
    tensors: tuple[torch.Tensor, ...] = ()
    """Tensors that ``read`` reads, mapped from a file."""
    order: torch.Tensor | None = None
    """(K,) int32, the input of each column that ``read`` returns; None if they lie in order."""
    places: torch.Tensor | None = field(init=False, repr=False)
    """(K,) int64, the column of each input that ``read`` returns; None if they lie in order."""

    def __post_init__(self) -> None:
        places = None if self.order is None else self.order.long().argsort()
        object.__setattr__(self, "places", places)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def dequantized(self, first: int, end: int) -> torch.Tensor:
        """Return some rows as float32."""
        rows = self.read(first, end)
        numbers = rows if isinstance(rows, torch.Tensor) else rows.dequantized()
        return numbers if self.places is None else numbers[:, self.places]


def joined_rows(weights: Sequence[CodedWeight]) -> Rows | None:
    """Return the rows of the weights, one behind the other, as integers.

    None where one has no integers, or where they differ in bits, groups or the order of inputs.
    """
    firsts = [weight.read(0, 1) for weight in weights]
    kinds = {
        (rows.bits, rows.group) if isinstance(rows, QuantizedTensor) else None for rows in firsts
    }
    if len(kinds) > 1 or None in kinds or not _have_one_order(weights):
        return None
    integers = [rows for rows in firsts if isinstance(rows, QuantizedTensor)]
    if len(weights) == 1:
        return weights[0].read
    has_zeros = any(rows.zeros is not None for rows in integers)
    has_minimums = {rows.minimums is not None for rows in integers}
    if len(has_minimums) > 1 or (has_zeros and True in has_minimums):
        return None

    def read(first: int, end: int) -> QuantizedTensor:
        parts = [
            _with_zeros(rows) if has_zeros else rows
            for rows in (weights[i].read(*span) for i, span in _spans(weights, first, end))
            if isinstance(rows, QuantizedTensor)
        ]
        return _concatenated(parts)

    return read


def _have_one_order(weights: Sequence[CodedWeight]) -> bool:
    """Return whether the columns of all weights belong to the same inputs."""
    first = weights[0].order
    return all(
        weight.order is None if first is None else _equal(first, weight.order)
        for weight in weights[1:]
    )


def _equal(one: torch.Tensor, other: torch.Tensor | None) -> bool:
    return other is not None and torch.equal(one, other)


def dequantized_rows(
    weights: Sequence[CodedWeight | torch.Tensor],
) -> Callable[[int, int], torch.Tensor]:
    """Return the rows of weights, coded or plain, one behind the other, as float32."""

    def read(first: int, end: int) -> torch.Tensor:
        parts = []
        for i, (low, high) in _spans(weights, first, end):
            own = weights[i]
            if isinstance(own, torch.Tensor):
                parts.append(own[low:high].float())
            else:
                parts.append(own.dequantized(low, high))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return read


def _spans(
    weights: Sequence[CodedWeight | torch.Tensor], first: int, end: int
) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield each weight's index and own rows of those from ``first`` to ``end`` of all, if any."""
    start = 0
    for index, weight in enumerate(weights):
        low, high = max(first - start, 0), min(end - start, weight.shape[0])
        if low < high:
            yield index, (low, high)
        start += weight.shape[0]


def _with_zeros(rows: QuantizedTensor) -> QuantizedTensor:
    """Return a weight with zero points; 4 bits as codes from 0 to 15."""
    if rows.zeros is not None:
        return rows
    shift = 8 if rows.bits == 4 else 0
    zeros = torch.full_like(rows.scales, shift, dtype=torch.int8)
    return replace(rows, values=rows.values + shift, zeros=zeros)


def _concatenated(parts: Sequence[QuantizedTensor]) -> QuantizedTensor:
    """Return the rows of weights of one kind, one behind the other."""
    if len(parts) == 1:
        return parts[0]

    def cat(tensors: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present) if present else None

    return replace(
        parts[0],
        values=torch.cat([part.values for part in parts]),
        scales=torch.cat([part.scales for part in parts]),
        zeros=cat([part.zeros for part in parts]),
        minimums=cat([part.minimums for part in parts]),
    )


def dense(weight: CodedWeight | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a weight as plain numbers; one that is plain as it is."""
    if isinstance(weight, torch.Tensor):
        return weight
    num_outputs, num_inputs = weight.shape
    numbers = torch.empty(weight.shape, dtype=dtype)
    band = max(1, BAND // max(1, num_inputs))
    for first in range(0, num_outputs, band):
        end = min(first + band, num_outputs)
        numbers[first:end] = weight.dequantized(first, end)
    return numbers


def taken(weight: torch.Tensor | CodedWeight, part: Part) -> torch.Tensor | CodedWeight:
    """Return what a slot takes of a part: views of what is mapped, where that is possible."""
    cut = part.cut
    if cut is None:
        return weight
    if isinstance(weight, CodedWeight):
        return _cut(weight, cut)
    return cut_out(weight, cut)


def cut_out(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Return the part of a tensor (N, ...) that one rank holds; a view, where that is possible."""
    if cut.is_absent:
        return torch.zeros_like(x)
    if cut.rows:
        pieces = [x[first:end] for first, end in cut.rows]
        x = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return x if cut.columns is None else x[..., slice(*cut.columns)]


def _cut(weight: CodedWeight, cut: Cut) -> CodedWeight:
    """Return some rows and columns of a weight that is decoded by rows.

    Columns that begin or end within a group of inputs that share a scale, or of a weight whose
    columns lie in another order, are given as float32 numbers in the order of the inputs. The
    loader makes other integers of them.
    """
    num_outputs, num_inputs = cut.shape_of(weight.shape)
    ranges = cut.rows or ((0, weight.shape[0]),)
    keeps_groups = cut.columns is None or (
        weight.order is None and _keeps_groups(weight.read(0, 1), cut.columns)
    )
    own_rows: Rows = weight.read if keeps_groups else weight.dequantized

    def read(first: int, end: int) -> AnyRows:
        pieces, start = [], 0
        for low, high in ranges:
            own_first, own_end = max(first - start, 0), min(end - start, high - low)
            if own_first < own_end:
                rows = own_rows(low + own_first, low + own_end)
                pieces.append(rows if cut.columns is None else _columns(rows, *cut.columns))
            start += high - low
        return _stacked(pieces)

    label = weight.label if keeps_groups else f"{weight.label}, split within a group"
    order = weight.order if keeps_groups else None
    return replace(weight, shape=(num_outputs, num_inputs), read=read, label=label, order=order)


def _keeps_groups(rows: AnyRows, columns: Range) -> bool:
    """Return whether columns begin and end where groups of inputs do."""
    if isinstance(rows, torch.Tensor) or rows.group >= rows.shape[1]:
        return True
    first, end = columns
    return first % rows.group == 0 and (end % rows.group == 0 or end == rows.shape[1])


def _columns(rows: AnyRows, first: int, end: int) -> AnyRows:
    """Return some inputs of rows, in whole groups."""
    if isinstance(rows, torch.Tensor):
        return rows[:, first:end]
    values = rows.values[:, first:end].contiguous()
    if rows.group >= rows.shape[1]:  # one scale for all of them
        return replace(rows, values=values, group=end - first)
    groups = slice(first // rows.group, -(-end // rows.group))
    return replace(
        rows,
        values=values,
        scales=rows.scales[:, groups].contiguous(),
        zeros=None if rows.zeros is None else rows.zeros[:, groups].contiguous(),
        minimums=None if rows.minimums is None else rows.minimums[:, groups].contiguous(),
    )


def _stacked(pieces: list[AnyRows]) -> AnyRows:
    """Return rows of one kind, one behind the other."""
    integers = [piece for piece in pieces if isinstance(piece, QuantizedTensor)]
    if integers:
        return _concatenated(integers)
    plain = [piece for piece in pieces if isinstance(piece, torch.Tensor)]
    return plain[0] if len(plain) == 1 else torch.cat(plain)


@dataclass(frozen=True, slots=True)
class Packing:
    """A weight that is packed, and if it has the integers of the checkpoint; else the reason."""

    weight: PackedWeight
    is_kept: bool
    reason: str = ""


def pack(
    weights: Sequence[CodedWeight | torch.Tensor],
    wanted: str,
    quantize: Quantize | None,
    dtype: torch.dtype,
) -> Packing | None:
    """Pack the weights (N, K), one behind the other, as a product of this CPU takes them.

    Their integers are kept where it can and ``wanted`` is their format or ``as stored``; otherwise
    ``quantize`` makes others, int8 where it is None: in groups if a product takes these. None where
    the CPU has no such products. dtype: that of the activations.
    """
    if not ops.has_integer_products():
        return None
    shape = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    coded = [weight for weight in weights if isinstance(weight, CodedWeight)]
    rows = joined_rows(coded) if len(coded) == len(weights) else None
    reason = "as they are not integers of one kind"
    if rows is not None:
        first = rows(0, 1)
        assert isinstance(first, QuantizedTensor)
        if wanted in ("as stored", first.format) and ops.takes(first, dtype):
            packed, order = ops.pack_in_bands(shape, rows, dtype), coded[0].order
            return Packing(packed if order is None else ops.permuted(packed, order), True)
        is_asked = wanted not in ("as stored", first.format)
        reason = "as was asked for" if is_asked else "as this CPU has no product for them"
    numbers = dequantized_rows(weights)
    grouped = int8_groups(numbers(0, 1))
    make = quantize or (int8_groups if ops.takes(grouped, dtype) else int8)

    def made(first: int, end: int) -> QuantizedTensor:
        return make(numbers(first, end))

    return Packing(ops.pack_in_bands(shape, made, dtype), False, reason)


class Outcomes:
    """Outcomes of weights that are not stored as plain numbers, for the log."""

    def __init__(self) -> None:
        self._numbers: Counter[tuple[str, str]] = Counter()

    def add(
        self, weights: Sequence[CodedWeight], packing: Packing | None, dtype: torch.dtype
    ) -> None:
        """Note what became of the weights of one layer."""
        if packing is None:
            outcome = f"made {str(dtype).removeprefix('torch.')}, as plain numbers"
        elif packing.is_kept:
            outcome = f"integers kept as they are ({packing.weight.format})"
        else:
            outcome = f"made {packing.weight.format}, {packing.reason}"
        for weight in weights:
            self._numbers[weight.label, outcome] += 1

    def log(self) -> None:
        """Log a line for each form of weights."""
        for (label, outcome), number in self._numbers.items():
            logger.info("%d weights stored as %s: %s", number, label, outcome)
