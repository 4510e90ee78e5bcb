"""Reading of an adapter's tensors, all of which are checked before memory is taken for them.

``adapter_model.safetensors`` holds two tensors for each module, ``lora_A.weight`` (r, inputs) and
``lora_B.weight`` (outputs, r), named as in the model that was trained, behind
``base_model.model.``; of DoRA also ``lora_magnitude_vector`` (outputs,). The renames of a family
map these names to ours as they do a checkpoint's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from blake3 import blake3

from sensorium.errors import ConfigError
from sensorium.kernels.adapters import LowRank, PackedPart
from sensorium.layers.linear import Linear
from sensorium.models.loading.weights import renamed
from sensorium.models.lora.dora import affine
from sensorium.models.lora.file import DTYPES, Entry, TensorFile
from sensorium.models.lora.settings import read_settings
from sensorium.models.lora.targets import Target

NAME = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."
MOST_FACTOR = 1e6
"""Most that DoRA multiplies an output by, or shifts it."""
MOST_UNTRAINED = 1 << 28
"""Bytes of all B that are read only to see that they are zeros."""
_SUFFIX = re.compile(
    r"(.+)\.lora_(?:([AB])(?:\.default)?\.weight|(magnitude)_vector(?:\.default)?(?:\.weight)?)"
)
"""Matched in a time that grows with a name's length alone, as nothing repeats in its end."""
_HEAD = re.compile(r"(^|\.)(lm_head|embed_tokens)$")
Rules = Sequence[tuple[re.Pattern[str], str]]
Pack = Callable[[Target, LowRank], PackedPart]


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter as layers take it.

    digest: of all numbers, and of where they belong. rank: the largest. parts: those of each layer.
    in_encoder: it changes a tower or projector, so that embeddings of media depend on it. whole:
    its modules for the other ranks, where several share the model.
    """

    digest: bytes
    rank: int
    in_encoder: bool
    parts: Mapping[Linear, Sequence[PackedPart]]
    whole: Sequence[tuple[Target, LowRank]] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(part.nbytes for parts in self.parts.values() for part in parts)


@dataclass(frozen=True, slots=True)
class _Pair:
    """A module: its tensors' names by "A", "B" and "magnitude", our name of it, its layer."""

    module: str
    ours: str
    names: Mapping[str, str]
    target: Target


@dataclass(frozen=True, slots=True)
class Module:
    """A module of an adapter: its layer, its rank, and the factor of x A^T B^T."""

    pair: _Pair
    rank: int
    scale: float

    @property
    def target(self) -> Target:
        """The layer."""
        return self.pair.target


@dataclass(frozen=True, slots=True, eq=False)
class OpenAdapter:
    """An adapter that fits a model by its names, types and shapes; its numbers are in its file."""

    modules: Sequence[Module]
    file: TensorFile

    def read(
        self, dtype: torch.dtype, pack: Pack, progress: Callable[[], object] | None = None
    ) -> Adapter:
        """Read the numbers as ``dtype``. ``pack`` lays out each module for its layer.

        progress: called after each module. Raises ConfigError for numbers that are not finite.
        """
        digest = blake3()
        parts: dict[Linear, list[PackedPart]] = {}
        for module in self.modules:
            part = _read(self.file, module, dtype)
            _count(digest, module.pair, part)
            target = module.target
            parts.setdefault(target.layer, []).append(pack(target, part))
            if progress is not None:
                progress()
        rank = max(module.rank for module in self.modules)
        in_encoder = any(module.target.is_encoder for module in self.modules)
        return Adapter(digest.digest(), rank, in_encoder, parts)


