"""Images of LLaVA-1.5: shortest edge resized, centre cropped, as in CLIP's processor."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from sensorium.errors import ConfigError, InvalidEmbeddingsError, InvalidRequestError
from sensorium.models.families.llava.config import LlavaConfig
from sensorium.models.interface import LoadedConfig
from sensorium.models.media import precomputed
from sensorium.models.media.options import check_option_names, identity_of
from sensorium.models.media.pixels import check_image, read_resample, resize
from sensorium.multimodal.items import Decoded, Features, Modality
from sensorium.multimodal.placeholders import marker
from sensorium.multimodal.processor import Markup, PlacedItem, Replacement

PLACEHOLDER = "<image>"
MAX_SIZE = 4096
_LONG = 64
"""An image that resizing would make this many times as large as the crop is cropped while it is
resized (a few pixels then differ by one, for the rounding of the cut)."""


@dataclass(frozen=True, slots=True)
class Edges:
    """Target of a resize: the shortest edge, or both edges."""

    height: int
    width: int
    shortest: bool

    def target(self, height: int, width: int) -> tuple[int, int]:
        """Return height and width of the resized image."""
        if not self.shortest:
            return self.height, self.width
        edge = self.height
        if width <= height:
            return int(edge * height / width), edge
        return edge, int(edge * width / height)


@dataclass(frozen=True, slots=True)
class LlavaProcessor:
    """Processor of LLaVA-1.5: every image becomes ``num_embeds`` embeddings.

    See ``multimodal.processor.Processor``.
    """

    image_token_id: int
    """Takes the place of embeddings in the expanded prompt."""
    num_embeds: int
    hidden_size: int
    image_size: int
    edges: Edges | None
    resample: int
    modalities: tuple[Modality, ...] = ("image",)
    is_in_vocabulary: bool = True
    """If false, the placeholder is no token, and ``image_token_id`` any other."""

    @property
    def markup(self) -> Markup | None:
        """Return None, or the pattern of the placeholder where no token is it."""
        return None if self.is_in_vocabulary else Markup({"image": re.escape(PLACEHOLDER)})

    def decoding(self, modality: Modality, options: Mapping[str, Any]) -> None:
        """Return no decoding options: images need none."""
        return

    def identity(self, modality: Modality, options: Mapping[str, Any], num_items: int = 1) -> bytes:
        """Return class, configuration and options."""
        return identity_of("llava 1", self, options)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Check ``size``, the only option: see ``read_edges``."""
        check_option_names(options, ("size",))
        if "size" in options:
            try:
                read_edges(options["size"])
            except ConfigError as error:
                raise InvalidRequestError(
                    error.message, param="mm_processor_kwargs.size"
                ) from error

    def process(
        self, modality: Modality, data: Decoded, options: Mapping[str, Any], num_items: int = 1
    ) -> Features:
        """Return ``arrays["pixels"]``: (image_size, image_size, 3) uint8."""
        image = check_image(data)
        height, width = image.shape[:2]
        edges = read_edges(options["size"]) if "size" in options else self.edges
        target = (height, width) if edges is None else edges.target(height, width)
        pixels = resize_and_crop(image, target, self.image_size, self.resample)
        return Features(
            modality, {"pixels": pixels}, self.num_embeds, {"original_size": (height, width)}
        )

    def embeddings(self, modality: Modality, source: Any, param: str) -> list[Features]:
        """Read precomputed embeddings of images.

        source: a tensor (items, num_embeds, hidden size), a list of (num_embeds, hidden size), or
        either as the only member of a mapping (``image_embeds``).
        """
        source, param = precomputed.unwrapped(modality, source, param)
        found = []
        for array, place in precomputed.per_item(source, param):
            precomputed.check_width(array, self.hidden_size, place)
            if len(array) != self.num_embeds:
                raise InvalidEmbeddingsError(
                    f"Each image has {self.num_embeds} embeddings in this model, got shape "
                    f"{tuple(array.shape)}.",
                    param=place,
                )
            found.append(Features(modality, {"embeds": array}, len(array), precomputed=True))
        return found

    def placeholder(self, modality: Modality) -> tuple[int, ...]:
        """Return the image token, or a marker where there is none: see ``markup``."""
        return (self.image_token_id,) if self.is_in_vocabulary else (marker(modality),)

    def fill(self, modality: Modality) -> int:
        """Return the image token."""
        return self.image_token_id

    def placeholder_text(self, modality: Modality, number: int = 1) -> str:
        """Return the image token's text."""
        return PLACEHOLDER

    def replacement(self, features: Features, index: int = 0) -> Replacement:
        """Return the image token, repeated."""
        num = features.num_embeds
        return Replacement((self.image_token_id,) * num, ((0, num),))

    def positions(self, token_ids: Sequence[int], items: Sequence[PlacedItem]) -> None:
        """Return None: positions are plain."""
        return


