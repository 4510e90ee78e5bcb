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
from sensorium.models.gguf import folder as gguf
from sensorium.models.gguf import split
from sensorium.models.gguf.reader import is_gguf
from sensorium.models.interface import LoadedConfig
from sensorium.models.loading import weight_files
from sensorium.models.loading.hub import download
from sensorium.models.rope import placed_alike

TEXT_FILES = ("*.json", "*.jinja", "*.txt", "*.model")
"""Files that the frontend needs: configuration, tokenizer, templates."""
DEMOS = {"demo": "demo", "demo-audio": "demo_audio"}
"""Models that come with this package, and their folders in it."""
GGUF = ".gguf"
_HUB_FILE = re.compile(r"(?P<id>[\w.-]+/[\w.-]+):(?P<file>(?!.*\.\.)[\w][\w./ +-]*\.gguf)")
"""A GGUF file of a repository, as models are named."""
NOT_NEEDED = ("[!0-9a]*/*", "a[!d]*/*")
"""Subfolders, but for the numbered ones of embedding models, such as ``1_Pooling``, which hold
settings, and ``additional_chat_templates``."""


def find(
    model: str,
    revision: str | None = None,
    download_dir: str | None = None,
    mmproj: str | None = None,
) -> Path:
    """Return the folder of a checkpoint.

    model: one of ``DEMOS``, a local folder, a GGUF file, a Hugging Face id, or one with a GGUF file
    of it (``id:file.gguf``). Of an id everything but the weights is downloaded if not cached, into
    ``download_dir`` or the cache of the Hugging Face hub; a GGUF file is downloaded whole. Its
    folder is written from its metadata: see ``gguf.folder``. mmproj: the GGUF file of its vision
    encoder, here or in the same repository. Raises ConfigError with advice when
    nothing is found.
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
    file = gguf_file(model)
    if file is not None:
        return gguf.folder_of(file, None if mmproj is None else Path(mmproj))
    named = _HUB_FILE.fullmatch(model)
    if mmproj is not None and named is None:
        raise ConfigError(
            f"mmproj is {mmproj!r}, the vision encoder of a GGUF file, but the model {model!r} is "
            "none.",
            param="mmproj",
        )
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if named is not None:
        return _downloaded(named["id"], named["file"], revision, download_dir, mmproj)
    if _is_path(model) or model.endswith(GGUF):
        raise ConfigError(
            f"Model {model!r}: there is no such folder or file. Give a folder with config.json and "
            "safetensors files, a GGUF file, a Hugging Face id such as "
            "'Qwen/Qwen2-VL-2B-Instruct', 'demo' or 'demo-audio'.",
            param="model",
        )
    return download(model, revision, TEXT_FILES, NOT_NEEDED, download_dir=download_dir)


def _downloaded(
    model: str, file: str, revision: str | None, download_dir: str | None, mmproj: str | None
) -> Path:
    """Return the folder of a GGUF file of a repository, which is downloaded with all its parts.

    Its encoder is a file here, else one of the repository. Raises ConfigError where it is a part
    and not the first, before anything is downloaded.
    """
    split.check_first(file)
    beside = mmproj if mmproj is not None and not Path(mmproj).expanduser().is_file() else None
    names = [*split.part_names(file), *([] if beside is None else [beside])]
    wanted = [glob.escape(name) for name in names]
    whole = download(model, revision, wanted, download_dir=download_dir)
    encoder = whole / beside if beside is not None else mmproj
    return gguf.folder_of(whole / file, None if encoder is None else Path(encoder))


def hub_file(model: str) -> tuple[str, str] | None:
    """Return id and file of a model that is a GGUF file of a repository, None for another."""
    named = _HUB_FILE.fullmatch(model)
    return None if named is None or is_local(model) else (named["id"], named["file"])


def gguf_file(model: str) -> Path | None:
    """Return the GGUF file that a local model is: a file, or the only one of a folder.

    One in several parts counts as one, by its first part; encoders (mmproj) do not count. None for
    a folder with config.json, and for what is not here. Raises ConfigError for a file of another
    format, and for a folder with several.
    """
    path = Path(model).expanduser()
    if path.is_file():
        if not is_gguf(path):
            advice = (
                "it does not begin with 'GGUF', so it is damaged or of another format"
                if path.suffix == GGUF
                else "give its folder"
            )
            raise ConfigError(
                f"Model {model!r} is a file, but no GGUF file: {advice}.", param="model"
            )
        return path
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    found = sorted(
        own
        for own in path.glob(f"*{GGUF}")
        if "mmproj" not in own.name.lower() and split.is_first(own.name)
    )
    if len(found) > 1:
        what = weight_files.listing("GGUF files", [own.name for own in found])
        raise ConfigError(f"The folder {model!r} has {what}: name one of them.", param="model")
    return found[0] if found else None


def is_local(model: str) -> bool:
    """Return whether a model is in this package or here, so that nothing is downloaded."""
    return model in DEMOS or Path(model).expanduser().exists()


def fetch_weights(
    model: str, folder: Path, revision: str | None = None, download_dir: str | None = None
) -> None:
    """Download the weights of a checkpoint that ``find`` has downloaded.

    Does nothing for a local one. Only the files of ``weight_files`` are fetched:
    ``model.safetensors``, else the files that the index names.
    """
    if is_local(model) or _HUB_FILE.fullmatch(model):
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
            "the result; or start that model with --enable-lora --lora-modules NAME=FOLDER."
        )
    return (
        "The model's folder has no config.json: it is not a checkpoint in the Hugging Face layout. "
        "Of a repository of GGUF files, name one of these: id:file.gguf."
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