def open_adapter(
    folder: Path,
    targets: Mapping[str, Target],
    rules: Sequence[Rules],
    *,
    unused: re.Pattern[str],
    max_rank: int,
) -> OpenAdapter:
    """Open an adapter for a model with these ``targets``.

    rules: renames of weight names; the first that lead to a layer count. unused: names of weights
    that the model does not use, such as those of the last layers of a tower; adapters of them have
    no effect in the model that was trained, either. Raises ConfigError that names the tensor or the
    option. No memory is taken for any tensor.
    """
    settings = read_settings(folder)
    file = open_file(folder)
    pairs = _pairs(file, targets, rules, unused, max_rank)
    modules = [Module(pair, *settings.of(pair.module)) for pair in pairs]
    for module in modules:
        _check(file, module, max_rank, has_magnitude=settings.use_dora)
    return OpenAdapter(sorted(modules, key=lambda module: module.pair.ours), file)


def open_file(folder: Path) -> TensorFile:
    """Return an adapter's file of tensors, opened. Raises ConfigError."""
    path = folder / NAME
    if not path.is_file():
        if (folder / PICKLE).exists():
            _refuse(
                f"its weights are in {PICKLE}, a pickle, which is not read as it could run code: "
                f"load it with peft and save it again, which writes {NAME}"
            )
        _refuse(f"its folder has no {NAME}")
    return TensorFile(path)


def _pairs(
    file: TensorFile,
    targets: Mapping[str, Target],
    rules: Sequence[Rules],
    unused: re.Pattern[str],
    max_rank: int,
) -> list[_Pair]:
    """Return the modules of the file that change something.

    Raises ConfigError for a tensor that has no place.
    """
    found: dict[str, _Pair] = {}
    bytes_left = MOST_UNTRAINED
    for module, names in _modules(file).items():
        ours, target = _target(module, targets, rules)
        if target is None and not _HEAD.search(ours) and unused.fullmatch(f"{ours}.weight"):
            continue
        name = min(names.values())
        if target is None:
            b = names.get("B")
            if b is not None and _may_be_untrained(file.entries[b], max_rank, bytes_left):
                bytes_left -= file.entries[b].nbytes
                if not any(bool(piece.any()) for piece in file.pieces(b)):
                    continue
            _refuse(f"{name!r:.200} belongs to {_kind(ours)} of this model ({ours!r:.200})")
        if ours in found:
            _refuse(f"{name!r:.200} and tensors of {found[ours].module!r:.200} belong to one layer")
        found[ours] = _Pair(module, ours, names, target)
    for pair in found.values():
        for side in "AB":
            if side not in pair.names:
                _refuse(f"the module {pair.module!r:.200} has no tensor lora_{side}.weight")
    if not found:
        _refuse(f"{NAME} has no tensors for layers that this model uses")
    return list(found.values())


def _modules(file: TensorFile) -> Mapping[str, Mapping[str, str]]:
    """Return the names of each module's tensors, by "A", "B" and "magnitude"."""
    found: dict[str, dict[str, str]] = {}
    for name in sorted(file.entries):
        match = _SUFFIX.fullmatch(name.removeprefix(PREFIX))
        if match is None:
            _refuse(f"{name!r:.200} is no tensor of a LoRA adapter of linear layers")
        names = found.setdefault(match[1], {})
        if names.setdefault(match[2] or match[3], name) != name:
            _refuse(f"{name!r:.200} is there twice")
    return found


def _may_be_untrained(b: Entry, max_rank: int, most_bytes: int) -> bool:
    """Return True for a B that is read to see if it is all zeros, as before its training.

    Such are those that "all-linear" reaches and the model's own code reads past.
    """
    is_matrix = b.dtype in DTYPES and len(b.shape) == 2
    return is_matrix and b.shape[1] <= max_rank and b.nbytes <= most_bytes


def _target(
    module: str, targets: Mapping[str, Target], rules: Sequence[Rules]
) -> tuple[str, Target | None]:
    """Return our name of a module's weight, and its layer, if it has one."""
    names = [renamed(f"{module}.weight", own) for own in rules]
    for name in names:
        if name in targets:
            return name.removesuffix(".weight"), targets[name]
    return names[0].removesuffix(".weight"), None


