"""Images and videos of MiniCPM-V 2.6: views in whole patches, marked as source or slice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sensorium.errors import ConfigError, InvalidRequestError
from sensorium.models.configs import POSITIVE
from sensorium.models.families.minicpmv import embeds
from sensorium.models.families.minicpmv.config import MiniCPMVConfig
from sensorium.models.families.minicpmv.slicing import Layout, Slicing, write_patches
from sensorium.models.families.minicpmv.vocabulary import Vocabulary, read_vocabulary
from sensorium.models.interface import LoadedConfig
from sensorium.models.media.options import check_option_names, identity_of
from sensorium.models.media.pixels import (
    Normalization,
    check_image,
    check_video,
    read_normalization,
)
from sensorium.multimodal.decode.video import frame_sampling
from sensorium.multimodal.items import Decoded, Features, Modality, Video
from sensorium.multimodal.placeholders import marker
from sensorium.multimodal.processor import FrameSampler, Markup, PlacedItem, Replacement

PLACEHOLDERS: dict[Modality, str] = {"image": "(<image>./</image>)", "video": "(<video>./</video>)"}
MARKUP = Markup({"image": r"\(<image>\./</image>\)", "video": r"\(<video>\./</video>\)"})
OPTIONS = ("max_slice_nums", "use_image_id")
MAX_SLICES = 36
"""The largest ``max_slice_nums`` that a request may ask for, unless the checkpoint's own is
larger."""
MAX_FRAME_SLICES = 2
"""Largest ``max_slice_nums`` of a video's frame, one by default: more would fill any context."""
LONGEST = 4
"""Views of more than this many times the usual number of patches are refused: lines of pixels,
not images."""

_HALF = [0.5, 0.5, 0.5]


