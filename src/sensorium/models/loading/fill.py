"""Filling of a model's slots from a source of weights.

The names are checked, then each tensor is read once. Files are mapped, not read. So that the peak
of memory is near the size of the model, the slots are filled one at a time and the largest first:
what a slot needs for a moment is large only while little else is there. The pages of a file are
given back after each slot, and the system reads those of the next ones meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from sensorium import progress
from sensorium.config import MIB
from sensorium.kernels.weight import QuantizedTensor
from sensorium.models.interface import LoadableModel, Part, WeightSlot
from sensorium.models.loading.coded import CodedWeight, Outcomes, Packing, dense, pack, taken
from sensorium.models.loading.memory import MappedFiles, Scratch, lent
from sensorium.models.loading.quantize import Quantize, WeightFormats
from sensorium.models.loading.weights import WeightSource
from sensorium.models.loading.weights_cache import WeightsCache
from sensorium.processes.heap import freed_memory_returned, return_freed

logger = logging.getLogger(__name__)

READ_AHEAD = 256 << 20
"""Bytes of a file that the system is told to read before they are needed."""
SLOTS_AHEAD = 16
RETURNED_BYTES = 32 << 20
"""Bytes of weights after which freed memory is returned to the system."""
_ROWS_COMPARED = 4096
_UNTIED = (
    "config.json says that %s is tied to %s, but the checkpoint holds both and they differ: the "
    "stored one is used. Set tie_word_embeddings to false in config.json to silence this warning."
)


def fill(
    model: LoadableModel,
    source: WeightSource,
    formats: WeightFormats | None = None,
    proceed: Callable[[], object] = lambda: None,
    cache: WeightsCache | None = None,
) -> None:
    """Check all names and shapes, then load every slot of the model, quantized as ``formats`` say.

    proceed: called before each slot; what it raises ends the loading. cache: quantized weights that
    it has are not made again. Raises ConfigError before anything is read when the checkpoint does
    not fit.
    """
    slots = _as_stored(list(model.slots()), source, model.dtype)
    source.check((part for slot in slots for part in slot.parts), model.ignored_weights)
    slots = _largest_first(slots)
    coded = {part for slot in slots for part in slot.parts if source.is_coded(part)}
    quantizes = coded or (formats is not None and formats.first_option() is not None)
    title = "Loading and quantizing weights" if quantizes else "Loading weights"
    total = sum(map(_num_values, slots))
    with (
        freed_memory_returned(),
        cache or contextlib.nullcontext(),
        progress.bar(title, total, unit="weights") as shown,
    ):
        if formats is None or cache is None:
            _fill(slots, model, source, formats, proceed, shown)
            return
        kept = {
            slot.packed.name: formats.bytes_of(slot) or _num_values(slot)
            for slot in slots
            if slot.packed is not None
            and (formats.bytes_of(slot) or not coded.isdisjoint(slot.parts))
        }
        names = list(kept)
        cache.begin(names, sum(kept.values()))
        filled = _with_kept(slots, set(names), cache, model.dtype, shown)
        _fill(filled, model, source, formats, proceed, shown, cache)
        cache.finish()


def _fill(
    slots: Iterable[WeightSlot],
    model: LoadableModel,
    source: WeightSource,
    formats: WeightFormats | None,
    proceed: Callable[[], object],
    shown: progress.TerminalBar,
    cache: WeightsCache | None = None,
) -> None:
    mapped, scratch, num_bytes, outcomes = source.mapped(), Scratch(), 0, Outcomes()
    for slot, tensors in _read_ahead(slots, source, mapped):
        proceed()
        if formats is not None:
            for layer in slot.layers:
                layer.quantize = _giving_back(formats.quantizer(slot), mapped)
        wanted = "as stored" if formats is None else formats.of(slot)
        assign(slot, tensors, model, scratch, mapped, wanted, outcomes)
        if cache is not None and slot.packed is not None:
            cache.add(slot.packed.name, slot.layers[0].weight)
        shown.update(_num_values(slot))
        num_bytes += sum(tensor.nbytes for tensor in tensors)
        if num_bytes > RETURNED_BYTES:
            return_freed()
            num_bytes = 0
    outcomes.log()


def assign(
    slot: WeightSlot,
    tensors: Sequence[torch.Tensor | CodedWeight],
    model: LoadableModel,
    scratch: Scratch,
    mapped: MappedFiles | None,
    wanted: str = "as stored",
    outcomes: Outcomes | None = None,
) -> None:
    """Load one slot with tensors as the source has them, and give their pages back.

    wanted: format of weights that are not stored as plain numbers. outcomes: is told what became of
    these.
    """
    coded = [tensor for tensor in tensors if isinstance(tensor, CodedWeight)]
    packed = _packed(slot, tensors, model, wanted) if coded else None
    if outcomes is not None:
        outcomes.add(coded, packed, model.dtype)
    if packed is None or slot.packed is None:
        _assign_plain(slot.assign, [dense(t, model.dtype) for t in tensors], model, scratch, mapped)
    else:
        rest = tensors[len(slot.parts) - len(slot.packed.parts) :]
        take = partial(slot.packed.assign, packed.weight)
        _assign_plain(take, [dense(t, model.dtype) for t in rest], model, scratch, mapped)
    for weight in coded:
        for tensor in weight.tensors:
            if mapped is not None:
                mapped.give_back(tensor)


def _assign_plain(
    take: Callable[..., None],
    tensors: Sequence[torch.Tensor],
    model: LoadableModel,
    scratch: Scratch,
    mapped: MappedFiles | None,
) -> None:
    """Call ``take`` with the tensors in the model's dtype, and give their pages back."""
    placed = _placed(tensors, model, scratch)
    for tensor, copy in zip(tensors, placed, strict=True):
        if mapped is not None and copy is not tensor:
            mapped.give_back(tensor)
    with lent([*tensors, *(placed if len(placed) > 1 else ())]):
        take(*placed)
    for tensor in tensors:
        if mapped is not None:
            mapped.give_back(tensor)


