"""Slots of layers, and sources of weights: files or random numbers.

A slot is a place in a model that takes weights. A fused projection is one slot of several parts.
``fill`` reads a source into the slots.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from sensorium.distributed.shard import Cut
from sensorium.errors import ConfigError
from sensorium.kernels.weight import PackedWeight
from sensorium.layers.linear import Linear
from sensorium.layers.norm import LayerNorm, RMSNorm
from sensorium.models.interface import Packed, Part, WeightSlot
from sensorium.models.loading.coded import CodedWeight
from sensorium.models.loading.memory import MappedFiles, joined, owned
from sensorium.models.loading.published.mlx import is_channels_last
from sensorium.models.loading.published.reader import UNUSED, PublishedWeights, StoredWeight
from sensorium.models.loading.published.settings import Settings
from sensorium.models.loading.published.tensors import Tensors
from sensorium.models.loading.quantization import method_of_names, unsupported
from sensorium.models.loading.weight_files import FileState, listing, weight_files

ALWAYS_IGNORED = (
    r"(.*\.)?rotary_emb\.inv_freq",
    r"(.*\.)?rotary_pos_emb\.inv_freq",
    r"(.*\.)?position_ids",
    r"(.*\.)?masked_bias",
)
"""Constants that old files store and models compute."""

_PERIOD = 1_048_573  # a prime: no width of a matrix divides it, so no two of its rows are alike
_NUM_PERIODS = 24  # most matrices are then a view of the pool, and cost nothing to make
_DUMMY_STD = 0.02
HEAD = "lm_head.weight"
"""The output head in our spelling of all families."""
_HEADLESS = (
    f"The checkpoint has no output head ({HEAD}), as those of embedding models: start it with "
    "--runner pooling "
    "(runner='pooling' in Python) for embeddings. If it generates text and its head is its "
    "embedding, start it with "
    'hf_overrides={"tie_word_embeddings": true}.'
)


def linear_slot(
    layer: Linear,
    parts: Sequence[tuple[str, int]],
    cuts: Sequence[Cut] = (),
    num_inputs: int | None = None,
) -> WeightSlot:
    """Slot of the weight and bias of a linear layer whose rows are the stacked ``parts``.

    parts: (name without suffix, rows). cuts: what the layer takes of each; all of it where there
    are none. num_inputs: columns of the parts; the layer's where it takes all of them.
    """
    width = layer.num_inputs if num_inputs is None else num_inputs
    own: Sequence[Cut | None] = cuts or [None] * len(parts)
    weights, biases = [], []
    for (name, rows), cut in zip(parts, own, strict=True):
        weights.append(Part(f"{name}.weight", (rows, width), cut))
        if layer.has_bias:
            biases.append(Part(f"{name}.bias", (rows,), None if cut is None else cut.of_bias))
    num = len(weights)

    def assign(*tensors: torch.Tensor) -> None:
        weight = joined(tensors[:num])
        bias = owned(joined(tensors[num:])) if biases else None
        layer.load(weight, bias)
        if layer.weight is not None and not layer.weight.is_copy:
            layer.load(owned(weight), bias)  # it was kept as it is, not packed

    def assign_packed(weight: PackedWeight, *tensors: torch.Tensor) -> None:
        layer.load_packed(weight, owned(joined(tensors)) if biases else None)

    packed = Packed(weights[0].name, tuple(biases), assign_packed)
    return WeightSlot((*weights, *biases), assign, layers=(layer,), packed=packed)


def norm_slot(norm: RMSNorm | LayerNorm, name: str) -> WeightSlot:
    """Slot of the weight of a norm, and of its bias if it has one."""
    parts = [Part(f"{name}.weight", (norm.size,))]
    if isinstance(norm, LayerNorm) and norm.has_bias:
        parts.append(Part(f"{name}.bias", (norm.size,)))
    return WeightSlot(tuple(parts), lambda *tensors: norm.load(*map(owned, tensors)))


class WeightSource(Protocol):
    """Source of weights."""

    def check(self, parts: Iterable[Part], ignored: Sequence[str]) -> None:
        """Raise ConfigError that lists missing, misshapen and unexpected names."""
        ...

    def read(self, part: Part) -> torch.Tensor | CodedWeight:
        """Return the tensor of a part, of any floating dtype, on the CPU.

        A weight that is stored in another form is decoded later, by rows.
        """
        ...

    def has(self, part: Part) -> bool:
        """Return whether there is a weight of that name, of any shape."""
        ...

    def is_coded(self, part: Part) -> bool:
        """Return whether ``read`` gives the part as a ``CodedWeight``."""
        ...

    def mapped(self) -> MappedFiles | None:
        """Return the mapped files that ``read`` refers to; None when it makes tensors."""
        ...


class SafetensorsFiles:
    """Safetensors files of a checkpoint folder, sharded or not, with names mapped by ``renames``.

    settings: how the checkpoint is quantized; None if its configuration does not say so. Raises
    ConfigError when there are no files, when a shard is missing or when a file is damaged.
    """

    def __init__(
        self, folder: Path, renames: Sequence[tuple[str, str]], settings: Settings | None = None
    ) -> None:
        self.paths: list[Path] = []
        self.states: list[FileState] = []
        self._files: dict[str, tuple[Any, str]] = {}
        self._published: list[tuple[Tensors, PublishedWeights]] = []
        self.add(folder, renames, settings)

    def add(
        self, folder: Path, renames: Sequence[tuple[str, str]], settings: Settings | None = None
    ) -> None:
        """Add the weights of another checkpoint folder that this one lacks."""
        paths = weight_files(folder)
        self.states += [FileState.of(path) for path in paths]  # before they are opened
        files = _named(paths, renames)
        tensors = Tensors(files)
        self._published.append((tensors, PublishedWeights(tensors, settings)))
        self._files = files | self._files
        self.paths += paths

    @property
    def is_quantized(self) -> bool:
        """Return whether a configuration says that weights are quantized."""
        return any(reader.has_settings for _, reader in self._published)

    def first_dtype(self) -> str | None:
        """Return the dtype of the first floating tensor, such as ``float16``, or None."""
        names = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        for file, name in self._files.values():
            dtype = names.get(str(file.get_slice(name).get_dtype()))
            if dtype is not None:
                return dtype
        return None

    def num_weights(self) -> int:
        """Return the total number of elements in the files."""
        return sum(math.prod(f.get_slice(name).get_shape()) for f, name in self._files.values())

    def check(self, parts: Iterable[Part], ignored: Sequence[str]) -> None:
        shapes = {
            name: tuple(file.get_slice(stored).get_shape())
            for name, (file, stored) in self._files.items()
        }
        plain: list[Part] = []
        coded_names: list[str] = []
        for part in parts:
            coded = self._coded(part)
            if coded is None:
                plain.append(part)
                if self._is_channels_last(part):
                    shapes[part.name] = part.shape
                continue
            reader, weight = coded
            reader.check(part, weight)
            coded_names.append(part.name)
            for name in weight.names:
                shapes.pop(name, None)
        self._forget_zeros(shapes, plain, coded_names)
        ignored = (*ignored, *UNUSED) if coded_names else ignored
        check_names(shapes, plain, ignored, "config.json and the safetensors files belong together")

    def _forget_zeros(
        self, shapes: dict[str, Any], plain: Iterable[Part], coded: Iterable[str]
    ) -> None:
        """Take out the biases of zeros that layers of quantized weights do not have.

        AutoGPTQ writes one for each layer. Others would be missing in what is computed.
        """
        wanted = {part.name for part in plain}
        for name in coded:
            bias = f"{name.removesuffix('weight')}bias"
            if bias in shapes and bias not in wanted:
                file, stored = self._files[bias]
                if not bool(file.get_tensor(stored).float().any()):
                    del shapes[bias]

    def _coded(self, part: Part) -> tuple[PublishedWeights, StoredWeight] | None:
        """Return a weight that is stored in another form than plain numbers, and its reader."""
        for tensors, reader in self._published:
            stored = reader.find(part.name)
            if stored is not None:
                return reader, stored
            if part.name in tensors:
                return None
        return None

    def _is_channels_last(self, part: Part) -> bool:
        """Return whether a plain weight is the kernel of a convolution with its channels last."""
        for tensors, reader in self._published:
            if part.name in tensors:
                stored = tensors.shape(part.name)
                return reader.has_channels_last and is_channels_last(stored, part.shape)
        return False

    def is_coded(self, part: Part) -> bool:
        return self._coded(part) is not None

    def read(self, part: Part) -> torch.Tensor | CodedWeight:
        coded = self._coded(part)
        if coded is not None:
            reader, stored = coded
            return reader.read(part, stored)
        file, name = self._files[part.name]
        tensor: torch.Tensor = file.get_tensor(name)
        if not tensor.is_floating_point():
            raise ConfigError(
                f"Weight {part.name} is stored as {tensor.dtype}: quantized checkpoints are not "
                "supported.",
                param="model",
            )
        return tensor.movedim(-1, 1).contiguous() if self._is_channels_last(part) else tensor

    def has(self, part: Part) -> bool:
        return part.name in self._files or self.is_coded(part)

    def mapped(self) -> MappedFiles:
        return MappedFiles(self.paths)


class DummyWeights:
    """Random weights of the right shapes, sliced from one pool of repeated normal numbers.

    Norm weights are 1, biases 0, everything else has mean 0 and standard deviation 0.02. The same
    seed gives the same weights.
    """

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed % (1 << 63))
        period = torch.randn(_PERIOD, generator=generator).mul_(_DUMMY_STD).to(dtype)
        self._pool = period.repeat(_NUM_PERIODS)

    def check(self, parts: Iterable[Part], ignored: Sequence[str]) -> None:
        """Accept all parts: random weights have any shape."""

    def has(self, part: Part) -> bool:
        """Return false: tied parts follow the configuration alone."""
        return False

    def is_coded(self, part: Part) -> bool:
        """Return false: random weights are plain numbers."""
        return False

    def mapped(self) -> None:
        """Return None: there is no file."""

    def read(self, part: Part) -> torch.Tensor:
        if part.name.endswith("bias"):
            return torch.zeros(part.shape, dtype=self._pool.dtype)
        if len(part.shape) == 1 and part.name.endswith("weight"):
            return torch.ones(part.shape, dtype=self._pool.dtype)
        size = torch.Size(part.shape).numel()
        start = zlib.crc32(part.name.encode()) % _PERIOD
        values = self._pool[start : start + (_NUM_PERIODS - 1) * _PERIOD]
        if size > len(values):
            flat = torch.empty(size, dtype=values.dtype)
            for place in range(0, size, len(values)):
                end = min(place + len(values), size)
                flat[place:end] = values[: end - place]
            values = flat
        return values[:size].view(part.shape)


def check_names(
    shapes: Mapping[str, tuple[int, ...]],
    parts: Iterable[Part],
    ignored: Sequence[str],
    advice: str,
) -> None:
    """Raise ConfigError that lists missing, misshapen and unexpected names of weights.

    shapes: those of a source, by our names. advice: what to check.
    """
    missing, wrong, wanted = [], [], set()
    for part in parts:
        wanted.add(part.name)
        shape = shapes.get(part.name)
        if shape is None:
            missing.append(part.name)
        elif shape != part.shape:
            wrong.append(f"{part.name} is {shape}, not {part.shape}")
    extra = not_ignored((name for name in shapes if name not in wanted), ignored)
    problems = [
        listing("are missing", missing),
        listing("have other shapes than config.json says", wrong),
        listing("have no place in this architecture", extra),
    ]
    if missing == [HEAD] and not wrong:
        raise ConfigError(_HEADLESS, param="runner")
    quantization = method_of_names(extra)
    if quantization is not None:
        method, example = quantization
        raise unsupported(f"{method}, by names such as {example}", "which is not supported")
    if any(problems):
        raise ConfigError(
            "The weights do not fit the model's configuration: "
            + "; ".join(filter(None, problems))
            + f". Check that {advice}.",
            param="model",
        )


def not_ignored(names: Iterable[str], ignored: Sequence[str] = ()) -> list[str]:
    """Return the names of weights that are neither ``ALWAYS_IGNORED`` nor match ``ignored``."""
    skip = re.compile("|".join(f"(?:{pattern})" for pattern in (*ALWAYS_IGNORED, *ignored)))
    return [name for name in names if not skip.fullmatch(name)]


def _named(paths: Sequence[Path], renames: Sequence[tuple[str, str]]) -> dict[str, tuple[Any, str]]:
    """Map our name of each weight in some files to the open file and the name there."""
    rules = [(re.compile(pattern), replacement) for pattern, replacement in renames]
    found: dict[str, tuple[Any, str]] = {}
    for path in paths:
        file = _open(path)
        for name in file.keys():  # noqa: SIM118 - not a mapping
            found[renamed(name, rules)] = (file, name)
    return found


def renamed(name: str, rules: Sequence[tuple[re.Pattern[str], str]]) -> str:
    """Return the name after the first rule that matches it."""
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


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a file by their names, mapped and not read yet.

    Raises ConfigError for a damaged file.
    """
    file = _open(path)
    return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
