"""Sample images, video and audio, under the names that examples of vLLM use.

All were drawn or synthesised by this project (``scripts/draw_assets``); nothing is downloaded.
"""

from __future__ import annotations

from sensorium.assets.audio import AudioAsset
from sensorium.assets.image import ImageAsset
from sensorium.assets.video import VideoAsset

__all__ = ["AudioAsset", "ImageAsset", "VideoAsset"]