def _packed(
    slot: WeightSlot,
    tensors: Sequence[torch.Tensor | CodedWeight],
    model: LoadableModel,
    wanted: str,
) -> Packing | None:
    """Return the weight of a slot's layer made of weights that are not stored plain.

    None where the layer takes plain numbers alone.
    """
    if slot.packed is None or model.device.type != "cpu" or wanted == "none":
        return None
    weights = tensors[: len(slot.parts) - len(slot.packed.parts)]
    return pack(weights, wanted, slot.layers[0].quantize, model.dtype)


def _with_kept(
    slots: Iterable[WeightSlot],
    names: Collection[str],
    cache: WeightsCache,
    dtype: torch.dtype,
    shown: progress.TerminalBar,
) -> Iterator[WeightSlot]:
    """Yield the slots; one whose packed weight was kept takes that, and reads little else."""
    for slot in slots:
        packed, weight = slot.packed, None
        if packed is not None and packed.name in names:
            matrices = [part.own_shape for part in slot.parts if len(part.shape) == 2]
            shape = sum(rows for rows, _ in matrices), matrices[0][1]
            weight = cache.find(packed.name, shape, dtype)
        if packed is None or weight is None:
            yield slot
        else:
            shown.update(math.prod(shape))
            own = partial(packed.assign, weight)
            yield replace(slot, parts=packed.parts, assign=own, layers=(), packed=None)


def _giving_back(make: Quantize | None, mapped: MappedFiles | None) -> Quantize | None:
    """Return a quantizer that gives the pages of what it has read back at once."""
    if make is None or mapped is None:
        return make

    def quantize(weight: torch.Tensor) -> QuantizedTensor:
        made = make(weight)
        mapped.give_back(weight)
        return made

    return quantize


def weight_bytes(model: LoadableModel) -> int:
    """Return the bytes of memory that the weights of linear layers and embeddings take."""
    return sum(_sizes(model).values())


def log_sizes(model: LoadableModel) -> None:
    """Log how much memory the weights of linear layers and embeddings take, by format."""
    logger.info(
        "weights of linear layers and embeddings in memory: %s",
        ", ".join(f"{size / MIB:.1f} MiB {name}" for name, size in sorted(_sizes(model).items())),
    )


