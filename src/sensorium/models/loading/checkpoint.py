"""Finding a checkpoint and reading its configuration files, without torch or transformers."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sensorium.errors import ConfigError
from sensorium.models.interface import LoadedConfig
from sensorium.models.loading import weight_files
from sensorium.models.loading.hub import download
from sensorium.models.rope import placed_alike

TEXT_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
"""Files that the frontend needs: configuration, tokenizer, templates."""
DEMOS = {"demo": "demo", "demo-audio": "demo_audio"}
"""Models that come with this package, and their folders in it."""
NOT_NEEDED = ("[!0-9a]*/*", "a[!d]*/*")
"""Subfolders, but for the numbered ones of embedding models, such as ``1_Pooling``, which hold
settings, and ``additional_chat_templates``."""


def find(model: str, revision: str | None = None, download_dir: str | None = None) -> Path:
    """Return the folder of a checkpoint.

    model: one of ``DEMOS``, a local folder, or a Hugging Face id. Of the last everything but the
    weights is downloaded if not cached, into ``download_dir`` or the cache of the Hugging Face hub.
    Raises ConfigError with advice when nothing is found.
    """
    if model in DEMOS:
        folder = Path(__file__).parents[2] / DEMOS[model]
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"This installation of sensorium lacks the model {model!r}: reinstall it, or name "
                "another model.",
                param="model",
            )
        return folder
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if _is_path(model):
        raise ConfigError(
            f"Model {model!r}: there is no such folder. Give a folder with config.json and "
            "safetensors files, a Hugging Face id such as 'Qwen/Qwen2-VL-2B-Instruct', 'demo' or "
            "'demo-audio'.",
            param="model",
        )
    return download(model, revision, TEXT_FILES, NOT_NEEDED, download_dir=download_dir)


def is_local(model: str) -> bool:
    """Return whether a model is in this package or a folder here, so that nothing is downloaded."""
    return model in DEMOS or Path(model).expanduser().is_dir()


def fetch_weights(
    model: str, folder: Path, revision: str | None = None, download_dir: str | None = None
) -> None:
    """Download the weights of a checkpoint that ``find`` has downloaded.

    Does nothing for a local one. Only the files of ``weight_files`` are fetched:
    ``model.safetensors``, else the files that the index names.
    """
    if is_local(model):
        return
    # What the configuration was read of, not what somebody has uploaded since.
    same = folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else revision
    indexed, single = weight_files.index_names(folder), weight_files.SINGLE
    if single not in (indexed or ()):
        download(model, same, (single,), download_dir=download_dir)
    if indexed is not None and (single in indexed or not (folder / single).is_file()):
        names = [glob.escape(name) for name in indexed]
        download(model, same, names, download_dir=download_dir)


def find_part(
    name: object, whole: Path, field: str, download_dir: str | None = None
) -> tuple[str, Path]:
    """Return the folder of a checkpoint that config.json of ``whole`` names under ``field``.

    It may be a folder, also relative to ``whole``, or a Hugging Face id; its weights are downloaded
    as by ``fetch_weights``. Raises ConfigError with advice when nothing is found.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"config.json: {field} must be a Hugging Face id or a folder, got {name!r}.",
            param="model",
        )
    beside = whole / name
    if beside.is_dir():
        return str(beside), beside
    try:
        return name, find(name, download_dir=download_dir)
    except ConfigError as error:
        raise ConfigError(
            f"The model needs a second checkpoint, which config.json names as {field}. "
            f"{error.message} The folder can also be given with hf_overrides={{{field!r}: …}}.",
            param="model",
        ) from error


def read(folder: Path, overrides: Mapping[str, Any] | None = None) -> LoadedConfig:
    """Read ``config.json`` and its neighbours, with ``overrides`` merged into the former.

    Nested mappings are merged, too. Raises ConfigError when config.json is missing or a file is not
    a JSON object.
    """
    config = _read_json(folder / "config.json")
    if config is None:
        raise ConfigError(_no_config(folder), param="model")
    processor = _read_json(folder / "processor_config.json") or {}
    preprocessor, video = _preprocessors(folder, processor)
    return LoadedConfig(
        folder=str(folder),
        config=merged(config, placed_alike(config, overrides or {})),
        generation=_read_json(folder / "generation_config.json") or {},
        preprocessor=preprocessor,
        processor=processor,
        video_preprocessor=video,
    )


def _no_config(folder: Path) -> str:
    """Describe a folder without config.json, as an adapter where it is one."""
    adapter = _read_json(folder / "adapter_config.json")
    if adapter is not None:
        base = adapter.get("base_model_name_or_path")
        return (
            "The model's folder has an adapter (adapter_config.json) and no config.json: an "
            "adapter is a part of a model that does not run alone. Merge it into its base model, "
            f"{base!r}, (with peft: merge_and_unload, then save_pretrained) and give the folder of "
            "the result."
        )
    return (
        "The model's folder has no config.json: it is not a checkpoint in the Hugging Face layout."
    )


def _preprocessors(
    folder: Path, processor: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configurations of the image (or audio) processor and of the video processor.

    Newer files keep both inside processor_config.json. These take precedence over files of their
    own that an earlier version wrote.
    """
    parts = [processor.get(name) for name in ("image_processor", "feature_extractor")]
    nested = [part for part in parts if isinstance(part, dict)]
    own = nested[0] if nested else _read_json(folder / "preprocessor_config.json") or {}
    video = processor.get("video_processor")
    if not isinstance(video, dict):
        video = _read_json(folder / "video_preprocessor_config.json") or own
    return own, video


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the values of ``over``; mappings in both are merged in the same way."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            result[key] = merged(old, value)
        else:
            result[key] = value
    return result


def _is_path(model: str) -> bool:
    return model.startswith((".", "~", os.sep)) or model.count("/") > 1 or "\\" in model


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError, RecursionError) as error:
        raise ConfigError(
            f"{path.name} of the model cannot be read: {type(error).__name__}.", param="model"
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path.name} of the model is not a JSON object.", param="model")
    return value
