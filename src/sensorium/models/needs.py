"""Needs of a model before its weights are downloaded: bytes, disk and memory."""

from __future__ import annotations

import dataclasses
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sensorium.config import GIB, ModelConfig, ParallelConfig
from sensorium.errors import ConfigError, counted
from sensorium.models import hub_gguf
from sensorium.models.configs import declared_dtype, ties_head
from sensorium.models.dtypes import dtype_of, suited_to_cpu
from sensorium.models.gguf import describe, split
from sensorium.models.gguf.folder import encoder_of, file_of
from sensorium.models.gguf.reader import GgufFile
from sensorium.models.interface import BuildOptions, Family, LoadedConfig, TextShape
from sensorium.models.loader import find_device, read_parts
from sensorium.models.loading import checkpoint, hub, weight_files
from sensorium.models.loading.published.settings import BYTES_HELD, Plan, Settings, plan_of
from sensorium.models.loading.quantization import check_method, refuse_unsupported, settings_of
from sensorium.models.registry import resolve
from sensorium.models.shares import RANK_PROCESS, cache_share, shares_of
from sensorium.processes.limits import available_memory, total_memory

if TYPE_CHECKING:
    import torch

PROCESSES = int(0.7 * GIB)
"""Memory of a server's processes without weights and caches, about."""
SPARE_DISK = GIB // 4
"""Space that is to stay free on the disk."""
AS_STORED = "as stored"
"""Format of a GGUF file's weights that keep or widen their integers."""
_BLOCK_SIZE = 32
NVIDIA = Path("/dev/nvidiactl")
"""Exists where there is a GPU."""
ALONE = ParallelConfig()
_BYTES_STORED = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Bytes that a model takes, and those that there are.

    ``format``: of the files; ``product``: what the linear layers' weights are multiplied as;
    ``download``: still to come over the network; ``files``: all weights on disk; ``weights``: in
    memory, as ``dtype`` says; ``context``: the KV cache of one sequence of ``num_tokens`` tokens;
    both of all ``num_ranks`` processes together, of which each has at most ``rank_weights``.
    """

    model: str
    format: str
    product: str
    family: str
    folder: str
    num_files: int
    files: int
    download: int
    free_disk: int
    dtype: str
    device: str
    weights: int
    context: int
    num_tokens: int
    memory: int
    free_memory: int
    num_ranks: int = 1
    rank_weights: int = 0

    @property
    def processes(self) -> int:
        """Return the bytes of all processes without weights and caches."""
        return PROCESSES + (self.num_ranks - 1) * RANK_PROCESS

    @property
    def run(self) -> int:
        """Return the bytes of memory that it takes to run one sequence."""
        return self.weights + self.context + self.processes

    @property
    def fits_on_disk(self) -> bool:
        """Return whether there is room for the download."""
        return self.download + SPARE_DISK <= self.free_disk

    def problem(self) -> str | None:
        """Return the reason why the model cannot run here, with what to do; None if it can."""
        if not self.fits_on_disk:
            return (
                f"{_size(self.download)} are to be downloaded, but {self.folder} "
                f"has {_size(self.free_disk)} free. Free some, or name a folder on another disk "
                "with --download-dir."
            )
        if self.weights + self.processes > self.memory:
            return (
                f"its weights take {_size(self.weights)} in {self.dtype} on {self.device}, and "
                f"there are {_size(self.memory)} of memory in all. Take a smaller model, "
                "--quantization int8 or int4, or --force to download it nevertheless."
            )
        return None

    def lines(self) -> list[str]:
        """Return the needs as text, a line each."""
        rows = [
            (
                "model",
                f"{self.model} ({self.family}), {counted(self.num_files, 'file')} of weights",
            ),
            ("format", self.format),
            ("weights run as", self.product),
            *self._disk_rows(),
            (
                "memory to run",
                self._memory_line(),
            ),
            ("memory here", f"{_size(self.memory)}, {_size(self.free_memory)} free"),
        ]
        if self.problem() is None and self.run > self.free_memory:
            rows.append(("note", "other programs have to give back memory before it can run"))
        width = max(len(name) for name, _ in rows)
        return [f"{name:<{width}}  {text}" for name, text in rows]

    def _disk_rows(self) -> list[tuple[str, str]]:
        if not self.download:
            return [("to download", f"nothing: {_size(self.files)} are here")]
        return [
            ("to download", f"{_size(self.download)} of {_size(self.files)}"),
            ("disk", f"{_size(self.free_disk)} free at {self.folder}"),
        ]

    def _memory_line(self) -> str:
        ranks = ""
        if self.num_ranks > 1:
            ranks = f", at most {_size(self.rank_weights)} in each of {self.num_ranks} processes"
        return (
            f"{_size(self.run)}: weights {_size(self.weights)} ({self.dtype} on {self.device}"
            f"{ranks}), {self.num_tokens} tokens of context {_size(self.context)}, processes "
            f"{_size(self.processes)}; caches grow beyond that as configured"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return all values, for JSON."""
        return {**dataclasses.asdict(self), "run": self.run, "problem": self.problem()}


