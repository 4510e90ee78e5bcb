"""Loading of a model by its name.

Configuration and processor need no torch; only ``load`` does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sensorium.errors import ConfigError, UnsupportedModelError
from sensorium.forks import OWN_THREADS
from sensorium.models.dtypes import dtype_of, suited_to_cpu
from sensorium.models.embedder import Embedder, embedder_of
from sensorium.models.encoders import check_separable, encoders_of
from sensorium.models.gguf import folder as gguf_folder
from sensorium.models.interface import (
    BuildOptions,
    Family,
    LoadableModel,
    LoadedConfig,
    Model,
    PartCheckpoint,
)
from sensorium.models.loading import checkpoint
from sensorium.models.loading.quantization import refuse_unsupported, settings_of
from sensorium.models.registry import resolve
from sensorium.models.shares import check_divisible

if TYPE_CHECKING:
    import torch

    from sensorium.config import ModelConfig
    from sensorium.distributed.collectives import Collectives
    from sensorium.models.loading.published.gguf import GgufWeights
    from sensorium.models.loading.quantize import WeightFormats
    from sensorium.models.loading.weights import SafetensorsFiles
    from sensorium.models.loading.weights_cache import CacheSettings, WeightsCache
    from sensorium.multimodal.processor import Processor

    Stored = SafetensorsFiles | GgufWeights


Proceed = Callable[[], object]


def _always() -> None:
    """Let loading go on."""


Chosen = Callable[[Path, "torch.dtype"], object]


def ignored(folder: Path, dtype: torch.dtype) -> None:
    """Tell nobody which folder and dtype were chosen."""


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to run, with its configuration, family and processor."""

    config: LoadedConfig
    family: Family
    model: Model
    processor: Processor | None
    embedder: Embedder | None = None


def read_config(
    model: str,
    *,
    mmproj: str | None = None,
    revision: str | None = None,
    hf_overrides: Mapping[str, Any] | None = None,
    download_dir: str | None = None,
) -> LoadedConfig:
    """Find a checkpoint (as ``checkpoint.find`` does) and read its configuration files.

    No weights are fetched and torch is not imported: with ``resolve(loaded.config)`` and the
    family's ``build_processor(loaded)`` this is all that an HTTP process or a media worker needs.
    Raises ConfigError.
    """
    folder = checkpoint.find(model, revision, download_dir, mmproj)
    loaded = checkpoint.read(folder, hf_overrides)
    try:
        family = resolve(loaded.config)
    except UnsupportedModelError:
        return loaded  # a folder may be read for its tokenizer alone; loading it raises the error
    return read_parts(loaded, family, download_dir)[0]


def read_config_of(options: ModelConfig) -> LoadedConfig:
    """Read the configuration files of the checkpoint that options name; see ``read_config``."""
    return read_config(
        options.model,
        mmproj=options.mmproj,
        revision=options.revision,
        hf_overrides=options.hf_overrides,
        download_dir=options.download_dir,
    )


def load(
    model: str,
    *,
    mmproj: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    load_format: str = "auto",
    hf_overrides: Mapping[str, Any] | None = None,
    revision: str | None = None,
    skip_modalities: Collection[str] = (),
    seed: int = 0,
    runner: str = "auto",
    download_dir: str | None = None,
    formats: WeightFormats | None = None,
    weights_cache: CacheSettings | None = None,
    replay: bool = True,
    int8_cache: bool = False,
    collectives: Collectives | None = None,
    encoders_only: bool = False,
    chosen: Chosen = ignored,
    proceed: Proceed = _always,
) -> LoadedModel:
    """Build a model and load its weights (random ones with ``load_format="dummy"``).

    mmproj: GGUF file of the vision encoder of a model that is one. dtype ``auto`` is the
    checkpoint's own: the one that config.json declares, else that of the weights, else float32; or
    float32 in place of a 16-bit type that the CPU has no units for, where memory allows it. device
    ``auto`` is the first GPU when there is one, else the CPU. runner: ``generate``, ``pooling`` or
    ``auto``; one for pooling has no head. download_dir: in place of the hub's cache. formats: how
    weights are quantized. weights_cache: where these are kept for the next start. int8_cache: the
    KV cache is in int8. chosen: called with the folder, complete by then, and the dtype. proceed:
    called between weights; what it raises ends loading. Others: see ``BuildOptions``.

    Raises ConfigError for what is not found or does not fit, or UnsupportedModelError.
    """
    folder = checkpoint.find(model, revision, download_dir, mmproj)
    loaded, dummy = checkpoint.read(folder, hf_overrides), load_format == "dummy"
    family = resolve(loaded.config)
    _check_layers(loaded, family, formats, find_device(device), collectives)
    loaded, names = read_parts(loaded, family, download_dir)
    needed = _needed(loaded, family, skip_modalities)
    processor, embedder = family.build_processor(loaded), embedder_of(loaded, family, runner)
    if not dummy:
        checkpoint.fetch_weights(model, folder, revision, download_dir)
        _fetch_parts(loaded, needed, names, download_dir)
    source, stored = _source(loaded, family, needed, dummy)
    asked = BuildOptions(
        dtype=dtype_of(dtype, loaded.config, stored),
        device=find_device(device),
        skip_modalities=frozenset(skip_modalities),
        head=embedder is None,
        random_weights=dummy,
        replay=replay,
        collectives=collectives,
        encoders_only=encoders_only,
    )
    own = loaded, family, _on_this_cpu(dtype, loaded, family, asked, source), source, formats
    chosen(folder, own[2].dtype)
    built = _built(*own, seed, proceed, weights_cache, int8_cache)
    return LoadedModel(loaded, family, built, processor, embedder)


