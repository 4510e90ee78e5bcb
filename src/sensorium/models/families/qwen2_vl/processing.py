"""Images and videos of Qwen2-VL, resized within a range of pixels, with positions on three axes.

Edges are multiples of a merge cell.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sensorium.errors import ConfigError, InvalidEmbeddingsError, InvalidRequestError, counted
from sensorium.models.families.qwen2_vl import video
from sensorium.models.families.qwen2_vl.config import Qwen2VLConfig
from sensorium.models.families.qwen2_vl.sizes import (
    PixelRange,
    narrow,
    read_pixel_range,
    target_size,
)
from sensorium.models.interface import LoadedConfig
from sensorium.models.media import precomputed
from sensorium.models.media.options import check_option_names, identity_of
from sensorium.models.media.pixels import check_image, read_resample, resize
from sensorium.multimodal.items import Decoded, Features, Modality, Video
from sensorium.multimodal.processor import FrameSampler, Markup, PlacedItem, Replacement

MAX_PIXELS = 16384 * 28 * 28
"""The largest ``max_pixels`` that a request may ask for, unless the checkpoint's own is larger."""
OPTIONS = ("min_pixels", "max_pixels", "size")
SECONDS = "second_per_grid_ts"
MAX_TIME = 1 << 22
"""Positions on the time axis of one video: days, behind which all is at the end, so that no sum
leaves its 32 bits."""
PLACEHOLDERS = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
}