def needs_of(
    options: ModelConfig,
    kv_cache_dtype: str = "auto",
    parallel: ParallelConfig = ALONE,
) -> Needs:
    """Return the needs of a model, here or on the hub, with a KV cache of this data type.

    Of the hub its configuration files are downloaded, and of a GGUF file the beginning. parallel:
    the processes that share it.

    Raises:
        ConfigError: there is no such model, it has no weights that can be loaded, is quantized in a
            way that is not supported, has an architecture that nothing can run, or cannot be
            divided between so many processes.
    """
    loaded, gguf, encoder, wanted = _facts(options)
    family = resolve(loaded.config)
    device = find_device(options.device)
    cache = hub.cache_folder(options.download_dir)
    total = sum(file.size for file in wanted)
    to_come = sum(file.size for file in wanted if not file.is_cached)
    dtype, plan, weights = _in_memory(options, loaded, family, device, total, gguf)
    if encoder is not None:
        weights += _tower_bytes(encoder, options, dtype.itemsize)
    shares = shares_of(loaded, family, dtype, device, parallel)
    context, num_tokens = _context(options, loaded, family, dtype, kv_cache_dtype)
    heads = family.shape(loaded).num_kv_heads
    memory, free = _memory(device)
    return Needs(
        model=options.model,
        format=_format(loaded, gguf),
        product=describe.products_of(gguf) if gguf and plan.format == AS_STORED else plan.text(),
        family=family.name,
        folder=str(cache),
        num_files=len(wanted),
        files=total,
        download=to_come,
        free_disk=shutil.disk_usage(_existing(cache)).free,
        dtype=plan.format,
        device=str(device),
        weights=math.ceil(weights * shares.total),
        context=math.ceil(context * cache_share(heads, shares.size)),
        num_tokens=num_tokens,
        memory=memory,
        free_memory=free,
        num_ranks=shares.size,
        rank_weights=math.ceil(weights * shares.first),
    )


def least_memory(options: ModelConfig, kv_cache_dtype: str = "auto", num_ranks: int = 1) -> int:
    """Return about the bytes that an engine takes with one short context. Torch is not imported.

    The KV cache is of this data type. num_ranks: processes that share the model, of which the first
    alone has encoders. Configuration files of a model of the hub are downloaded, weights are not.
    Raises ConfigError.
    """
    where = options.revision, options.download_dir
    folder = checkpoint.find(options.model, *where, options.mmproj)
    loaded = checkpoint.read(folder, options.hf_overrides)
    family = resolve(loaded.config)
    loaded, names = read_parts(loaded, family, options.download_dir)
    declared = _BYTES_STORED.get(declared_dtype(loaded.config) or "float32", 2)
    size = _BYTES_STORED.get(options.dtype, declared)
    shape = family.shape(loaded)
    gguf, settings = file_of(folder), settings_of(loaded)
    if gguf is not None:
        integers = _has_integer_products(options.device)
        weights = _gguf_bytes(split.read(gguf), options, family, integers, size)
        encoder = encoder_of(folder)
        if encoder is not None:
            weights += _tower_bytes(split.read_encoder(encoder), options, size)
    else:
        total = _stored(options.model, folder, *where)
        for field, name in names.items():
            total += _stored(name, Path(loaded.parts[field].folder), None, options.download_dir)
        if settings is None:
            held = BYTES_HELD.get(options.weight_format or "", size)
            weights = math.ceil(total / declared * held)
        else:
            size = _BYTES_STORED.get(options.dtype, 2)
            weights = _published_bytes(total, loaded, settings, shape, options)
    num_tokens = options.max_model_len or min(shape.max_position, 8192)
    per_head = 2 * shape.head_dim * size
    if kv_cache_dtype == "int8":
        per_head = _bytes_of_codes(shape.head_dim)
    context = shape.num_layers * shape.num_kv_heads * num_tokens * per_head
    context = math.ceil(context * cache_share(shape.num_kv_heads, num_ranks))
    return weights + context + PROCESSES + (num_ranks - 1) * RANK_PROCESS