def _sizes(model: LoadableModel) -> dict[str, int]:
    """Return the bytes of the weights of layers in each format, shared ones once."""
    held: dict[int, tuple[str, int]] = {}
    for slot in model.slots():
        for layer in slot.layers:
            weight = layer.weight
            if isinstance(weight, torch.Tensor):
                held[id(weight)] = str(weight.dtype).removeprefix("torch."), weight.nbytes
            elif weight is not None:
                held[id(weight)] = weight.format, weight.nbytes
    sizes: dict[str, int] = {}
    for name, size in held.values():
        sizes[name] = sizes.get(name, 0) + size
    return sizes


def _largest_first(slots: list[WeightSlot]) -> list[WeightSlot]:
    """Return the slots by falling size; one that shares another's part comes behind that."""
    return sorted(slots, key=_num_values, reverse=True)


def _num_values(slot: WeightSlot) -> int:
    """Return the number of weights of a slot; of a tied one, those of the other."""
    parts = slot.parts or ((slot.tied.part,) if slot.tied is not None else ())
    return sum(math.prod(part.own_shape) for part in parts)


def _read_ahead(
    slots: Iterable[WeightSlot], source: WeightSource, mapped: MappedFiles | None
) -> Iterator[tuple[WeightSlot, list[torch.Tensor | CodedWeight]]]:
    """Yield each slot with its tensors while the system reads those of the next slots."""
    waiting: deque[tuple[WeightSlot, list[torch.Tensor | CodedWeight], int]] = deque()
    num_bytes = 0
    for slot in slots:
        tensors = [taken(source.read(part), part) for part in slot.parts]
        if mapped is None:
            yield slot, tensors
            continue
        for tensor in tensors:
            for own in tensor.tensors if isinstance(tensor, CodedWeight) else (tensor,):
                mapped.read_ahead(own)
        waiting.append((slot, tensors, sum(tensor.nbytes for tensor in tensors)))
        num_bytes += waiting[-1][2]
        while num_bytes > READ_AHEAD or len(waiting) > SLOTS_AHEAD:
            first, ready, done = waiting.popleft()
            num_bytes -= done
            yield first, ready
    for slot, tensors, _ in waiting:
        yield slot, tensors


def _placed(
    tensors: Sequence[torch.Tensor], model: LoadableModel, scratch: Scratch
) -> list[torch.Tensor]:
    """Return tensors in the model's dtype, on its device; several of a CPU in the scratch buffer.

    A single one stays where it is, or is converted into memory that a layer may keep.
    """
    if model.device.type == "cpu" and len(tensors) > 1:
        return scratch.filled(tensors, model.dtype)
    placed = [tensor.to(device=model.device, dtype=model.dtype) for tensor in tensors]
    return [tensor.contiguous() for tensor in placed]  # a rank's columns are not


def _as_stored(
    slots: list[WeightSlot], source: WeightSource, dtype: torch.dtype
) -> list[WeightSlot]:
    """Return the slots with tied parts as the checkpoint stores them.

    A part that is absent, or equal in the model's dtype, is tied; one that differs is used, with a
    warning. Where only the tied part is stored, it replaces the other.
    """
    stored: list[WeightSlot] = []
    instead: dict[Part, Part] = {}
    for slot in slots:
        if slot.tied is None:
            stored.append(slot)
            continue
        [part] = slot.parts
        other = slot.tied.part
        if source.has(part) and not source.has(other):
            instead[other] = part
        elif source.is_coded(part):
            stored.append(slot)  # a head that was quantized differs from the table as a rule
            continue
        elif source.has(part) and not _equal(source, part, other, dtype):
            logger.warning(_UNTIED, part.name, other.name)
            stored.append(slot)
            continue
        stored.append(replace(slot, parts=(), assign=slot.tied.assign, packed=None))
    return [
        replace(slot, parts=tuple(instead.get(part, part) for part in slot.parts))
        for slot in stored
    ]


def _equal(source: WeightSource, part: Part, other: Part, dtype: torch.dtype) -> bool:
    """Return whether two tensors of the checkpoint are equal in a dtype, reading them in bands."""
    first, second = (dense(source.read(own), dtype) for own in (part, other))
    return first.shape == second.shape and all(
        torch.equal(a.to(dtype), b.to(dtype))
        for a, b in zip(first.split(_ROWS_COMPARED), second.split(_ROWS_COMPARED), strict=True)
    )
