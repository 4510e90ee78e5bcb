"""Finding of an adapter's folder."""

from __future__ import annotations

from pathlib import Path

from sensorium.errors import ConfigError
from sensorium.models.loading.hub import download
from sensorium.models.lora import settings

WANTED = (settings.NAME, "adapter_model.safetensors")


def is_downloaded(path: str) -> bool:
    """Return True for a path that may be a Hugging Face id, and is no folder here."""
    if path.startswith((".", "~", "/")) or path.count("/") != 1:
        return False
    return not Path(path).is_dir()


def find_adapter(path: str, download_dir: str | None = None) -> Path:
    """Return the folder of an adapter: a local one, or that of a Hugging Face id, downloaded.

    Raises ConfigError when there is none.
    """
    if is_downloaded(path):
        return download(path, None, WANTED, download_dir=download_dir)
    try:
        folder = Path(path).expanduser()
    except RuntimeError:  # there is no such user
        folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {path!r:.200}.", param="lora_modules")
    return folder
