"""Sample images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from PIL import Image

from sensorium.assets.base import Asset


@dataclass(frozen=True)
class ImageAsset(Asset):
    """Sample images.

    ``cherry_blossom``: blossoms before a tower. ``stop_sign``: a stop sign at a street.
    """

    names: ClassVar[tuple[str, ...]] = ("cherry_blossom", "stop_sign")
    suffix: ClassVar[str] = ".jpg"
    media_type: ClassVar[str] = "image/jpeg"

    @property
    def pil_image(self) -> Image.Image:
        """Load the image, RGB."""
        with Image.open(self.path) as image:
            return image.convert("RGB")
