"""Reading of an adapter's tensors, all of which are checked before memory is taken for them.

``adapter_model.safetensors`` holds two tensors for each module, ``lora_A.weight`` (r, inputs) and
``lora_B.weight`` (outputs, r), named as in the model that was trained, behind
``base_model.model.``; of DoRA also ``lora_magnitude_vector`` (outputs,). The renames of a family
map these names to ours as they do a checkpoint's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
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
from sensorium.models.lora.settings import read_settings
from sensorium.models.lora.targets import Target

NAME = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."
PIECE = 1 << 14
"""Numbers that are converted at a time: too few for torch to wake other threads, as these may be
running the model."""
MOST_FACTOR = 1e6
"""Most that DoRA multiplies an output by, or shifts it."""
_DTYPES = {"F32": 4, "F16": 2, "BF16": 2}
_SUFFIX = re.compile(r"(.+)\.lora_(?:([AB])(?:\.default)?\.weight|(magnitude)_vector(?:\.\w+)*)")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_tokens)$")
Rules = Sequence[tuple[re.Pattern[str], str]]
Pack = Callable[[Linear, LowRank], PackedPart]


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """An adapter as layers take it.

    digest: of all numbers, and of where they belong. rank: the largest. parts: those of each layer.
    in_encoder: it changes a tower or projector, so that embeddings of media depend on it.
    """

    digest: bytes
    rank: int
    in_encoder: bool
    parts: Mapping[Linear, Sequence[PackedPart]]

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
    file: Any

    def read(self, dtype: torch.dtype, pack: Pack) -> Adapter:
        """Read the numbers as ``dtype``. ``pack`` lays out each part for its layer.

        Raises ConfigError for numbers that are not finite.
        """
        digest = blake3()
        parts: dict[Linear, list[PackedPart]] = {}
        for module in self.modules:
            part = _read(self.file, module, dtype)
            _count(digest, module.pair, part)
            layer = module.target.layer
            parts.setdefault(layer, []).append(pack(layer, part))
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
    pairs = _pairs(file, targets, rules, unused)
    modules = [Module(pair, *settings.of(pair.module)) for pair in pairs]
    for module in modules:
        _check(file, module, max_rank, has_magnitude=settings.use_dora)
    return OpenAdapter(sorted(modules, key=lambda module: module.pair.ours), file)


def open_file(folder: Path) -> Any:
    """Return an adapter's file of tensors, opened. Raises ConfigError."""
    from safetensors import SafetensorError, safe_open

    path = folder / NAME
    if not path.is_file():
        if (folder / PICKLE).exists():
            _refuse(
                f"its weights are in {PICKLE}, a pickle, which is not read as it could run code: "
                f"load it with peft and save it again, which writes {NAME}"
            )
        _refuse(f"its folder has no {NAME}")
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        _refuse(f"{NAME} is not a readable safetensors file: {error}")


def _pairs(
    file: Any,
    targets: Mapping[str, Target],
    rules: Sequence[Rules],
    unused: re.Pattern[str],
) -> list[_Pair]:
    """Return the modules of the file that change something.

    Raises ConfigError for a tensor that has no place.
    """
    found: dict[str, _Pair] = {}
    taken: dict[str, str] = {}
    names = set(file.keys())
    for name in sorted(names):
        match = _SUFFIX.fullmatch(name.removeprefix(PREFIX))
        if match is None:
            _refuse(f"{name!r:.200} is no tensor of a LoRA adapter of linear layers")
        module, side = match[1], match[2] or match[3]
        ours, target = _target(module, targets, rules)
        if target is None and not _HEAD.search(ours) and unused.fullmatch(f"{ours}.weight"):
            continue
        if target is None and _is_untrained(file, names, name):
            continue
        if target is None:
            _refuse(f"{name!r:.200} belongs to {_kind(ours)} of this model ({ours!r:.200})")
        if taken.setdefault(ours, module) != module:
            _refuse(f"{name!r:.200} and tensors of {taken[ours]!r:.200} belong to one layer")
        pair = found.setdefault(module, _Pair(module, ours, {}, target))
        if side in pair.names:
            _refuse(f"{name!r:.200} is there twice")
        pair.names[side] = name  # type: ignore[index]
    for pair in found.values():
        for side in "AB":
            if side not in pair.names:
                _refuse(f"the module {pair.module!r:.200} has no tensor lora_{side}.weight")
    if not found:
        _refuse(f"{NAME} has no tensors for layers that this model uses")
    return list(found.values())


def _is_untrained(file: Any, names: Collection[str], name: str) -> bool:
    """Return True for a module whose B is all zeros, as before its training.

    Such are those that "all-linear" reaches and the model's own code reads past.
    """
    b = name.replace(".lora_A.", ".lora_B.")
    if b not in names or str(file.get_slice(b).get_dtype()) not in _DTYPES:
        return False
    return not bool(file.get_tensor(b).any())


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


def _check(file: Any, module: Module, max_rank: int, *, has_magnitude: bool) -> None:
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
        held = file.get_slice(name)
        dtype, shape = str(held.get_dtype()), tuple(held.get_shape())
        if dtype not in _DTYPES:
            _refuse(f"{name!r:.200} is of the type {dtype}, not one of {', '.join(_DTYPES)}")
        if shape != shapes[side]:
            _refuse(
                f"{name!r:.200} has the shape {shape}, not {shapes[side]} as the layer and the "
                f"rank {rank} of adapter_config.json say"
            )
    if not math.isfinite(module.scale):
        _refuse(f"the scale of {pair.module!r:.200} is not finite")


def _read(file: Any, module: Module, dtype: torch.dtype) -> LowRank:
    """Read a module's tensors. Raises ConfigError for numbers that are not finite."""
    names, target = module.pair.names, module.target
    a, b = (_finite(file.get_tensor(names[side]), names[side], dtype) for side in "AB")
    part = LowRank(a, target.placed(b), module.scale, target.first)
    name = names.get("magnitude")
    if name is None:
        return part
    magnitude = target.placed(_finite(file.get_tensor(name), name, torch.float32))
    factors = affine(target.layer, part, magnitude)
    if not bool((factors.abs() <= MOST_FACTOR).all()):
        _refuse(f"{name!r:.200} has numbers that are too large, or its weight is zero")
    return replace(part, affine=factors)


def _finite(tensor: torch.Tensor, name: str, dtype: torch.dtype) -> torch.Tensor:
    # A copy: the tensor lies in the file, which may change or go.
    copy = torch.empty(tensor.shape, dtype=dtype)
    numbers, source = copy.view(-1), tensor.reshape(-1)
    for start in range(0, len(numbers), PIECE):
        piece = numbers[start : start + PIECE].copy_(source[start : start + PIECE])
        if not bool(torch.isfinite(piece).all()):
            finite = bool(torch.isfinite(source[start : start + PIECE]).all())
            _refuse(f"{name!r:.200} has numbers that are not finite{f' in {dtype}' * finite}")
    return copy


def _count(digest: Any, pair: _Pair, part: LowRank) -> None:
    """Add a module to the digest: its place, its scale and its numbers."""
    for tensor in (part.a, part.b, *([] if part.affine is None else [part.affine])):
        head = f"{pair.ours}\0{tensor.dtype}\0{tuple(tensor.shape)}\0{part.scale!r}\0"
        digest.update(head.encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def _refuse(problem: str) -> NoReturn:
    raise ConfigError(f"The adapter cannot be used: {problem}.", param="lora_modules")
