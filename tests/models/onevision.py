"""LLaVA-OneVision beside the reference: clips, and what the reference is given for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from sensorium.multimodal.items import Decoded, Video
from tests.models.harness import Reference, Running, image_processor, picture


def clip(num_frames: int, height: int, width: int, seed: int = 0) -> Video:
    """Pictures of one size, each another."""
    frames = np.stack([picture(height, width, 100 * seed + index) for index in range(num_frames)])
    return Video(frames, tuple(range(num_frames)), num_frames, 24.0)


class OnevisionReference(Reference):
    """With clips: their frames go through the image processor, as the video processor needs
    torchvision.
    """

    def inputs(self, seq: Running, images: Sequence[Decoded]) -> dict[str, Any]:
        """Arguments of the model for an expanded prompt; clips must have equally many frames."""
        found = super().inputs(seq, [data for data in images if isinstance(data, np.ndarray)])
        clips = [data for data in images if isinstance(data, Video)]
        if clips:
            processor = image_processor(self.folder)
            size = processor.size
            frames = [
                [
                    processor.resize(frame.transpose(2, 0, 1), size, resample=3)
                    for frame in own.frames
                ]
                for own in clips
            ]
            values = torch.from_numpy(np.array(frames)).float() / 255
            found["pixel_values_videos"] = (values - 0.5) / 0.5
        return found