def _check_layers(
    loaded: LoadedConfig,
    family: Family,
    formats: WeightFormats | None,
    device: torch.device,
    collectives: Collectives | None,
) -> None:
    """Raise ConfigError where layers cannot be read, quantized or divided as they are to be."""
    refuse_unsupported(loaded, native=family.quantizable)
    if formats is not None:
        formats.check(family, device)
    if collectives is not None:
        check_divisible(family)


def _needed(
    loaded: LoadedConfig, family: Family, skip_modalities: Collection[str]
) -> list[PartCheckpoint]:
    """Return the parts whose modality is wanted.

    Raises ConfigError for those whose quantization cannot be read.
    """
    needed = [part for part in family.parts if part.modality not in skip_modalities]
    for field in {part.field for part in needed} & loaded.parts.keys():
        refuse_unsupported(loaded.parts[field])
    return needed


def read_parts(
    loaded: LoadedConfig, family: Family, download_dir: str | None = None
) -> tuple[LoadedConfig, dict[str, str]]:
    """Complete a configuration with those of the checkpoints that it names.

    Also returns the names of these checkpoints, by field.
    """
    whole, parts, names = Path(loaded.folder), {}, {}
    for part in family.parts:
        name = loaded.config.get(part.field)
        if name is not None:
            names[part.field], folder = checkpoint.find_part(name, whole, part.field, download_dir)
            parts[part.field] = checkpoint.read(folder)
    return (dataclasses.replace(loaded, parts=parts) if parts else loaded), names


def fetch(
    model: str,
    revision: str | None = None,
    download_dir: str | None = None,
    mmproj: str | None = None,
) -> Path:
    """Download all files that loading a model takes, and return its folder.

    mmproj: as in ``load``. Raises ConfigError.
    """
    folder = checkpoint.find(model, revision, download_dir, mmproj)
    loaded = checkpoint.read(folder)
    family = resolve(loaded.config)
    loaded, names = read_parts(loaded, family, download_dir)
    checkpoint.fetch_weights(model, folder, revision, download_dir)
    _fetch_parts(loaded, family.parts, names, download_dir)
    return folder


def _fetch_parts(
    loaded: LoadedConfig,
    parts: Collection[PartCheckpoint],
    names: Mapping[str, str],
    download_dir: str | None,
) -> None:
    """Download the weights of the checkpoints that complete one."""
    for part in (part for part in parts if part.field in names):
        beside = Path(loaded.parts[part.field].folder)
        checkpoint.fetch_weights(names[part.field], beside, None, download_dir)


def _source(
    loaded: LoadedConfig, family: Family, needed: Collection[PartCheckpoint], dummy: bool
) -> tuple[Stored | None, str | None]:
    if dummy:
        return None, None
    from sensorium.models.loading.published.gguf import GgufWeights
    from sensorium.models.loading.weights import SafetensorsFiles

    gguf = gguf_folder.file_of(loaded.folder)
    if gguf is not None:
        encoder = gguf_folder.encoder_of(loaded.folder)
        weights = GgufWeights(gguf, family.renames, encoder)
        return weights, weights.first_dtype()
    files = SafetensorsFiles(Path(loaded.folder), family.renames, settings_of(loaded))
    for part in needed:
        if part.field in loaded.parts:
            own = loaded.parts[part.field]
            files.add(Path(own.folder), part.renames, settings_of(own))
    return files, files.first_dtype()