def _bytes_of_codes(head_dim: int) -> int:
    """Return the bytes of a token's key and value of a head in int8, with their scales.

    The layout is that of ``kernels.int8_cache.Records``.
    """
    keys, values = -(-head_dim // 2) * 2, -(-head_dim // 16) * 16
    return keys + values + 2 * 2


def _tower_bytes(encoder: GgufFile, options: ModelConfig, size: int) -> int:
    """Return the bytes that a vision encoder takes in memory; plain numbers take ``size`` each."""
    num_weights = sum(info.num_values for info in encoder.tensors.values())
    return math.ceil(num_weights * BYTES_HELD.get(options.quantization_towers, size))


def _published_bytes(
    total: int, loaded: LoadedConfig, settings: Settings, shape: TextShape, options: ModelConfig
) -> int:
    """Return the bytes of memory that a checkpoint takes which is quantized in its files."""
    integers = _has_integer_products(options.device)
    size = _BYTES_STORED.get(options.dtype, 2)
    plan = plan_of(settings, options.weight_format, integers, options.dtype, size)
    tables = (1 if ties_head(loaded.config) else 2) if settings.has_plain_tables else 0
    plain = min(total, 2 * tables * shape.vocab_size * shape.hidden_size)
    return math.ceil(plain + (total - plain) * plan.bytes_held / plan.bytes_stored)


def _has_integer_products(device: str) -> bool:
    """Return whether a model on a device of this name multiplies with integers. Asks no torch."""
    from sensorium.kernels.cpu.linear import levels

    if device.startswith("cuda") or (device == "auto" and NVIDIA.exists()):
        return False
    return levels.has_integer_products()


def _gguf_bytes(
    file: GgufFile, options: ModelConfig, family: Family, integers: bool, size: int
) -> int:
    """Return the bytes of memory that a GGUF file's weights take, plain ones ``size`` bytes each.

    integers: the device multiplies with int8 and int4.
    """
    if _keeps_integers(options, family, integers):
        return describe.memory_of(file)
    num_weights = sum(info.num_values for info in file.tensors.values())
    return math.ceil(num_weights * BYTES_HELD.get(options.weight_format or "", size))


def _keeps_integers(options: ModelConfig, family: Family, integers: bool) -> bool:
    """Return whether the integers of a GGUF file stay integers in memory."""
    return integers and family.quantizable and options.weight_format is None


def _stored(model: str, folder: Path, revision: str | None, download_dir: str | None) -> int:
    """Return the bytes of a model's weights on disk, or of those still to be downloaded."""
    if checkpoint.is_local(model):
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return sum(file.size for file in _weights(model, folder, revision, download_dir))


def _facts(
    options: ModelConfig,
) -> tuple[LoadedConfig, GgufFile | None, GgufFile | None, list[hub.HubFile]]:
    """Return configuration, GGUF files of model and encoder if any, and files of weights."""
    named = checkpoint.hub_file(options.model)
    if named is not None:
        gguf, files = hub_gguf.beginning(*named, options)
        encoder, others = hub_gguf.encoder(named[0], options)
        stored = hub_gguf.config_of(gguf, named[0], files, options)
        config = checkpoint.merged(stored, options.hf_overrides)
        return LoadedConfig("", config, {}, {}, {}), gguf, encoder, [*files, *others]
    where = options.revision, options.download_dir
    folder = checkpoint.find(options.model, *where, options.mmproj)
    loaded = checkpoint.read(folder, options.hf_overrides)
    path = file_of(folder)
    if path is not None:
        tower = encoder_of(folder)
        encoder = None if tower is None else split.read_encoder(tower)
        paths = [*split.present(path), *([] if tower is None else [tower])]
        files = [hub.HubFile(own.name, own.stat().st_size, True) for own in paths]
        return loaded, split.read(path), encoder, files
    family = resolve(loaded.config)
    refuse_unsupported(loaded, native=family.quantizable)
    loaded, names = read_parts(loaded, family, options.download_dir)
    check_method(loaded, options.quantization)
    wanted = _weights(options.model, folder, *where)
    for field, name in names.items():
        wanted += _weights(name, Path(loaded.parts[field].folder), None, options.download_dir)
    return loaded, None, None, wanted


def _format(loaded: LoadedConfig, gguf: GgufFile | None) -> str:
    """Return the format of a model's files in a few words."""
    if gguf is not None:
        return describe.format_of(gguf)
    settings = settings_of(loaded)
    if settings is not None:
        return f"safetensors, {settings.label}"
    declared = declared_dtype(loaded.config)
    return f"safetensors, {declared}" if declared else "safetensors"


def _weights(
    model: str, folder: Path, revision: str | None, download_dir: str | None
) -> list[hub.HubFile]:
    """Return the files of weights that loading a model takes. Raises ConfigError for none."""
    if checkpoint.is_local(model):
        paths = weight_files.weight_files(folder)
        return [hub.HubFile(path.name, path.stat().st_size, True) for path in paths]
    found = {file.name: file for file in hub.files(model, revision, download_dir=download_dir)}
    indexed = weight_files.index_names(folder)
    if weight_files.SINGLE in found and weight_files.SINGLE not in (indexed or ()):
        return [found[weight_files.SINGLE]]
    missing = [name for name in indexed or () if name not in found]
    if indexed and not missing:
        return [found[name] for name in indexed]
    if missing:
        what = f"of the files that {weight_files.INDEX} names are not in the repository"
        raise ConfigError(f"Model {model!r}: {weight_files.listing(what, missing)}.", param="model")
    pickles = sorted(name for name in found if name.endswith((".bin", ".pth", ".pt")))
    has = f" It has pickle files only ({weight_files.abbreviated(pickles)})." if pickles else ""
    raise ConfigError(
        f"Model {model!r} has no safetensors files, neither {weight_files.SINGLE} nor "
        f"{weight_files.INDEX}.{has} Take a repository or a revision that has them.",
        param="model",
    )


def _in_memory(
    options: ModelConfig,
    loaded: LoadedConfig,
    family: Family,
    device: torch.device,
    total: int,
    gguf: GgufFile | None,
) -> tuple[torch.dtype, Plan, int]:
    """Return the dtype in which the model would run, and what its weights become and take."""
    from sensorium.kernels import ops

    settings = None if gguf is not None else settings_of(loaded)
    num_weights = total // _BYTES_STORED.get(declared_dtype(loaded.config) or "float32", 2)
    if gguf is not None:
        num_weights = sum(info.num_values for info in gguf.tensors.values())
    dtype = dtype_of(options.dtype, loaded.config, None if settings is None else "float16")
    if options.dtype == "auto" and device.type == "cpu":
        dtype = suited_to_cpu(dtype, lambda: num_weights, family.quantizable)
    name = str(dtype).removeprefix("torch.")
    products = device.type == "cpu" and ops.has_integer_products()
    if gguf is not None and _keeps_integers(options, family, products):
        held = _gguf_bytes(gguf, options, family, products, dtype.itemsize)
        return dtype, Plan(AS_STORED, True, 1, 1), held
    if settings is None:
        wanted = options.weight_format if options.weight_format in BYTES_HELD else None
        size = dtype.itemsize if wanted is None else BYTES_HELD[wanted]
        plan = Plan(wanted or name, wanted is None, size, size)
        return dtype, plan, math.ceil(num_weights * size)
    plan = plan_of(settings, options.weight_format, products, name, dtype.itemsize)
    linear = min(_num_linear(loaded, family, dtype, device), int(total / plan.bytes_stored))
    rest = total - linear * plan.bytes_stored
    return dtype, plan, math.ceil(rest + linear * plan.bytes_held)


def _num_linear(
    loaded: LoadedConfig, family: Family, dtype: torch.dtype, device: torch.device
) -> int:
    """Return the number of weights of a decoder's linear layers, those that tools quantize."""
    model = family.build_model(loaded, BuildOptions(dtype, device, random_weights=True))
    slots = (slot for slot in model.slots() if slot.role == "decoder")
    shapes = (part.shape for slot in slots for part in slot.parts)
    return sum(math.prod(shape) for shape in shapes if len(shape) == 2)


def _context(
    options: ModelConfig, loaded: LoadedConfig, family: Family, dtype: torch.dtype, kept: str
) -> tuple[int, int]:
    """Return the bytes of keys and values of one sequence, and its tokens: at most 8192."""
    import torch

    from sensorium.kernels.batch import KVCacheLayout

    shape = family.shape(loaded)
    num_tokens = options.max_model_len or min(shape.max_position, 8192)
    stored = torch.int8 if kept == "int8" else dtype
    heads = shape.num_layers, shape.num_kv_heads, shape.head_dim
    per_block = KVCacheLayout(*heads, _BLOCK_SIZE, stored).bytes_per_block
    return num_tokens * per_block // _BLOCK_SIZE, num_tokens


def _memory(device: torch.device) -> tuple[int, int]:
    """Return the memory of a device in all, and the part that is free."""
    if device.type == "cuda":
        import torch

        free, total = torch.cuda.mem_get_info(device)
        return total, free
    return total_memory(), available_memory()


def _existing(folder: Path) -> Path:
    """Return the folder, or the nearest one around it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def _size(num_bytes: int) -> str:
    """Return bytes as text, such as ``4.2 GiB``."""
    if num_bytes < GIB // 10:
        return f"{num_bytes / (1 << 20):.1f} MiB"
    return f"{num_bytes / GIB:.1f} GiB"