@dataclass(frozen=True, slots=True)
class Qwen2VLProcessor:
    """Processor of Qwen2-VL; see ``multimodal.processor.Processor``.

    ``meta`` of its features: ``grid`` is (t, h, w) in patches; ``second_per_grid``, of videos of
    the models whose positions follow time (``tokens_per_second``), the seconds of a temporal patch.
    """

    image_token_id: int
    video_token_id: int
    hidden_size: int
    patch_size: int
    merge_size: int
    pixels: PixelRange
    resize_images: bool
    resample: int
    videos: video.VideoRules
    tokens_per_second: float | None = None
    modalities: tuple[Modality, ...] = ("image", "video")

    @property
    def takes_seconds(self) -> bool:
        """Return whether embeddings of videos may come with the seconds of a temporal patch."""
        return self.tokens_per_second is not None

    @property
    def cell(self) -> int:
        """Edge in pixels of the square that becomes one embedding."""
        return self.patch_size * self.merge_size

    @property
    def markup(self) -> Markup | None:
        """Return None: the pad tokens are in the vocabulary."""
        return None

    def decoding(self, modality: Modality, options: Mapping[str, Any]) -> FrameSampler | None:
        """Return the frame sampling of videos; images need nothing."""
        if modality == "image":
            return None
        return self.videos.sampler(options)

    def identity(self, modality: Modality, options: Mapping[str, Any], num_items: int = 1) -> bytes:
        """Return class, configuration and options."""
        return identity_of("qwen2_vl 1", self, options)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Check the options of sizes, and for videos those of ``video.OPTIONS``.

        Sizes are ``min_pixels``, ``max_pixels``, and ``size`` with ``shortest_edge`` and
        ``longest_edge`` (in pixels too), of an image or of a video's frame.
        """
        check_option_names(options, OPTIONS + video.OPTIONS)
        try:
            limits = narrow(options, self.pixels)
        except ConfigError as error:
            raise InvalidRequestError(error.message, param="mm_processor_kwargs") from error
        highest = max(MAX_PIXELS, self.pixels.most)
        for name, value in (("min_pixels", limits.least), ("max_pixels", limits.most)):
            if value > highest:
                raise InvalidRequestError(
                    f"{name} may be at most {highest} for this model, got {value}.",
                    param="mm_processor_kwargs",
                )
        self.videos.check_options(options)

    def process(
        self, modality: Modality, data: Decoded, options: Mapping[str, Any], num_items: int = 1
    ) -> Features:
        """Return ``arrays["pixels"]``, uint8, resized.

        An image is (height, width, 3), a video (frames, height, width, 3); edges are multiples of
        ``cell`` and frames of the temporal patch.
        """
        meta: dict[str, Any] = {}
        if isinstance(data, Video):
            original = data.frames.shape[1:3]
            pixels = self.videos.pixels_of(data, options)
            frames = len(pixels) // self.videos.temporal_patch_size
            if self.tokens_per_second is not None:
                meta["second_per_grid"] = self.videos.seconds_per_grid(data, options)
        else:
            image = check_image(data)
            original, frames = image.shape[:2], 1
            pixels = self._resized(image, options)
        height, width = pixels.shape[-3:-1]
        meta["grid"] = (frames, height // self.patch_size, width // self.patch_size)
        meta["original_size"] = original
        return Features(modality, {"pixels": pixels}, self.num_embeds(meta["grid"]), meta)

    def _resized(self, image: np.ndarray, options: Mapping[str, Any]) -> np.ndarray:
        height, width = image.shape[:2]
        if self.resize_images:
            limits = narrow(options, self.pixels)
            tall, wide = target_size(height, width, self.cell, limits)
            return resize(image, tall, wide, self.resample)
        if height % self.cell or width % self.cell:
            raise InvalidRequestError(
                f"This model does not resize images: edges must be multiples of {self.cell}, got "
                f"{width} x {height}."
            )
        return np.ascontiguousarray(image)

    def num_embeds(self, grid: Sequence[int]) -> int:
        """Return the number of embeddings of a grid of patches (t, h, w)."""
        return grid[0] * grid[1] * grid[2] // self.merge_size**2

    def embeddings(self, modality: Modality, source: Any, param: str) -> list[Features]:
        """Read ``{"image_embeds": …, "image_grid_thw": (items, 3)}``, and likewise for videos.

        The embeddings are a tensor (items, embeddings, hidden size), a list of (embeddings, hidden
        size), or all one after another, (all embeddings, hidden size). Where positions follow time,
        videos may have ``second_per_grid_ts`` (items,) besides, 1 when it is missing.
        """
        names = (f"{modality}_embeds", f"{modality}_grid_thw")
        timed = modality == "video" and self.takes_seconds
        extra = {SECONDS} if timed else set()
        if not isinstance(source, Mapping) or set(source) - extra != set(names):
            got = sorted(map(str, source)) if isinstance(source, Mapping) else type(source).__name__
            raise InvalidEmbeddingsError(
                f"Embeddings for this model are a mapping with {names[0]!r} (items, embeddings, "
                f"hidden size) and {names[1]!r} (items, 3), got {got}.",
                param=param,
            )
        grids = self._grids(source[names[1]], f"{param}.{names[1]}")
        parts = self._parts(source[names[0]], grids, f"{param}.{names[0]}")
        metas: list[dict[str, Any]] = [{"grid": grid} for grid in grids]
        if timed:
            seconds = video.read_seconds(source.get(SECONDS), len(grids), f"{param}.{SECONDS}")
            metas = [meta | {"second_per_grid": s} for meta, s in zip(metas, seconds, strict=True)]
        return [
            Features(modality, {"embeds": part}, len(part), meta, precomputed=True)
            for part, meta in zip(parts, metas, strict=True)
        ]

    def _parts(
        self, embeds: Any, grids: Sequence[tuple[int, int, int]], param: str
    ) -> list[np.ndarray]:
        """Return the embeddings of each item, as many as its grid has.

        Raises InvalidEmbeddingsError for any other number.
        """
        sizes = [self.num_embeds(grid) for grid in grids]
        if precomputed.is_array(embeds) and embeds.ndim == 2:
            whole = precomputed.dense(embeds, param)
            precomputed.check_width(whole, self.hidden_size, param)
            if sum(sizes) != len(whole):
                raise InvalidEmbeddingsError(
                    f"The grids {_few(grids)} stand for {_few(sizes)} embeddings, together "
                    f"{sum(sizes)}, but there are {len(whole)}.",
                    param=param,
                )
            return np.split(whole, np.cumsum(sizes)[:-1])
        items = precomputed.per_item(embeds, param)
        if len(items) != len(grids):
            raise InvalidEmbeddingsError(
                f"There {'is' if len(grids) == 1 else 'are'} {counted(len(grids), 'grid')} for the "
                f"embeddings of {counted(len(items), 'item')}.",
                param=param,
            )
        for (array, place), grid, size in zip(items, grids, sizes, strict=True):
            precomputed.check_width(array, self.hidden_size, place)
            if len(array) != size:
                raise InvalidEmbeddingsError(
                    f"The grid {grid} stands for {size} embeddings, but there are {len(array)}.",
                    param=place,
                )
        return [array for array, _ in items]

    def placeholder(self, modality: Modality) -> tuple[int, ...]:
        """Return the pad token between the vision start and end tokens."""
        return (self.video_token_id if modality == "video" else self.image_token_id,)

    def fill(self, modality: Modality) -> int:
        """Return the pad token."""
        return self.video_token_id if modality == "video" else self.image_token_id

    def placeholder_text(self, modality: Modality, number: int = 1) -> str:
        """Return the pad token's text between those of the vision start and end tokens."""
        return PLACEHOLDERS[modality]

    def replacement(self, features: Features, index: int = 0) -> Replacement:
        """Return the pad token, repeated."""
        num = features.num_embeds
        return Replacement(self.placeholder(features.modality) * num, ((0, num),))

    def positions(
        self, token_ids: Sequence[int], items: Sequence[PlacedItem]
    ) -> tuple[np.ndarray, int] | None:
        """Return M-RoPE positions (3, num_tokens) int32 and the delta.

        None without items, when all three axes count alike.
        """
        if not items:
            return None
        parts, token_pos, next_id = [], 0, 0
        for item in items:
            blocks = self.blocks(item.features)
            for (start, length), block in zip(item.runs, blocks, strict=True):
                text = start - token_pos
                placed = block + (next_id + text)
                parts += [_line(next_id, text), placed]
                token_pos, next_id = start + length, int(placed.max()) + 1
        rest = len(token_ids) - token_pos
        parts.append(_line(next_id, rest))
        return np.concatenate(parts, axis=1), next_id + rest - len(token_ids)

    def blocks(self, features: Features) -> list[np.ndarray]:
        """Return time, row and column (3, embeddings) int32 of each embedding of an item, from 0.

        There is one array for each run of its placeholder.
        """
        t, h, w = features.meta["grid"]
        h, w = h // self.merge_size, w // self.merge_size
        block = np.indices((t, h, w), dtype=np.int32).reshape(3, -1)
        if features.modality == "video" and self.tokens_per_second is not None:
            # In single precision, as the reference: it decides where a product falls on a whole
            # number.
            step = np.float32(
                min(self.tokens_per_second * features.meta["second_per_grid"], MAX_TIME)
            )
            times = block[0].astype(np.float32) * step
            block[0] = np.minimum(times, MAX_TIME).astype(np.int32)
        return [block]

    def _grids(self, value: Any, param: str) -> list[tuple[int, int, int]]:
        grids = [(t, h, w) for t, h, w in precomputed.integers(value, 3, param)]
        for index, (t, h, w) in enumerate(grids):
            if min(t, h, w) < 1 or h % self.merge_size or w % self.merge_size:
                raise InvalidEmbeddingsError(
                    "A grid is (frames, height, width) in patches, positive, height and width "
                    f"multiples of {self.merge_size}; got {(t, h, w)}.",
                    param=f"{param}[{index}]",
                )
        return grids


