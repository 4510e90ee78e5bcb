"""Finding a checkpoint and reading its configuration files; no torch, no transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sensorium.errors import ConfigError
from sensorium.models.interface import LoadedConfig
from sensorium.models.rope import spelled_alike

TEXT_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
"""What the frontend needs: configuration, tokenizer, templates."""
WEIGHT_FILES = ("*.safetensors",)
DEMOS = {"demo": "demo", "demo-audio": "demo_audio"}
"""Models that come with this package, and their folders in it."""
NOT_NEEDED = ("[!0-9]*/*", "[0-9]*/*.safetensors", "consolidated*")
"""Subfolders (but for the settings in the numbered ones of embedding models, such as ``1_Pooling``), and the second
copy of the weights that some publishers add."""


def find(model: str, revision: str | None = None, *, weights: bool = False) -> Path:
    """The folder of a checkpoint: one of ``DEMOS``, a local folder, or a Hugging Face id (downloaded if not cached).

    ``weights``: fetch the weights too. Raises ConfigError that says what to do when nothing is found.
    """
    if model in DEMOS:
        folder = Path(__file__).parent.parent / DEMOS[model]
        if not (folder / "config.json").is_file():
            raise ConfigError(
                f"This installation of sensorium lacks the model {model!r}: reinstall it, or name another model.",
                param="model",
            )
        return folder
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if _is_path(model):
        raise ConfigError(
            f"Model {model!r}: there is no such folder. Give a folder with config.json and safetensors files, "
            "a Hugging Face id such as 'Qwen/Qwen2-VL-2B-Instruct', 'demo' or 'demo-audio'.",
            param="model",
        )
    return _download(model, revision, weights)


def find_part(name: object, whole: Path, field: str, *, weights: bool = False) -> Path:
    """The folder of a checkpoint that config.json of ``whole`` names under ``field``: a folder, also relative to
    ``whole``, or a Hugging Face id. Raises ConfigError that says what to do when nothing is found."""
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"config.json: {field} must be a Hugging Face id or a folder, got {name!r}.",
            param="model",
        )
    beside = whole / name
    if beside.is_dir():
        return beside
    try:
        return find(name, weights=weights)
    except ConfigError as error:
        raise ConfigError(
            f"The model needs a second checkpoint, which config.json names as {field}. {error.message} The folder can "
            f"also be given with hf_overrides={{{field!r}: …}}.",
            param="model",
        ) from error


def read(folder: Path, overrides: Mapping[str, Any] | None = None) -> LoadedConfig:
    """Read ``config.json`` and its neighbours; ``overrides`` are merged into the former (nested mappings too).

    Raises ConfigError when config.json is missing or a file is not a JSON object.
    """
    config = _read_json(folder / "config.json")
    if config is None:
        raise ConfigError(
            "The model's folder has no config.json: it is not a checkpoint in the Hugging Face layout.",
            param="model",
        )
    processor = _read_json(folder / "processor_config.json") or {}
    preprocessor = _read_json(folder / "preprocessor_config.json")
    if preprocessor is None:  # newer files keep the image processor's values inside the processor's
        nested = processor.get("image_processor")
        preprocessor = nested if isinstance(nested, dict) else {}
    return LoadedConfig(
        folder=str(folder),
        config=merged(config, spelled_alike(config, overrides or {})),
        generation=_read_json(folder / "generation_config.json") or {},
        preprocessor=preprocessor,
        processor=processor,
        video_preprocessor=_video_preprocessor(folder, processor) or preprocessor,
    )


def _video_preprocessor(folder: Path, processor: Mapping[str, Any]) -> dict[str, Any] | None:
    nested = processor.get("video_processor")
    if isinstance(nested, dict):
        return nested
    return _read_json(folder / "video_preprocessor_config.json")


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``over``; mappings in both are merged in the same way."""
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


def _download(model: str, revision: str | None, weights: bool) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    where = f"{model!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=[*TEXT_FILES, *(WEIGHT_FILES if weights else ())],
                ignore_patterns=list(NOT_NEEDED),
            )
        )
    except hub.HFValidationError as error:
        reason = "it is neither a folder here nor a well-formed Hugging Face id"
        raise ConfigError(f"Model {where}: {reason}.", param="model") from error
    except hub.GatedRepoError as error:
        reason = (
            "its owner asks for agreement first: accept the terms on its page on the Hugging Face hub, "
            "then log in with `hf auth login` or set HF_TOKEN"
        )
        raise ConfigError(f"Model {where}: {reason}.", param="model") from error
    except hub.RevisionNotFoundError as error:
        raise ConfigError(
            f"Model {where}: the hub has no such revision.", param="revision"
        ) from error
    except hub.RepositoryNotFoundError as error:
        reason = (
            "there is no folder of that name here, and the Hugging Face hub has no such model (or it is private: "
            "log in with `hf auth login` or set HF_TOKEN)"
        )
        raise ConfigError(f"Model {where}: {reason}.", param="model") from error
    except OSError as error:  # also the hub's errors of connection, of status, and of offline mode
        reason = (
            "there is no folder of that name here, it is not in the local cache of the Hugging Face hub, and the "
            "hub cannot be reached. Check the network (and that HF_HUB_OFFLINE is unset), or give a local folder"
        )
        raise ConfigError(f"Model {where}: {reason}.", param="model") from error
