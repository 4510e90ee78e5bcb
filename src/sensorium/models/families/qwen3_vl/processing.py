"""Images and videos of Qwen3-VL: total video size is bounded, timestamps are in the prompt.

The placeholder of a video is ``<|vision_start|><|video_pad|><|vision_end|>``; all three become, for
each temporal patch, ``<1.5 seconds><|vision_start|>`` with the patch's embeddings and
``<|vision_end|>``. Positions treat each patch as an image. That is the rule of the reference up to
version 5.9 of transformers, for which the model's makers published it; from 5.10 on the outer pair
of tokens stays where it is. A checkpoint gets that of its ``transformers_version``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from sensorium.models.configs import count
from sensorium.models.families.qwen2_vl.config import Qwen2VLConfig
from sensorium.models.families.qwen2_vl.processing import Qwen2VLProcessor
from sensorium.models.families.qwen2_vl.processing import build as build_qwen2_vl
from sensorium.models.families.qwen2_vl.sizes import PixelRange, check_aspect, narrow
from sensorium.models.families.qwen2_vl.video import VideoRules, frame_options, total_pixels
from sensorium.models.interface import LoadedConfig
from sensorium.models.media.options import identity_of
from sensorium.multimodal.decode.video import frame_sampling
from sensorium.multimodal.items import Decoded, Features, Modality, Video
from sensorium.multimodal.processor import Replacement

KEEPS_OUTER_PAIR = (5, 10)
"""Version of transformers from which on the start and end tokens around a video stay around its
patches."""

UNKNOWN_FPS = 24.0
"""Rate of frames without metadata, as the reference assumes it."""

VIDEO_DEFAULTS = {
    "do_sample_frames": True,
    "fps": 2,
    "max_video_tokens": 768,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
VIDEO_PIXELS = PixelRange(128 * 32 * 32, 768 * 32 * 32)


@dataclass(frozen=True, slots=True)
class Qwen3VideoRules(VideoRules):
    """Video options of Qwen3-VL.

    ``pixels`` bounds all frames together; ``max_tokens`` bounds one frame.
    """

    rule: ClassVar[Callable[..., np.ndarray]] = staticmethod(frame_sampling.qwen3_vl)

    def rule_options(self) -> dict[str, Any]:
        """Return no options: the rule has no multiple of frames."""
        return {}

    def target(
        self, num: int, height: int, width: int, options: Mapping[str, Any]
    ) -> tuple[int, int]:
        """Return height and width of each of ``num`` frames.

        They are multiples of ``cell``, and all frames together are within the range of pixels.
        """
        check_aspect(height, width, "A video")
        cell, limits = self.cell, narrow(options, self.pixels)
        most = limits.most
        if self.max_tokens is not None:
            share = min(self.max_tokens * cell**2, limits.most // num)
            most = max(share, int(limits.least * 1.05)) * num
        least, most = self._of_frames(limits.least, most, num, options)
        if height < cell or width < cell:
            scale = max(cell / height, cell / width)
            height, width = int(height * scale), int(width * scale)
        tall, wide = round(height / cell) * cell, round(width / cell) * cell
        whole = max(1, round(num / self.temporal_patch_size)) * self.temporal_patch_size
        if whole * tall * wide > most:
            shrink = math.sqrt(num * height * width / most)
            tall = max(cell, math.floor(height / shrink / cell) * cell)
            wide = max(cell, math.floor(width / shrink / cell) * cell)
        elif whole * tall * wide < least:
            grow = math.sqrt(least / (num * height * width))
            tall = math.ceil(height * grow / cell) * cell
            wide = math.ceil(width * grow / cell) * cell
        return tall, wide

    def _of_frames(
        self, least: int, most: int, num: int, options: Mapping[str, Any]
    ) -> tuple[int, int]:
        """Return least and most pixels of ``num`` frames together.

        Options may bound each frame and all of them.
        """
        each, total = frame_options(options), total_pixels(options)
        if total is not None:
            most = min(most, total * self.temporal_patch_size)
        if "max_pixels" in each:
            most = min(most, each["max_pixels"] * num)
        if "min_pixels" in each:
            least = each["min_pixels"] * num
        return min(least, most), most

    def timestamps(self, clip: Video) -> tuple[float, ...]:
        """Return the seconds of each temporal patch, midway between its first and last frame."""
        size, fps = self.temporal_patch_size, clip.fps or UNKNOWN_FPS
        indices = [*clip.indices, *clip.indices[-1:] * (-len(clip.indices) % size)]
        return tuple(
            (indices[start] / fps + indices[start + size - 1] / fps) / 2
            for start in range(0, len(indices), size)
        )


@dataclass(frozen=True, slots=True)
class Qwen3VLProcessor(Qwen2VLProcessor):
    """Processor of Qwen3-VL: Qwen2-VL's, with timestamps of videos.

    ``folder``: of the tokenizer for the text of times. ``keeps_outer``: if true, the start and end
    tokens around a video stay around its patches. ``meta["timestamps"]`` of videos: seconds of each
    patch.
    """

    start_id: int = 0
    end_id: int = 0
    keeps_outer: bool = False
    folder: str = ""

    @property
    def takes_seconds(self) -> bool:
        """Embeddings of videos may come with the seconds of a temporal patch."""
        return True

    def identity(self, modality: Modality, options: Mapping[str, Any], num_items: int = 1) -> bytes:
        """Return class, configuration and options, independent of the checkpoint's folder."""
        known = [getattr(self, f.name) for f in fields(self) if f.name != "folder"]
        return identity_of("qwen3_vl 1", known, options)

    def process(
        self, modality: Modality, data: Decoded, options: Mapping[str, Any], num_items: int = 1
    ) -> Features:
        """Process an item as Qwen2-VL does, and add the timestamps of a video's patches."""
        features = Qwen2VLProcessor.process(self, modality, data, options, num_items)
        if not isinstance(data, Video) or not isinstance(self.videos, Qwen3VideoRules):
            return features
        meta = {**features.meta, "timestamps": self.videos.timestamps(data)}
        return Features(modality, features.arrays, features.num_embeds, meta)

    def placeholder(self, modality: Modality) -> tuple[int, ...]:
        """Return the pad token; for videos with the start and end tokens around it."""
        if modality == "image":
            return (self.image_token_id,)
        return (self.start_id, self.video_token_id, self.end_id)

    def replacement(self, features: Features, index: int = 0) -> Replacement:
        """Return the pad token, repeated; for videos per patch, with its time before it."""
        if features.modality == "image":
            return Qwen2VLProcessor.replacement(self, features, index)
        t, h, w = features.meta["grid"]
        num = h * w // self.merge_size**2
        times = features.meta.get("timestamps")
        if times is None:  # embeddings: as of frames at equal distances from the first on
            size = self.videos.temporal_patch_size
            middle = (size - 1) / (2 * size)
            times = tuple((k + middle) * features.meta["second_per_grid"] for k in range(t))
        ids: list[int] = [self.start_id] if self.keeps_outer else []
        runs: list[tuple[int, int]] = []
        for seconds in times:
            ids += [*_spelled(self.folder, f"<{seconds:.1f} seconds>"), self.start_id]
            runs.append((len(ids), num))
            ids += [*(self.video_token_id,) * num, self.end_id]
        ids += [self.end_id] if self.keeps_outer else []
        return Replacement(tuple(ids), tuple(runs))

    def blocks(self, features: Features) -> list[np.ndarray]:
        """Return time, row and column (3, embeddings) of each patch of a video, as of an image."""
        t, h, w = features.meta["grid"]
        still = np.indices((1, h // self.merge_size, w // self.merge_size), dtype=np.int32)
        return [still.reshape(3, -1)] * t


def build(config: Qwen2VLConfig, loaded: LoadedConfig) -> Qwen3VLProcessor:
    """Build the processor of a checkpoint. Raises ConfigError as Qwen2-VL's."""
    base = build_qwen2_vl(
        config,
        loaded,
        rules=Qwen3VideoRules,
        video_defaults=VIDEO_DEFAULTS,
        video_pixels=VIDEO_PIXELS,
    )
    given = {f.name: getattr(base, f.name) for f in fields(Qwen2VLProcessor)}
    return Qwen3VLProcessor(
        **given,
        start_id=count(loaded.config, "vision_start_token_id", 151652),
        end_id=count(loaded.config, "vision_end_token_id", 151653),
        keeps_outer=_version(loaded.config.get("transformers_version")) >= KEEPS_OUTER_PAIR,
        folder=loaded.folder,
    )


def _version(text: Any) -> tuple[int, int]:
    """Return major and minor number of a version such as ``4.57.0.dev0``; zeros if it is none."""
    found = re.match(r"(\d{1,6})\.(\d{1,6})", text) if isinstance(text, str) else None
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _spelled(folder: str, text: str) -> list[int]:
    file = Path(folder) / "tokenizer.json"
    stamp = file.stat().st_mtime_ns if file.is_file() else 0
    tokenizer = _tokenizer(folder, stamp)
    return list(tokenizer.encode(text, add_special_tokens=False))


@lru_cache(maxsize=2)
def _tokenizer(folder: str, stamp: int) -> Any:
    """Return the checkpoint's tokenizer, cached per process.

    ``stamp`` changes with the file.
    """
    from sensorium.text.tokenizer import Tokenizer

    return Tokenizer.from_folder(folder)
