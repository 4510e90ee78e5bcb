"""Sample videos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from sensorium.assets.base import Asset
from sensorium.errors import InvalidRequestError


@dataclass(frozen=True)
class VideoAsset(Asset):
    """Sample videos.

    ``baby_reading``: a child turns the pages of a book, 6 seconds at 15 frames per second.

    Attributes:
        num_frames: number of frames, evenly spread from the first to the last; -1 is all.
    """

    num_frames: int = -1
    names: ClassVar[tuple[str, ...]] = ("baby_reading",)
    suffix: ClassVar[str] = ".mp4"
    media_type: ClassVar[str] = "video/mp4"

    def __post_init__(self) -> None:
        """Check the values. Raises InvalidRequestError."""
        super().__post_init__()
        if type(self.num_frames) is not int or (self.num_frames != -1 and self.num_frames < 1):
            raise InvalidRequestError(
                f"num_frames must be from 1, or -1 for all, got {self.num_frames!r}.",
                param="num_frames",
            )

    @property
    def np_ndarrays(self) -> np.ndarray:
        """Return the frames, uint8 (num_frames, height, width, 3)."""
        return self._frames()[0]

    @property
    def pil_images(self) -> list[Image.Image]:
        """Return the frames as images."""
        return [Image.fromarray(frame) for frame in self.np_ndarrays]

    @property
    def metadata(self) -> dict[str, Any]:
        """Return ``fps``, ``duration`` (s), ``total_num_frames`` and ``frames_indices``."""
        return self._frames()[1]

    def _frames(self) -> tuple[np.ndarray, dict[str, Any]]:
        import av
        from av.video.reformatter import VideoReformatter

        # One for all frames: by default each would start a thread per core.
        scaler = VideoReformatter()
        with av.open(str(self.path)) as container:
            stream = container.streams.video[0]
            stream.thread_count = 1
            rate = stream.average_rate
            every = [
                scaler.reformat(frame, format="rgb24", threads=1).to_ndarray()
                for frame in container.decode(stream)
            ]
        total, fps = len(every), float(rate) if rate is not None else 1.0
        wanted = total if self.num_frames == -1 else min(self.num_frames, total)
        indices = np.linspace(0, total - 1, wanted).astype(int).tolist()
        metadata = {
            "fps": fps,
            "duration": total / fps,
            "total_num_frames": total,
            "frames_indices": indices,
        }
        return np.stack([every[index] for index in indices]), metadata
