"""The real ``qwen_vl_utils``, which this project's users prepare clips with, without all of
torchvision.

The package imports torchvision, of which it uses two functions: reading a file and resizing. The
project needs no torchvision and none is installed for one package; both functions are here as
torchvision has them, over PyAV and ``torch.nn.functional.interpolate``.
"""

from __future__ import annotations

import enum
import importlib
import importlib.machinery
import sys
import types
from typing import Any

import av
import numpy as np
import torch


class _InterpolationMode(enum.Enum):
    BICUBIC = "bicubic"


def _read_video(path: str, **_: Any) -> tuple[torch.Tensor, None, dict[str, Any]]:
    with av.open(path.removeprefix("file://")) as container:
        rate = float(container.streams.video[0].average_rate or 1)
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2), None, {"video_fps": rate}


def _resize(
    video: torch.Tensor, size: list[int], interpolation: _InterpolationMode, antialias: bool
) -> torch.Tensor:
    mode = interpolation.value
    out = torch.nn.functional.interpolate(video.float(), size, mode=mode, antialias=antialias)
    return out.clamp(0, 255).round().to(video.dtype)


def qwen_vl_utils() -> types.ModuleType:
    """Return the package, imported with the two functions in the place of torchvision."""
    if "qwen_vl_utils" in sys.modules:
        return sys.modules["qwen_vl_utils"]
    whole, io, transforms, functional = (
        types.ModuleType(name)
        for name in (
            "torchvision",
            "torchvision.io",
            "torchvision.transforms",
            "torchvision.transforms.functional",
        )
    )
    io.read_video = _read_video  # type: ignore[attr-defined]
    functional.resize = _resize  # type: ignore[attr-defined]
    transforms.functional = functional  # type: ignore[attr-defined]
    transforms.InterpolationMode = _InterpolationMode  # type: ignore[attr-defined]
    whole.io, whole.transforms, whole.__version__ = io, transforms, "0.24.0"  # type: ignore[attr-defined]
    for module in (whole, io, transforms, functional):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
    try:
        return importlib.import_module("qwen_vl_utils")
    finally:
        for module in (whole, io, transforms, functional):
            del sys.modules[module.__name__]
