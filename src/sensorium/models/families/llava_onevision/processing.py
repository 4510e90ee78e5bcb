"""Images and videos of LLaVA-OneVision.

A single image is cut into tiles, images among several are padded to a square, and frames are
resized to one without padding.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sensorium.errors import ConfigError, InvalidEmbeddingsError, counted
from sensorium.models.families.llava_onevision.config import LlavaOnevisionConfig, read_pinpoints
from sensorium.models.families.llava_onevision.tiles import Grids, pad_and_resize
from sensorium.models.interface import LoadedConfig
from sensorium.models.media import precomputed
from sensorium.models.media.options import check_option_names, identity_of
from sensorium.models.media.pixels import (
    CLIP_MEAN,
    check_image,
    check_video,
    read_normalization,
    read_resample,
    resize,
)
from sensorium.multimodal.decode.video import frame_sampling
from sensorium.multimodal.items import Decoded, Features, Modality, Video
from sensorium.multimodal.processor import (
    FrameSampler,
    Markup,
    PlacedItem,
    Replacement,
)

PLACEHOLDERS = {"image": "<image>", "video": "<video>"}
OPTIONS = ("num_frames", "fps")


@dataclass(frozen=True, slots=True)
class LlavaOnevisionProcessor:
    """Processor of LLaVA-OneVision; see ``multimodal.processor.Processor``.

    ``arrays["pixels"]``: tiles or frames (N, tile, tile, 3) uint8.
    """

    image_token_id: int
    video_token_id: int
    hidden_size: int
    grids: Grids
    background: tuple[int, int, int]
    """Colour around images that are padded to a square."""
    resample: int
    modalities: tuple[Modality, ...] = ("image", "video")

    @property
    def markup(self) -> Markup | None:
        """Return None: both tokens are in the vocabulary."""
        return None

    def decoding(self, modality: Modality, options: Mapping[str, Any]) -> FrameSampler | None:
        """Return uniform frame sampling for videos; images need no options."""
        if modality != "video":
            return None
        return functools.partial(frame_sampling.uniform, asked=frame_sampling.read_asked(options))

    def identity(self, modality: Modality, options: Mapping[str, Any], num_items: int = 1) -> bytes:
        """Return class, configuration, options, and whether an image is the prompt's only one."""
        is_tiled = modality == "image" and num_items == 1
        return identity_of("llava_onevision 1", self, options, is_tiled)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Check ``num_frames`` and ``fps`` of videos, as in ``media_io_kwargs``."""
        check_option_names(options, OPTIONS)
        frame_sampling.read_asked(options)

    def process(
        self, modality: Modality, data: Decoded, options: Mapping[str, Any], num_items: int = 1
    ) -> Features:
        """Process a single image into itself and its tiles, one of several into a square.

        A video becomes its frames.
        """
        if isinstance(data, Video):
            return self._clip(data)
        image = check_image(data)
        height, width = image.shape[:2]
        if num_items == 1:
            pixels = self.grids.cut(image, self.resample)
            num_embeds = self.grids.num_embeds(height, width)
        else:
            pixels = pad_and_resize(image, self.grids.tile, self.background, self.resample)[None]
            num_embeds = self.grids.num_several
        return Features(
            modality, {"pixels": pixels}, num_embeds, {"original_size": (height, width)}
        )

    def _clip(self, clip: Video) -> Features:
        size = self.grids.tile
        check_video(len(clip.frames), size * size)
        frames = [resize(check_image(frame), size, size, self.resample) for frame in clip.frames]
        return Features("video", {"pixels": np.stack(frames)}, self._num_video(len(frames)))

    def _num_video(self, num_frames: int) -> int:
        """Return the number of embeddings of a video: pooled frames and one newline."""
        return num_frames * self.grids.pooled_side**2 + 1

    def embeddings(self, modality: Modality, source: Any, param: str) -> list[Features]:
        """Read precomputed embeddings of images or videos.

        source: a list of (num_embeds, hidden size) or a tensor (items, num_embeds, hidden size),
        also as ``image_embeds`` or ``video_embeds`` of a mapping, for images with ``image_sizes``
        (items, 2): height and width of each.
        """
        sizes = None
        if isinstance(source, Mapping):
            source, sizes, param = self._members(modality, source, param)
        found = []
        for array, place in precomputed.per_item(source, param):
            precomputed.check_width(array, self.hidden_size, place)
            if modality == "video":
                self._check_video(array, place)
            elif not len(array):
                raise InvalidEmbeddingsError(
                    f"An image has at least one embedding, got shape {tuple(array.shape)}.",
                    param=place,
                )
            found.append(Features(modality, {"embeds": array}, len(array), precomputed=True))
        if sizes is not None:
            self._check_sizes(found, sizes, param)
        return found

    def _members(
        self, modality: Modality, source: Mapping[Any, Any], param: str
    ) -> tuple[Any, Any, str]:
        """Return embeddings, sizes (None without) and the place of the embeddings."""
        name = f"{modality}_embeds"
        known = {name, "image_sizes"} if modality == "image" else {name}
        if name not in source or not set(source) <= known:
            raise InvalidEmbeddingsError(
                "Embeddings for this model are a tensor, a list of tensors, or a mapping with "
                f"{' and '.join(map(repr, sorted(known)))}, got one with "
                f"{sorted(map(str, source))}.",
                param=param,
            )
        return source[name], source.get("image_sizes"), f"{param}.{name}"

    def _check_video(self, array: np.ndarray, param: str) -> None:
        per_frame = self.grids.pooled_side**2
        if len(array) <= 1 or len(array) % per_frame != 1 % per_frame:
            raise InvalidEmbeddingsError(
                f"A video has {per_frame} embeddings a frame and one at the end in this model, got "
                f"shape {tuple(array.shape)}.",
                param=param,
            )

    def _check_sizes(self, found: Sequence[Features], sizes: Any, param: str) -> None:
        place = param.removesuffix("image_embeds") + "image_sizes"
        pairs = precomputed.integers(sizes, 2, place)
        if len(pairs) != len(found):
            raise InvalidEmbeddingsError(
                f"image_sizes has {counted(len(pairs), 'entry', 'entries')} for the embeddings of "
                f"{counted(len(found), 'image')}.",
                param=place,
            )
        for index, (features, (height, width)) in enumerate(zip(found, pairs, strict=True)):
            if min(height, width) < 1:
                raise InvalidEmbeddingsError(
                    f"An image size is a positive height and width in pixels, got {height, width}.",
                    param=f"{place}[{index}]",
                )
            fits = (self.grids.num_embeds(height, width), self.grids.num_several)
            if features.num_embeds not in fits:
                raise InvalidEmbeddingsError(
                    f"An image of height {height} and width {width} has {fits[0]} embeddings in "
                    f"this model, or {fits[1]} among several images, got {features.num_embeds}.",
                    param=f"{param}[{index}]",
                )

    def placeholder(self, modality: Modality) -> tuple[int, ...]:
        """Return the image or the video token."""
        return (self.video_token_id if modality == "video" else self.image_token_id,)

    def fill(self, modality: Modality) -> int:
        """Return the placeholder."""
        return self.placeholder(modality)[0]

    def placeholder_text(self, modality: Modality, number: int = 1) -> str:
        """Return the text of the image or of the video token."""
        return PLACEHOLDERS[modality]

    def replacement(self, features: Features, index: int = 0) -> Replacement:
        """Return the token, repeated."""
        num = features.num_embeds
        return Replacement(self.placeholder(features.modality) * num, ((0, num),))

    def positions(self, token_ids: Sequence[int], items: Sequence[PlacedItem]) -> None:
        """Return None: positions are plain."""
        return


def build(config: LlavaOnevisionConfig, loaded: LoadedConfig) -> LlavaOnevisionProcessor:
    """Build the processor of a checkpoint.

    Raises ConfigError when its preprocessor makes other tiles than its tower takes.
    """
    preprocessor, tile = loaded.preprocessor, config.grids.tile
    for name in ("size", "crop_size"):
        edges = _edges(preprocessor.get(name))
        if edges and edges != {tile}:
            raise ConfigError(
                f"preprocessor_config.json: {name} {preprocessor[name]!r} is not the vision "
                f"tower's image_size {tile}.",
                param="model",
            )
    if preprocessor.get("do_resize") is False:
        raise ConfigError("preprocessor_config.json: do_resize must not be false.", param="model")
    pinpoints = preprocessor.get("image_grid_pinpoints")
    if pinpoints is not None and read_pinpoints(pinpoints, tile) != config.grids.pinpoints:
        raise ConfigError(
            "preprocessor_config.json: image_grid_pinpoints are not those of config.json.",
            param="model",
        )
    mean = preprocessor.get("image_mean") or CLIP_MEAN  # also where nothing is normalised
    red, green, blue = (int(value * 255) for value in read_normalization({"image_mean": mean}).mean)
    return LlavaOnevisionProcessor(
        image_token_id=config.image_token_id,
        video_token_id=config.video_token_id,
        hidden_size=config.text.hidden_size,
        grids=config.grids,
        background=(red, green, blue),
        resample=read_resample(preprocessor),
    )


def _edges(size: Any) -> set[Any]:
    """Return the lengths of a size: a number, or a mapping of them."""
    if size is None:
        return set()
    return set(size.values()) if isinstance(size, Mapping) else {size}