def build(config: LlavaConfig, loaded: LoadedConfig) -> LlavaProcessor:
    """Build the processor of a checkpoint.

    Raises ConfigError when its preprocessor makes other sizes than its tower takes.
    """
    preprocessor, size = loaded.preprocessor, config.vision.image_size
    crops = preprocessor.get("do_center_crop") is not False
    edges = None
    if preprocessor.get("do_resize") is not False:
        edges = read_edges(preprocessor.get("size", {"shortest_edge": size}))
    if crops:
        crop = read_edges(preprocessor.get("crop_size", size))
        if (crop.height, crop.width) != (size, size):
            raise ConfigError(
                f"preprocessor_config.json: crop_size {crop.height} x {crop.width} is not the "
                f"vision tower's image_size {size}.",
                param="model",
            )
    elif edges is None or edges.shortest or (edges.height, edges.width) != (size, size):
        raise ConfigError(
            f"preprocessor_config.json: without do_center_crop, size must be {size} x {size}, the "
            "vision tower's.",
            param="model",
        )
    return LlavaProcessor(
        image_token_id=config.image_token_id,
        is_in_vocabulary=config.image_in_vocabulary,
        num_embeds=config.num_embeds,
        hidden_size=config.text.hidden_size,
        image_size=size,
        edges=edges,
        resample=read_resample(preprocessor),
    )


def read_edges(size: Any) -> Edges:
    """Read a size: the shortest edge, or both edges.

    An integer or ``{"shortest_edge": n}`` is the shortest edge, ``{"height": h, "width": w}`` are
    both. Raises ConfigError for anything else and for edges outside 1 to MAX_SIZE.
    """
    values = dict(size) if isinstance(size, Mapping) else {"shortest_edge": size}
    names = tuple(sorted(map(str, values)))
    if names not in (("shortest_edge",), ("height", "width")):
        _bad_size(size)
    for edge in values.values():
        if isinstance(edge, bool) or not isinstance(edge, int) or not 1 <= edge <= MAX_SIZE:
            _bad_size(size)
    if names == ("shortest_edge",):
        return Edges(values["shortest_edge"], values["shortest_edge"], shortest=True)
    return Edges(values["height"], values["width"], shortest=False)


def _bad_size(size: Any) -> NoReturn:
    raise ConfigError(
        "size must be an integer, {'shortest_edge': n} or {'height': h, 'width': w} with edges "
        f"from 1 to {MAX_SIZE}, got {size!r:.80}.",
        param="size",
    )


def resize_and_crop(
    image: np.ndarray, target: tuple[int, int], size: int, resample: int
) -> np.ndarray:
    """Resize (H, W, 3) to ``target``, then cut or pad (black) its centre to (size, size, 3).

    An image that its extreme aspect ratio would make too large (1 x 10000 pixels: 3 million rows)
    is resized only where the crop is, with the same filter at the same places.
    """
    (height, width), (tall, wide) = image.shape[:2], target
    if tall * wide > _LONG * size * size:
        (top, rows), (left, columns) = _kept(tall, size), _kept(wide, size)
        y, x = height / tall, width / wide
        across = (left * x, 0, min((left + columns) * x, width), height)
        strip = resize(image, height, columns, resample, across)  # columns first, as Pillow does it
        down = (0, top * y, columns, min((top + rows) * y, height))
        return center_crop(resize(strip, rows, columns, resample, down), size)
    return center_crop(resize(image, tall, wide, resample), size)


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Return the centre (size, size, 3) of an image; black around it where it is smaller."""
    (top, rows), (left, columns) = _kept(image.shape[0], size), _kept(image.shape[1], size)
    part = image[top : top + rows, left : left + columns]
    if part.shape[:2] == (size, size):
        return np.ascontiguousarray(part)
    canvas = np.zeros((size, size, 3), np.uint8)
    y, x = -((rows - size) // 2), -((columns - size) // 2)
    canvas[y : y + rows, x : x + columns] = part
    return canvas


def _kept(length: int, size: int) -> tuple[int, int]:
    """Return start and length of the part of an axis that a centre crop keeps."""
    return (max(0, (length - size) // 2), min(length, size))
