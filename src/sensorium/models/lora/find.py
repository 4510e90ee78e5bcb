"""Finding of an adapter's folder."""

from __future__ import annotations

from pathlib import Path

from sensorium.errors import ConfigError
from sensorium.models.loading.hub import download
from sensorium.models.lora import settings

WANTED = (settings.NAME, "adapter_model.safetensors")


def find_adapter(path: str, download_dir: str | None = None) -> Path:
    """Return the folder of an adapter: a local one, or that of a Hugging Face id, downloaded.

    Raises ConfigError when there is none.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise ConfigError(f"There is no folder {path!r:.200}.", param="lora_modules")
    return download(path, None, WANTED, download_dir=download_dir)
