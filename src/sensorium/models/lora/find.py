"""Finding of an adapter's folder."""

from __future__ import annotations

from pathlib import Path

from sensorium.errors import ConfigError
from sensorium.models.loading.hub import download
from sensorium.models.lora import settings

WEIGHTS = "adapter_model.safetensors"


def is_downloaded(path: str) -> bool:
    """Return True for a path that may be a Hugging Face id, and is no folder here."""
    if path.startswith((".", "~", "/")) or path.count("/") != 1:
        return False
    return not Path(path).is_dir()


def find_adapter(path: str, download_dir: str | None = None) -> Path:
    """Return the folder of an adapter: a local one, or that of a Hugging Face id, downloaded.

    Its configuration is downloaded and checked before its weights. Raises ConfigError when there is
    no adapter, or one that cannot be used.
    """
    if not is_downloaded(path):
        folder = _local(path)
        settings.read_settings(folder)
        return folder
    folder = _downloaded(path, settings.NAME, download_dir)
    settings.read_settings(folder)
    # What the configuration was read of, not what somebody has uploaded since.
    return _downloaded(path, WEIGHTS, download_dir, folder.name)


def _local(path: str) -> Path:
    try:
        folder = Path(path).expanduser()
    except RuntimeError:  # there is no such user
        folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {path!r:.200}.", param="lora_modules")
    return folder


def _downloaded(
    name: str, file: str, download_dir: str | None, revision: str | None = None
) -> Path:
    """Download a file of an adapter, and return its folder."""
    try:
        return download(name, revision, (file,), download_dir=download_dir)
    except ConfigError as error:
        message = error.message.removeprefix("Model ")  # the name of the adapter comes before it
        raise ConfigError(message, param="lora_modules") from error