def _calibrated(
    formats: WeightFormats | None,
    loaded: LoadedConfig,
    family: Family,
    options: BuildOptions,
    source: Stored | None,
    proceed: Proceed,
) -> WeightFormats | None:
    """Return the formats with how much each input of a decoder or head in int4 counts in errors.

    That is measured when the first such weight is quantized; not with random weights.
    """
    if formats is None or "int4" not in (formats.decoder, formats.head) or source is None:
        return formats
    files = source
    from sensorium.models.loading.calibrate import mean_squares
    from sensorium.models.loading.quantize import Deferred

    def measure() -> dict[str, torch.Tensor]:
        # Of several ranks, each measures the whole decoder.
        bare = dataclasses.replace(
            options, skip_modalities=frozenset(family.modalities), collectives=None
        )
        return mean_squares(family.build_model(loaded, bare), files, proceed)

    return dataclasses.replace(formats, importance=Deferred(measure))


def _cache(
    settings: CacheSettings | None,
    formats: WeightFormats | None,
    loaded: LoadedConfig,
    family: Family,
    options: BuildOptions,
    source: Stored | None,
) -> WeightsCache | None:
    """Return the cache of a model's quantized weights; None where there is nothing to keep."""
    if settings is None or formats is None or source is None:
        return None
    if formats.first_option() is None and not source.is_quantized:
        return None
    from sensorium.models.loading.weights_cache import calibrated_by

    calibrates = "int4" in (formats.decoder, formats.head)
    configurations = [(own.config, _stated(own)) for own in (loaded, *loaded.parts.values())]
    return settings.open(
        source.states,
        family.name,
        json.dumps(configurations, sort_keys=True, default=str),
        (str(options.dtype), sorted(options.skip_modalities), options.head),
        () if options.collectives is None else dataclasses.astuple(options.collectives.shard),
        (formats.decoder, formats.encoder, formats.head, formats.dequantize),
        calibrated_by() if calibrates else (),
    )


def _stated(loaded: LoadedConfig) -> tuple[str, Mapping[str, Any]] | None:
    """Return method and settings of a quantized checkpoint, which may be beside config.json."""
    settings = settings_of(loaded)
    return None if settings is None else (settings.method, settings.values)


def _built(
    loaded: LoadedConfig,
    family: Family,
    options: BuildOptions,
    source: Stored | None,
    formats: WeightFormats | None,
    seed: int,
    proceed: Proceed,
    weights_cache: CacheSettings | None,
    int8_cache: bool,
) -> LoadableModel:
    """Return the model with its weights."""
    from sensorium.models.loading.fill import fill, log_sizes
    from sensorium.models.loading.weights import DummyWeights

    if options.encoders_only:
        check_separable(loaded, family)
    model = family.build_model(loaded, options)
    if options.encoders_only:
        model, weights_cache = encoders_of(model), None
    cache = _cache(weights_cache, formats, loaded, family, options, source)
    formats = _calibrated(formats, loaded, family, options, source, proceed)
    with _kernels_made(model, int8_cache):
        weights = DummyWeights(seed, model.dtype) if source is None else source
        fill(model, weights, formats, proceed, cache)
    quantizes = formats is not None and formats.first_option() is not None
    if quantizes or (source is not None and source.is_quantized):
        log_sizes(model)
    return model


@contextlib.contextmanager
def _kernels_made(model: LoadableModel, int8_cache: bool) -> Iterator[None]:
    """Compile or load the model's kernels in another thread, for as long as this context lasts.

    An error is left to who asks for the kernel next.
    """
    from sensorium.kernels import ops

    ended = threading.Event()

    def make() -> None:
        with contextlib.suppress(Exception):
            own = model.dtype, model.device, model.has_encoder
            ops.warm_up(*own, ended.is_set, int8_cache)

    thread = threading.Thread(target=make, name=f"{OWN_THREADS}kernels")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _on_this_cpu(
    dtype: str, loaded: LoadedConfig, family: Family, options: BuildOptions, source: Stored | None
) -> BuildOptions:
    """Return the options, for ``auto`` on a CPU with the dtype in which it runs the model best."""
    if dtype != "auto" or options.device.type != "cpu":
        return options

    def count() -> int:
        if source is not None:
            return source.num_weights()
        slots = family.build_model(loaded, options).slots()
        return sum(math.prod(part.shape) for slot in slots for part in slot.parts)

    return dataclasses.replace(
        options, dtype=suited_to_cpu(options.dtype, count, family.quantizable)
    )


def find_device(name: str) -> torch.device:
    """Return the device of a name: cpu, cuda, cuda:N, or auto for a GPU if there is one.

    Raises ConfigError for a device that is not available.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device: torch.device | None = None
    with contextlib.suppress(RuntimeError):
        device = torch.device(name)
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"device must be cpu, cuda, cuda:N or auto, got {name!r}.", param="device"
        )
    num_gpus = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        found = f"this machine has {num_gpus} usable GPUs" if num_gpus else "torch sees no GPU"
        raise ConfigError(
            f"device is {name}, but {found}: check the driver and torch's build, or use "
            "device='cpu'.",
            param="device",
        )
    return device