def _kind(ours: str) -> str:
    if _HEAD.search(ours):
        return "the embedding or the head, which adapters cannot change here,"
    return "no linear layer that adapters can change"


def _check(file: TensorFile, module: Module, max_rank: int, *, has_magnitude: bool) -> None:
    """Check types and shapes of a module's tensors against the layer and the configuration."""
    pair, rank, target = module.pair, module.rank, module.target
    if rank > max_rank:
        _refuse(
            f"the module {pair.module!r:.200} has the rank {rank}, beyond the limit of {max_rank}: "
            "start with a larger --max-lora-rank (in Python max_lora_rank)"
        )
    if has_magnitude != ("magnitude" in pair.names):
        which = "no" if has_magnitude else "a"
        other = "" if has_magnitude else ", but use_dora is not set"
        _refuse(f"the module {pair.module!r:.200} has {which} tensor lora_magnitude_vector{other}")
    if has_magnitude and target.part.cut is not None:
        _refuse(
            "use_dora is set, for which whole rows of weights must be in one process, but those of "
            f"{pair.module!r:.200} are divided between several: leave --tensor-parallel-size at 1, "
            "or merge the adapter into its base model"
        )
    weight = target.layer.weight
    if has_magnitude and not (weight is not None and weight.has_rows):
        _refuse(
            "use_dora is set, for which weights must be read by rows: oneDNN's product, in which "
            f"{pair.module!r:.200} is, cannot; merge the adapter into its base model"
        )
    shapes: dict[str, tuple[int, ...]] = {
        "A": (rank, target.num_inputs),
        "B": (target.num_outputs, rank),
        "magnitude": (target.num_outputs,),
    }
    for side, name in sorted(pair.names.items()):
        held = file.entries[name]
        dtype, shape = held.dtype, held.shape
        if dtype not in DTYPES:
            _refuse(f"{name!r:.200} is of the type {dtype}, not one of {', '.join(DTYPES)}")
        if shape != shapes[side]:
            _refuse(
                f"{name!r:.200} has the shape {shape}, not {shapes[side]} as the layer and the "
                f"rank {rank} of adapter_config.json say"
            )
    if not math.isfinite(module.scale):
        _refuse(f"the scale of {pair.module!r:.200} is not finite")


def _read(file: TensorFile, module: Module, dtype: torch.dtype) -> LowRank:
    """Read a module's tensors. Raises ConfigError for numbers that are not finite."""
    names, target = module.pair.names, module.target
    a, b = (_finite(file, names[side], dtype) for side in "AB")
    part = LowRank(a, target.placed(b), module.scale, target.first)
    name = names.get("magnitude")
    if name is None:
        return part
    magnitude = target.placed(_finite(file, name, torch.float32))
    factors = affine(target.layer, part, magnitude)
    if not bool((factors.abs() <= MOST_FACTOR).all()):
        _refuse(f"{name!r:.200} has numbers that are too large, or its weight is zero")
    return replace(part, affine=factors)


def _finite(file: TensorFile, name: str, dtype: torch.dtype) -> torch.Tensor:
    found = torch.empty(file.entries[name].shape, dtype=dtype)
    numbers, start = found.view(-1), 0
    for source in file.pieces(name):
        piece = numbers[start : start + len(source)].copy_(source)
        start += len(source)
        if not bool(torch.isfinite(piece).all()):
            finite = bool(torch.isfinite(source).all())
            _refuse(f"{name!r:.200} has numbers that are not finite{f' in {dtype}' * finite}")
    return found


def _count(digest: Any, pair: _Pair, part: LowRank) -> None:
    """Add a module to the digest: its place, its scale and its numbers."""
    for tensor in (part.a, part.b, *([] if part.affine is None else [part.affine])):
        head = f"{pair.ours}\0{tensor.dtype}\0{tuple(tensor.shape)}\0{part.scale!r}\0"
        digest.update(head.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def _refuse(problem: str) -> NoReturn:
    raise ConfigError(f"The adapter cannot be used: {problem}.", param="lora_modules")