@dataclass(frozen=True, slots=True)
class MiniCPMVProcessor:
    """Processor of MiniCPM-V 2.6; see ``multimodal.processor.Processor``.

    ``meta`` of its features: ``grid`` (columns, rows) of an image's or a frame's slices, (0, 0)
    without; ``use_image_id`` of images; ``num_frames`` of videos.
    """

    vocabulary: Vocabulary
    num_queries: int
    hidden_size: int
    slicing: Slicing
    max_slices: int
    use_image_id: bool
    modalities: tuple[Modality, ...] = ("image", "video")

    @property
    def markup(self) -> Markup:
        """Return the pattern of placeholders, which are texts of several tokens.

        They tokenize differently beside different neighbours.
        """
        return MARKUP

    def decoding(self, modality: Modality, options: Mapping[str, Any]) -> FrameSampler | None:
        """Return the frame sampling of videos: one frame per second, at most 64."""
        return frame_sampling.minicpm_v if modality == "video" else None

    def identity(self, modality: Modality, options: Mapping[str, Any], num_items: int = 1) -> bytes:
        """Return class, configuration and options."""
        return identity_of("minicpmv 1", self, options)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Check ``max_slice_nums`` and ``use_image_id``.

        ``max_slice_nums``: the most cells that an image (or, up to 2, a frame) is cut into.
        ``use_image_id``: if true, images are numbered in the prompt.
        """
        check_option_names(options, OPTIONS)
        most, highest = options.get("max_slice_nums", 1), max(MAX_SLICES, self.max_slices)
        if isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= highest:
            raise InvalidRequestError(
                f"max_slice_nums must be an integer from 1 to {highest}, got {most!r:.80}.",
                param="mm_processor_kwargs.max_slice_nums",
            )
        if not isinstance(options.get("use_image_id", True), bool):
            raise InvalidRequestError(
                f"use_image_id must be true or false, got {options['use_image_id']!r}.",
                param="mm_processor_kwargs.use_image_id",
            )

    def process(
        self, modality: Modality, data: Decoded, options: Mapping[str, Any], num_items: int = 1
    ) -> Features:
        """Return the patches of all views and the sizes of the views.

        ``arrays["patches"]``: (patches, 3 * patch * patch) uint8, view after view, row by row;
        ``arrays["sizes"]``: (views, 2) int32, rows and columns of patches of each view.
        """
        if isinstance(data, Video):
            most = min(options.get("max_slice_nums", 1), MAX_FRAME_SLICES)
            frames: Sequence[np.ndarray] = [check_image(frame) for frame in data.frames]
            meta: dict[str, Any] = {"num_frames": len(frames)}
        else:
            most = options.get("max_slice_nums", self.max_slices)
            frames = [check_image(data)]
            meta = {"use_image_id": options.get("use_image_id", self.use_image_id)}
        height, width = frames[0].shape[:2]
        layout = self._layout(width, height, most)
        arrays = self._cut(frames, layout)
        meta |= {"grid": layout.grid or (0, 0), "original_size": (height, width)}
        num_embeds = len(frames) * layout.num_views * self.num_queries
        return Features(modality, arrays, num_embeds, meta)

    def _layout(self, width: int, height: int, most: int) -> Layout:
        layout = self.slicing.layout(width, height, most)
        longest = LONGEST * self.slicing.scale**2
        if max(w * h for w, h in (layout.source, layout.cell)) > longest:
            raise InvalidRequestError(
                f"An image of {width} x {height} pixels is too narrow for this model. Crop or pad "
                "it."
            )
        return layout

    def _cut(self, frames: Sequence[np.ndarray], layout: Layout) -> dict[str, np.ndarray]:
        """Return the patches of all views of images of one size."""
        size = self.slicing.patch
        views = [layout.source] + [layout.cell] * (layout.num_views - 1)
        sizes = [(height // size, width // size) for width, height in views] * len(frames)
        total = sum(rows * columns for rows, columns in sizes)
        check_video(len(frames), total // len(frames) * size**2)
        patches = np.empty((total, 3 * size * size), np.uint8)
        start = 0
        for frame in frames:
            for view in self.slicing.views(frame, layout):
                end = start + view.shape[0] * view.shape[1] // size**2
                write_patches(view, size, patches[start:end])
                start = end
        return {"patches": patches, "sizes": np.array(sizes, np.int32)}

    def embeddings(self, modality: Modality, source: Any, param: str) -> list[Features]:
        """Read precomputed embeddings: images with their original sizes, videos frame by frame.

        The sizes determine the slices: see ``embeds``.
        """
        if modality == "video":
            return embeds.videos(source, param, self.num_queries, self.hidden_size)
        found = embeds.images(source, param, self.hidden_size)
        return [self._embedded(array, size, place) for array, size, place in found]

    def _embedded(self, array: np.ndarray, size: tuple[int, int], param: str) -> Features:
        layout = self.slicing.layout(*size, self.max_slices)
        embeds.check_count(array, layout.num_views, self.num_queries, size, param)
        meta = {"grid": layout.grid or (0, 0), "use_image_id": self.use_image_id}
        return Features("image", {"embeds": array}, len(array), meta, precomputed=True)

    def placeholder(self, modality: Modality) -> tuple[int, ...]:
        """Return an id that no vocabulary holds: see ``markup``."""
        return (marker(modality),)

    def fill(self, modality: Modality) -> int:
        """Return the pad token."""
        return self.vocabulary.pad

    def placeholder_text(self, modality: Modality, number: int = 1) -> str:
        """Return the placeholder of the published code."""
        return PLACEHOLDERS[modality]

    def replacement(self, features: Features, index: int = 0) -> Replacement:
        """Return pads between start and end tokens.

        An image has its number before them; a video is frame after frame.
        """
        columns, rows = features.meta["grid"]
        if features.modality == "image":
            number = index if features.meta["use_image_id"] else None
            return self.vocabulary.views(self.num_queries, (columns, rows), number)
        frame = self.vocabulary.views(self.num_queries, (columns, rows), None)
        num_frames, length = features.meta["num_frames"], len(frame.token_ids)
        runs = [
            (number * length + start, num)
            for number in range(num_frames)
            for start, num in frame.runs
        ]
        return Replacement(frame.token_ids * num_frames, tuple(runs))

    def positions(self, token_ids: Sequence[int], items: Sequence[PlacedItem]) -> None:
        """Return None: positions are plain."""
        return


def build(config: MiniCPMVConfig, loaded: LoadedConfig) -> MiniCPMVProcessor:
    """Build the processor of a checkpoint.

    Raises ConfigError when its preprocessor makes other patches than its tower takes, and when its
    tokenizer lacks the tokens that mark images.
    """
    preprocessor = {**_slice_config(loaded.config), **loaded.preprocessor}
    patch = config.vision.patch_size
    if preprocessor.get("patch_size", patch) != patch:
        raise ConfigError(
            f"preprocessor_config.json: patch_size {preprocessor['patch_size']!r} is not the "
            f"vision tower's {patch}.",
            param="model",
        )
    slices = preprocessor.get("slice_mode", loaded.config.get("slice_mode", True))
    return MiniCPMVProcessor(
        vocabulary=read_vocabulary(loaded.folder, preprocessor),
        num_queries=config.num_queries,
        hidden_size=config.text.hidden_size,
        slicing=Slicing(_positive(preprocessor, "scale_resolution", 448), patch),
        max_slices=_positive(preprocessor, "max_slice_nums", 9) if slices else 1,
        use_image_id=preprocessor.get("use_image_id", loaded.config.get("use_image_id"))
        is not False,
    )


def normalization(preprocessor: Mapping[str, Any]) -> Normalization:
    """Read the normalisation from preprocessor_config.json, under the family's own names."""
    return read_normalization(
        {
            "image_mean": preprocessor.get("norm_mean") or _HALF,
            "image_std": preprocessor.get("norm_std") or _HALF,
        }
    )


def _positive(preprocessor: Mapping[str, Any], name: str, usual: int) -> int:
    value = preprocessor.get(name, usual)
    problem = POSITIVE.problem(value, int)
    if problem is not None:
        raise ConfigError(f"preprocessor_config.json: {name} {problem}.", param="model")
    return int(value)


def _slice_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the slicing options of config.json, for checkpoints without them elsewhere."""
    value = config.get("slice_config")
    names = ("max_slice_nums", "scale_resolution", "patch_size")
    return (
        {name: value[name] for name in names if name in value} if isinstance(value, Mapping) else {}
    )
