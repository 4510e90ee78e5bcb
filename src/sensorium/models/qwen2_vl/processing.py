"""Images of Qwen2-VL: resized to multiples of a merge cell within a range of pixels; positions on three axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sensorium.errors import ConfigError, InvalidEmbeddingsError, InvalidRequestError
from sensorium.models import precomputed
from sensorium.models.interface import LoadedConfig
from sensorium.models.pixels import check_image, read_resample, resize
from sensorium.models.processing import check_option_names, identity_of
from sensorium.models.qwen2_vl.config import Qwen2VLConfig
from sensorium.multimodal.items import Decoded, Features, Modality
from sensorium.multimodal.processor import Markup, PlacedItem, Replacement

MAX_ASPECT = 200
MAX_PIXELS = 16384 * 28 * 28
"""The largest ``max_pixels`` that a request may ask for, unless the checkpoint's own is larger."""
OPTIONS = ("min_pixels", "max_pixels", "size")
PLACEHOLDERS = {
    "image": "<|vision_start|><|image_pad|><|vision_end|>",
    "video": "<|vision_start|><|video_pad|><|vision_end|>",
}


@dataclass(frozen=True, slots=True)
class PixelRange:
    """Least and most pixels (height times width) of a resized image."""

    least: int
    most: int


@dataclass(frozen=True, slots=True)
class Qwen2VLProcessor:
    """See ``multimodal.processor.Processor``. ``meta["grid"]`` of its features is (t, h, w) in patches."""

    image_token_id: int
    video_token_id: int
    hidden_size: int
    patch_size: int
    merge_size: int
    pixels: PixelRange
    resize_images: bool
    resample: int
    modalities: tuple[Modality, ...] = ("image",)

    @property
    def cell(self) -> int:
        """Edge in pixels of what becomes one embedding."""
        return self.patch_size * self.merge_size

    @property
    def markup(self) -> Markup | None:
        """The pad tokens are in the vocabulary."""
        return None

    def decoding(self, modality: Modality, options: Mapping[str, Any]) -> None:
        """Images need nothing."""
        return

    def identity(self, modality: Modality, options: Mapping[str, Any], num_items: int = 1) -> bytes:
        """Class, configuration and options."""
        return identity_of("qwen2_vl 1", self, options)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """``min_pixels``, ``max_pixels``, and ``size`` with ``shortest_edge`` and ``longest_edge`` (in pixels too)."""
        check_option_names(options, OPTIONS)
        try:
            limits = read_pixel_range(options, self.pixels)
        except ConfigError as error:
            raise InvalidRequestError(error.message, param="mm_processor_kwargs") from error
        highest = max(MAX_PIXELS, self.pixels.most)
        if limits.most > highest:
            raise InvalidRequestError(
                f"max_pixels may be at most {highest} for this model, got {limits.most}.",
                param="mm_processor_kwargs",
            )

    def process(
        self, modality: Modality, data: Decoded, options: Mapping[str, Any], num_items: int = 1
    ) -> Features:
        """``arrays["pixels"]``: (height, width, 3) uint8, both multiples of ``cell``."""
        image = check_image(data)
        height, width = image.shape[:2]
        limits = read_pixel_range(options, self.pixels)
        if self.resize_images:
            tall, wide = target_size(height, width, self.cell, limits)
            pixels = resize(image, tall, wide, self.resample)
        elif height % self.cell or width % self.cell:
            raise InvalidRequestError(
                f"This model does not resize images: edges must be multiples of {self.cell}, got {width} x {height}."
            )
        else:
            pixels = np.ascontiguousarray(image)
        grid = (1, pixels.shape[0] // self.patch_size, pixels.shape[1] // self.patch_size)
        meta = {"grid": grid, "original_size": (height, width)}
        return Features(modality, {"pixels": pixels}, self.num_embeds(grid), meta)

    def num_embeds(self, grid: Sequence[int]) -> int:
        """Embeddings of a grid of patches (t, h, w)."""
        return grid[0] * grid[1] * grid[2] // self.merge_size**2

    def embeddings(self, modality: Modality, source: Any, param: str) -> list[Features]:
        """``{"image_embeds": (all embeddings, hidden size), "image_grid_thw": (items, 3)}``."""
        names = (f"{modality}_embeds", f"{modality}_grid_thw")
        if not isinstance(source, Mapping) or set(source) != set(names):
            got = sorted(map(str, source)) if isinstance(source, Mapping) else type(source).__name__
            raise InvalidEmbeddingsError(
                f"Embeddings for this model are a mapping with {names[0]!r} (all embeddings, hidden size) and "
                f"{names[1]!r} (items, 3), got {got}.",
                param=param,
            )
        place = f"{param}.{names[0]}"
        embeds = precomputed.dense(source[names[0]], place)
        if embeds.ndim != 2:
            raise InvalidEmbeddingsError(
                f"Embeddings must have 2 dimensions (all embeddings, hidden size), got shape {tuple(embeds.shape)}.",
                param=place,
            )
        precomputed.check_width(embeds, self.hidden_size, place)
        grids = self._grids(source[names[1]], f"{param}.{names[1]}")
        sizes = [self.num_embeds(grid) for grid in grids]
        if sum(sizes) != len(embeds):
            raise InvalidEmbeddingsError(
                f"The grids {grids} stand for {sizes} embeddings, together {sum(sizes)}, but there are {len(embeds)}.",
                param=place,
            )
        parts = np.split(embeds, np.cumsum(sizes)[:-1])
        return [
            Features(modality, {"embeds": part}, len(part), {"grid": grid}, precomputed=True)
            for part, grid in zip(parts, grids, strict=True)
        ]

    def placeholder(self, modality: Modality) -> tuple[int, ...]:
        """The pad token between the vision start and end tokens."""
        return (self.video_token_id if modality == "video" else self.image_token_id,)

    def placeholder_text(self, modality: Modality, number: int = 1) -> str:
        """The pad token's text between those of the vision start and end tokens."""
        return PLACEHOLDERS[modality]

    def replacement(self, features: Features, index: int = 0) -> Replacement:
        """The pad token, repeated."""
        num = features.num_embeds
        return Replacement(self.placeholder(features.modality) * num, ((0, num),))

    def positions(
        self, token_ids: Sequence[int], items: Sequence[PlacedItem]
    ) -> tuple[np.ndarray, int] | None:
        """M-RoPE: (3, num_tokens) int32 and the delta; None without items, when all three axes count alike."""
        if not items:
            return None
        parts, token_pos, next_id = [], 0, 0
        for item in items:
            start, length = item.runs[0]
            text = start - token_pos
            parts.append(_line(next_id, text))
            block = self._block(item.features.meta["grid"]) + (next_id + text)
            parts.append(block)
            token_pos, next_id = start + length, int(block.max()) + 1
        rest = len(token_ids) - token_pos
        parts.append(_line(next_id, rest))
        return np.concatenate(parts, axis=1), next_id + rest - len(token_ids)

    def _block(self, grid: Sequence[int]) -> np.ndarray:
        """Time, row and column (3, num_embeds) int32 of each embedding of a grid."""
        t, h, w = grid[0], grid[1] // self.merge_size, grid[2] // self.merge_size
        return np.indices((t, h, w), dtype=np.int32).reshape(3, -1)

    def _grids(self, value: Any, param: str) -> list[tuple[int, int, int]]:
        try:
            array = np.asarray(value.tolist() if precomputed.is_array(value) else value)
        except (ValueError, TypeError, RuntimeError, NotImplementedError):  # ragged, sparse, meta
            array = np.empty(0)
        if array.ndim == 1:
            array = array[None]
        if array.ndim != 2 or array.shape[1] != 3 or not len(array) or array.dtype.kind not in "iu":
            raise InvalidEmbeddingsError(
                f"Grids must be integers of shape (items, 3), got shape {tuple(array.shape)} of {array.dtype}.",
                param=param,
            )
        grids = [(int(t), int(h), int(w)) for t, h, w in array]
        for index, (t, h, w) in enumerate(grids):
            if min(t, h, w) < 1 or h % self.merge_size or w % self.merge_size:
                raise InvalidEmbeddingsError(
                    f"A grid is (frames, height, width) in patches, positive, height and width multiples of "
                    f"{self.merge_size}; got {(t, h, w)}.",
                    param=f"{param}[{index}]",
                )
        return grids


def build(config: Qwen2VLConfig, loaded: LoadedConfig) -> Qwen2VLProcessor:
    """The processor of a checkpoint. Raises ConfigError when its preprocessor makes other patches than its tower."""
    preprocessor, vision = loaded.preprocessor, config.vision
    sizes = {
        "patch_size": vision.patch_size,
        "merge_size": vision.merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }
    for name, size in sizes.items():
        if preprocessor.get(name, size) != size:
            raise ConfigError(
                f"preprocessor_config.json: {name} {preprocessor[name]!r} is not the vision tower's {size}.",
                param="model",
            )
    cell = (vision.patch_size * vision.merge_size) ** 2
    return Qwen2VLProcessor(
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        hidden_size=config.text.hidden_size,
        patch_size=vision.patch_size,
        merge_size=vision.merge_size,
        pixels=read_pixel_range(preprocessor, PixelRange(4 * cell, 1280 * cell)),
        resize_images=preprocessor.get("do_resize") is not False,
        resample=read_resample(preprocessor),
    )


def read_pixel_range(options: Mapping[str, Any], default: PixelRange) -> PixelRange:
    """``min_pixels`` and ``max_pixels``, or ``size`` with either these names or ``shortest_edge`` and ``longest_edge``.

    Raises ConfigError for values that are not integers from 1, or out of order.
    """
    size = options.get("size")
    if size is not None and not isinstance(size, Mapping):
        raise ConfigError(f"size must be a mapping, got {size!r}.", param="size")
    least, most = default.least, default.most
    if size is not None:
        least = size.get("shortest_edge", size.get("min_pixels", least))
        most = size.get("longest_edge", size.get("max_pixels", most))
    for name, value in (("min_pixels", least), ("max_pixels", most)):
        given = options.get(name)
        value = value if given is None else given
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{name} must be an integer from 1, got {value!r}.", param=name)
        least, most = (value, most) if name == "min_pixels" else (least, value)
    if least > most:
        raise ConfigError(f"min_pixels {least} is more than max_pixels {most}.", param="min_pixels")
    return PixelRange(least, most)


def target_size(height: int, width: int, cell: int, limits: PixelRange) -> tuple[int, int]:
    """Height and width, multiples of ``cell``, near the image's own, with their product within ``limits``.

    Raises InvalidRequestError for an aspect ratio above 200.
    """
    aspect = max(height, width) / min(height, width)
    if aspect > MAX_ASPECT:
        raise InvalidRequestError(
            f"An image of {width} x {height} pixels has an aspect ratio of {aspect:.0f}; this model takes at most "
            f"{MAX_ASPECT}. Crop or pad it."
        )
    tall, wide = round(height / cell) * cell, round(width / cell) * cell
    if tall * wide > limits.most:
        shrink = math.sqrt(height * width / limits.most)
        tall = max(cell, math.floor(height / shrink / cell) * cell)
        wide = max(cell, math.floor(width / shrink / cell) * cell)
    elif tall * wide < limits.least:
        grow = math.sqrt(limits.least / (height * width))
        tall = math.ceil(height * grow / cell) * cell
        wide = math.ceil(width * grow / cell) * cell
    return tall, wide


def _line(start: int, length: int) -> np.ndarray:
    """(3, length) int32: start, start + 1 … on every axis."""
    return np.broadcast_to(np.arange(start, start + length, dtype=np.int32), (3, length))
