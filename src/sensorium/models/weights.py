"""From weight files into layers: a model lists its slots, the names are checked, then each tensor is read once.

A slot is a place in the model that wants weights. A fused projection is one slot of several parts, so that its pieces
are joined and packed while only that much memory is in use; files are mapped, not read, so the peak stays near the
size of the model.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from sensorium.errors import ConfigError
from sensorium.layers.linear import Linear
from sensorium.layers.norm import LayerNorm, RMSNorm

if TYPE_CHECKING:
    from sensorium.models.interface import LoadableModel

ALWAYS_IGNORED = (
    r"(.*\.)?rotary_emb\.inv_freq",
    r"(.*\.)?rotary_pos_emb\.inv_freq",
    r"(.*\.)?position_ids",
    r"(.*\.)?masked_bias",
)
"""Constants that older files store and models compute."""

_PERIOD = 1_048_573  # a prime: no width of a matrix divides it, so no two of its rows are alike
_NUM_PERIODS = 24  # most matrices are then a view of the pool, and cost nothing to make
_DUMMY_STD = 0.02
_LISTED = 6


class Part(NamedTuple):
    """One tensor of a checkpoint: its name (in our spelling) and its shape."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Slot:
    """``assign`` is called once, with the tensors of ``parts`` in order, in the model's dtype and on its device."""

    parts: tuple[Part, ...]
    assign: Callable[..., None]


def linear_slot(layer: Linear, parts: Sequence[tuple[str, int]]) -> Slot:
    """The weight and bias of a linear layer whose rows come from ``parts``: (name without suffix, rows), stacked."""
    weights = [Part(f"{name}.weight", (rows, layer.num_inputs)) for name, rows in parts]
    biases = [Part(f"{name}.bias", (rows,)) for name, rows in parts] if layer.has_bias else []
    num = len(weights)

    def assign(*tensors: torch.Tensor) -> None:
        weight = _joined(tensors[:num])
        bias = owned(_joined(tensors[num:])) if biases else None
        layer.load(weight, bias)
        if num == 1 and layer.weight is not None and not layer.weight.packed:
            layer.load(owned(weight), bias)  # it was kept as it is, not packed

    return Slot((*weights, *biases), assign)


def norm_slot(norm: RMSNorm | LayerNorm, name: str) -> Slot:
    """The weight of a norm, and its bias if it has one."""
    parts = [Part(f"{name}.weight", (norm.size,))]
    if isinstance(norm, LayerNorm) and norm.has_bias:
        parts.append(Part(f"{name}.bias", (norm.size,)))
    return Slot(tuple(parts), lambda *tensors: norm.load(*map(owned, tensors)))


