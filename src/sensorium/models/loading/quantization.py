"""Detection of quantized checkpoints from configuration files, before weights are downloaded."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sensorium.config.model import PUBLISHED_METHODS
from sensorium.errors import ConfigError
from sensorium.models.gguf.folder import file_of
from sensorium.models.interface import LoadedConfig
from sensorium.models.loading.published.settings import Settings
from sensorium.models.loading.weight_files import weight_names

SIDE_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
"""Files beside config.json in which old versions of these tools wrote their settings."""
MOST_TEXT = 200
"""Characters of what a file says that a message repeats."""
_NAMES = (
    (".qweight", "gptq or awq"),
    (".weight_packed", "compressed-tensors"),
    (".weight.absmax", "bitsandbytes"),
    (".SCB", "bitsandbytes"),
    (".weight_scale_inv", "fp8"),
    (".weight_scale", "fp8 or int8"),
    (".biases", "mlx"),
    (".codebooks", "aqlm"),
    (".W_q", "hqq"),
)
"""Ends of names that weights have in quantized files alone, and what wrote them."""


def refuse_unsupported(
    loaded: LoadedConfig, *, native: bool = True, named: str | None = None
) -> None:
    """Raise ConfigError with the reason for a checkpoint whose quantization cannot be read.

    native: its family is one of ours. named: the option ``quantization``, see ``check_method``.
    """
    settings = settings_of(loaded)
    problem = None if settings is None else settings.problem()
    if problem is None and not native:
        problem = "which models that run through the code of transformers cannot read here"
    if settings is not None and problem is not None:
        raise unsupported(f"{settings.label}, says {settings.source}", problem)
    check_method(loaded, named)


def check_method(loaded: LoadedConfig, wanted: str | None) -> None:
    """Raise ConfigError where the option ``quantization`` names another method than the files have.

    wanted: the option; formats that weights are made are no methods.
    """
    if wanted is None or wanted not in PUBLISHED_METHODS:
        return
    known = [own for own in map(settings_of, (loaded, *loaded.parts.values())) if own is not None]
    methods = [method for own in known for method in own.method.split(" or ")]
    if loaded.folder and file_of(loaded.folder) is not None:
        methods = ["gguf"]
    if wanted.removesuffix("_marlin") in methods:
        return
    found = f"is published as {known[0].label}" if known else "is not quantized"
    raise ConfigError(
        f"quantization is {wanted!r}, but the checkpoint {found[:MOST_TEXT]}: leave it out, or "
        "take int8 or int4, which are made while it is loaded.",
        param="quantization",
    )


def unsupported(found: str, problem: str) -> ConfigError:
    """Return the error of a checkpoint that is quantized in a way that cannot be read."""
    found, problem = found[:MOST_TEXT], problem[:MOST_TEXT]  # names in files have any length
    return ConfigError(
        f"The checkpoint is quantized ({found}), {problem}: take the unquantized one.",
        param="model",
    )


def settings_of(loaded: LoadedConfig) -> Settings | None:
    """Return how the checkpoint is quantized; None if it is not.

    config.json decides. If it has no such settings, files beside it do, unless the names of the
    weights, where these are known, are those of an unquantized model: such files are also left
    behind by merges and conversions. Raises ConfigError for settings of a wrong type.
    """
    for section in (loaded.config, loaded.config.get("text_config")):
        if isinstance(section, Mapping):
            for key in ("quantization_config", "compression_config", "quantization"):
                if section.get(key):
                    return _settings(section[key], _default_method(key), "config.json")
    names = weight_names(Path(loaded.folder))
    by_names = None if names is None else method_of_names(names)
    if names is not None and by_names is None:
        return None
    for file, method in SIDE_FILES.items():
        path = Path(loaded.folder) / file
        if path.is_file():
            return _settings(_read(path), method, file)
    return None if by_names is None else Settings(by_names[0], {}, f"the name {by_names[1]}")


def method_of_names(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the tool that wrote a file with weights of these names, and a name that tells it.

    None if no name does.
    """
    for name in names:
        for end, method in _NAMES:
            if name.endswith(end):
                return method, name
    return None


def _default_method(key: str) -> str:
    if key == "quantization":
        return "mlx"
    return "compressed-tensors" if key == "compression_config" else "unknown method"


def _settings(values: Any, method: str, source: str) -> Settings:
    """Return a tool's settings; ``method`` where they name none."""
    if not isinstance(values, Mapping):
        return Settings(method, {}, source)
    nested = values.get("quantization")  # ModelOpt's own file
    if isinstance(nested, Mapping):
        values = {**nested, **values}
    named = values.get("quant_method") or _guessed(values) or method
    return Settings(str(named), values, source)


def _guessed(settings: Mapping[str, Any]) -> str | None:
    """Return the method of settings that do not name it, by the keys that only one tool writes."""
    for method, keys in {
        "gptq": ("desc_act", "damp_percent"),
        "awq": ("w_bit", "zero_point"),
        "modelopt": ("quant_algo",),
        "compressed-tensors": ("config_groups",),
        "bitsandbytes": ("load_in_8bit", "load_in_4bit"),
    }.items():
        if any(key in settings for key in keys):
            return method
    return "mlx" if set(settings) >= {"group_size", "bits"} else None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