def build(
    config: Qwen2VLConfig,
    loaded: LoadedConfig,
    rules: type[video.VideoRules] = video.VideoRules,
    video_defaults: Mapping[str, Any] | None = None,
    video_pixels: PixelRange = video.PIXELS,
) -> Qwen2VLProcessor:
    """Build the processor of a checkpoint.

    ``rules``, ``video_defaults``, ``video_pixels``: the family's class of video rules, the values
    that its files may leave out, and the range of pixels. Raises ConfigError when its preprocessors
    make other patches than its tower takes.
    """
    preprocessor, vision = loaded.preprocessor, config.vision
    _check_patches(preprocessor, config)
    cell = vision.patch_size * vision.merge_size
    own = {**(video_defaults or {}), **loaded.video_preprocessor}
    _check_patches(own, config)
    video_rules = video.read_video_rules(
        own, preprocessor, cell, vision.temporal_patch_size, rules, video_pixels
    )
    return Qwen2VLProcessor(
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        hidden_size=config.shape.embed_size,
        patch_size=vision.patch_size,
        merge_size=vision.merge_size,
        pixels=read_pixel_range(preprocessor, PixelRange(4 * cell**2, 1280 * cell**2)),
        resize_images=preprocessor.get("do_resize") is not False,
        resample=read_resample(preprocessor),
        videos=video_rules,
        tokens_per_second=config.tokens_per_second,
    )


def _check_patches(preprocessor: Mapping[str, Any], config: Qwen2VLConfig) -> None:
    sizes = {
        "patch_size": config.vision.patch_size,
        "merge_size": config.vision.merge_size,
        "temporal_patch_size": config.vision.temporal_patch_size,
    }
    for name, size in sizes.items():
        if preprocessor.get(name, size) != size:
            raise ConfigError(
                f"preprocessor_config.json: {name} {preprocessor[name]!r} is not the vision "
                f"tower's {size}.",
                param="model",
            )


def _few(values: Sequence[object]) -> str:
    """Return the first of many values."""
    return f"[{', '.join(map(str, values[:8]))}{', …' if len(values) > 8 else ''}]"


def _line(start: int, length: int) -> np.ndarray:
    """Return (3, length) int32: start, start + 1 … on every axis."""
    return np.broadcast_to(np.arange(start, start + length, dtype=np.int32), (3, length))