def owned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy where the tensor may lie in a mapped file: a file that changes must not change a running model."""
    return tensor.clone() if tensor.device.type == "cpu" else tensor


class WeightSource(Protocol):
    """Where tensors come from."""

    def check(self, parts: Iterable[Part], ignored: Sequence[str]) -> None:
        """Raise ConfigError that lists names that are missing, have another shape or are not wanted."""
        ...

    def read(self, part: Part) -> torch.Tensor:
        """The tensor of a part, of any floating dtype, on the CPU."""
        ...


class SafetensorsFiles:
    """The safetensors files of a checkpoint folder, sharded or not; names in our spelling through ``renames``.

    Raises ConfigError when there are none, when a shard is missing or when a file is damaged.
    """

    def __init__(self, folder: Path, renames: Sequence[tuple[str, str]]) -> None:
        self._files = _named(folder, renames)

    def add(self, folder: Path, renames: Sequence[tuple[str, str]]) -> None:
        """Take from another checkpoint folder what this one lacks."""
        for name, place in _named(folder, renames).items():
            self._files.setdefault(name, place)

    def first_dtype(self) -> str | None:
        """Dtype of the first floating tensor, such as ``float16``; None when there is none."""
        names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        for file, name in self._files.values():
            dtype = names.get(str(file.get_slice(name).get_dtype()))
            if dtype is not None:
                return dtype
        return None

    def check(self, parts: Iterable[Part], ignored: Sequence[str]) -> None:
        missing, wrong, wanted = [], [], set()
        for part in parts:
            wanted.add(part.name)
            if part.name not in self._files:
                missing.append(part.name)
                continue
            file, name = self._files[part.name]
            shape = tuple(file.get_slice(name).get_shape())
            if shape != part.shape:
                wrong.append(f"{part.name} is {shape}, not {part.shape}")
        skip = re.compile("|".join(f"(?:{pattern})" for pattern in (*ALWAYS_IGNORED, *ignored)))
        extra = [n for n in self._files if n not in wanted and not skip.fullmatch(n)]
        problems = [
            _listing("are missing", missing),
            _listing("have other shapes than config.json says", wrong),
            _listing("have no place in this architecture", extra),
        ]
        if any(problems):
            raise ConfigError(
                "The weights do not fit the model's configuration: "
                + "; ".join(filter(None, problems))
                + ". Check that config.json and the safetensors files belong together.",
                param="model",
            )

    def read(self, part: Part) -> torch.Tensor:
        file, name = self._files[part.name]
        tensor: torch.Tensor = file.get_tensor(name)
        if not tensor.is_floating_point():
            raise ConfigError(
                f"Weight {part.name} is stored as {tensor.dtype}: quantized checkpoints are not supported.",
                param="model",
            )
        return tensor


class DummyWeights:
    """Random weights in the right shapes, quickly: each tensor is a stretch of one pool of repeated normal numbers.

    Norm weights are 1, biases 0, everything else has mean 0 and standard deviation 0.02. The same seed gives the same
    weights.
    """

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed % (1 << 63))
        period = torch.randn(_PERIOD, generator=generator).mul_(_DUMMY_STD).to(dtype)
        self._pool = period.repeat(_NUM_PERIODS)

    def check(self, parts: Iterable[Part], ignored: Sequence[str]) -> None:
        """Everything fits."""

    def read(self, part: Part) -> torch.Tensor:
        if part.name.endswith("bias"):
            return torch.zeros(part.shape, dtype=self._pool.dtype)
        if len(part.shape) == 1 and part.name.endswith("weight"):
            return torch.ones(part.shape, dtype=self._pool.dtype)
        size = torch.Size(part.shape).numel()
        start = zlib.crc32(part.name.encode()) % _PERIOD
        stretch = self._pool[start : start + (_NUM_PERIODS - 1) * _PERIOD]
        if size > len(stretch):
            flat = torch.empty(size, dtype=stretch.dtype)
            for place in range(0, size, len(stretch)):
                end = min(place + len(stretch), size)
                flat[place:end] = stretch[: end - place]
            stretch = flat
        return stretch[:size].view(part.shape)


def fill(model: LoadableModel, source: WeightSource) -> None:
    """Check all names and shapes, then load every slot of the model.

    Raises ConfigError before anything is read when the checkpoint does not fit.
    """
    slots = list(model.slots())
    source.check((part for slot in slots for part in slot.parts), model.ignored_weights)
    for slot in slots:
        slot.assign(*(_placed(source.read(part), model) for part in slot.parts))


def _is_beside(name: object) -> bool:
    """Whether a name stays within the folder. Links are followed: the hub's cache consists of them."""
    if not isinstance(name, str):
        return False
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those of its index, else all.

    Raises ConfigError when there are none or when the index names a file that is not there.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"{index.name} of the model cannot be read.", param="model"
            ) from error
        outside = [name for name in names if not _is_beside(name)]
        if outside:
            listing = _listing(
                f"of the names in {index.name} of the model are no files of its folder", outside
            )
            raise ConfigError(f"{listing}.", param="model")
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise ConfigError(
                _listing(f"of the files that {index.name} names are missing", absent)
                + ": the download is not complete.",
                param="model",
            )
        return [folder / name for name in names]
    files = sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("consolidated"))
    if files:
        return files
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")):
        raise ConfigError(
            "The model has its weights as pickle files (.bin, .pth) only. Safetensors files are needed: take a "
            "revision that has them, or convert it with transformers (from_pretrained, then save_pretrained).",
            param="model",
        )
    raise ConfigError(
        "The model's folder has no safetensors files. Add them, or use load_format='dummy' for random weights.",
        param="model",
    )


def _named(folder: Path, renames: Sequence[tuple[str, str]]) -> dict[str, tuple[Any, str]]:
    """Where each weight of a folder is, by its name in our spelling: the open file, and the name there."""
    rules = [(re.compile(pattern), replacement) for pattern, replacement in renames]
    found: dict[str, tuple[Any, str]] = {}
    for path in weight_files(folder):
        file = _open(path)
        for name in file.keys():  # noqa: SIM118 - not a mapping
            found[renamed(name, rules)] = (file, name)
    return found


def renamed(name: str, rules: Sequence[tuple[re.Pattern[str], str]]) -> str:
    """The name after the first rule that matches it."""
    for pattern, replacement in rules:
        result, matches = pattern.subn(replacement, name, count=1)
        if matches:
            return result
    return name


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"{path.name} of the model is not a readable safetensors file: {error}.", param="model"
        ) from error


def _placed(tensor: torch.Tensor, model: LoadableModel) -> torch.Tensor:
    return tensor.to(device=model.device, dtype=model.dtype)


def _joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _listing(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} {what} ({', '.join(names[:_LISTED])}{more})"
