"""Folders from which requests may load adapters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sensorium.errors import InvalidRequestError

FILES = ("adapter_config.json", "adapter_model.safetensors")


def allowed_folder(path: str, allowed: Sequence[str]) -> Path:
    """Return the folder of an adapter, with links followed.

    Its files may be links, too, as in the hub's cache, but only to places that are allowed. Raises
    InvalidRequestError, the same for a place outside of the allowed folders whatever is there.
    """
    roots = [Path(root).expanduser().resolve() for root in allowed]
    try:
        folder = Path(path).expanduser().resolve()
        places = [folder, *((folder / name).resolve() for name in FILES)]
    except (OSError, RuntimeError, ValueError):
        places = []
    if not places or not all(any(p.is_relative_to(root) for root in roots) for p in places):
        raise InvalidRequestError(
            "lora_path is not below a folder from which requests may load adapters "
            "(--allowed-lora-path).",
            param="lora_path",
        )
    if not folder.is_dir():
        raise InvalidRequestError(f"There is no folder {path!r:.200}.", param="lora_path")
    return folder
