"""Images of Phi-3.5-Vision: whole tiles, padded with white. The encoder makes the thumbnail."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from sensorium.errors import ConfigError, InvalidEmbeddingsError, InvalidRequestError, counted
from sensorium.models.families.phi3_v.config import Phi3VConfig
from sensorium.models.interface import LoadedConfig
from sensorium.models.media import precomputed
from sensorium.models.media.options import check_option_names, identity_of
from sensorium.models.media.pixels import check_image, resize
from sensorium.multimodal.items import Decoded, Features, Modality
from sensorium.multimodal.placeholders import marker
from sensorium.multimodal.processor import Markup, PlacedItem, Replacement

NUM_CROPS = 4
"""Tiles of an image at most, in the published files."""
MAX_CROPS = 64
"""More than any checkpoint was trained with: what a request may ask for must end somewhere."""
WHITE = 255
_NAMES = ("image_embeds", "image_sizes")


@dataclass(frozen=True, slots=True)
class Phi3VProcessor:
    """Processor of Phi-3.5-Vision; see ``multimodal.processor.Processor``.

    ``tile``: edge of a tile in pixels, which makes ``cells`` rows and as many columns of
    embeddings. ``num_crops``: the most tiles of an image.
    """

    image_token_id: int
    hidden_size: int
    tile: int
    cells: int
    num_crops: int
    modalities: tuple[Modality, ...] = ("image",)

    @property
    def markup(self) -> Markup:
        """Return the pattern of ``<|image_1|>`` and so on, which are no tokens.

        Every piece of text between them begins with a BOS.
        """
        return Markup({"image": r"<\|image_(?P<number>\d+)\|>"}, prefix_each=True)

    def decoding(self, modality: Modality, options: Mapping[str, Any]) -> None:
        """Return no decoding options: images need none."""
        return

    def identity(self, modality: Modality, options: Mapping[str, Any], num_items: int = 1) -> bytes:
        """Return class, configuration and options."""
        return identity_of("phi3_v 1", self, options)

    def check_options(self, options: Mapping[str, Any]) -> None:
        """Check ``num_crops``, the only option: see ``read_num_crops``."""
        check_option_names(options, ("num_crops",))
        if "num_crops" in options:
            try:
                read_num_crops(options["num_crops"])
            except ConfigError as error:
                raise InvalidRequestError(
                    error.message, param="mm_processor_kwargs.num_crops"
                ) from error

    def process(
        self, modality: Modality, data: Decoded, options: Mapping[str, Any], num_items: int = 1
    ) -> Features:
        """Return ``arrays["pixels"]``: (H, W, 3) uint8, both multiples of ``tile``."""
        image = check_image(data)
        num_crops = read_num_crops(options.get("num_crops", self.num_crops))
        pixels = to_tiles(image, self.tile, num_crops)
        size = (pixels.shape[0], pixels.shape[1])
        meta = {"image_size": size, "original_size": image.shape[:2]}
        return Features(modality, {"pixels": pixels}, self.num_embeds(*size), meta)

    def num_embeds(self, height: int, width: int) -> int:
        """Return the number of embeddings of an image of this size after processing.

        Each row of the tiles and of the thumbnail ends with a separator, and one stands between the
        two.
        """
        rows, columns = height // self.tile * self.cells, width // self.tile * self.cells
        return rows * (columns + 1) + 1 + self.cells * (self.cells + 1)

    def embeddings(self, modality: Modality, source: Any, param: str) -> list[Features]:
        """Read precomputed embeddings of images.

        source: a tensor (items, embeddings, hidden size), a list of (embeddings, hidden size), or a
        mapping of that as ``image_embeds`` with ``image_sizes`` (items, 2): height and width of the
        images after processing.
        """
        sizes: list[tuple[int, int]] | None = None
        if isinstance(source, Mapping):
            if not {_NAMES[0]} <= set(source) <= set(_NAMES):
                raise InvalidEmbeddingsError(
                    f"Embeddings as a mapping have {_NAMES[0]!r} and, if wanted, {_NAMES[1]!r}, "
                    f"got {sorted(map(str, source))}.",
                    param=param,
                )
            if _NAMES[1] in source:
                sizes = self._sizes(source[_NAMES[1]], f"{param}.{_NAMES[1]}")
            source, param = source[_NAMES[0]], f"{param}.{_NAMES[0]}"
        items = precomputed.per_item(source, param)
        if sizes is not None and len(sizes) != len(items):
            raise InvalidEmbeddingsError(
                f"image_sizes has {counted(len(sizes), 'entry', 'entries')} for the embeddings of "
                f"{counted(len(items), 'image')}.",
                param=param,
            )
        return [
            self._precomputed(modality, array, place, None if sizes is None else sizes[index])
            for index, (array, place) in enumerate(items)
        ]

    def placeholder(self, modality: Modality) -> tuple[int, ...]:
        """Return a marker that no vocabulary holds."""
        return (marker(modality),)

    def fill(self, modality: Modality) -> int:
        """Return the image token."""
        return self.image_token_id

    def placeholder_text(self, modality: Modality, number: int = 1) -> str:
        """Return ``<|image_1|>`` for the first image, and so on."""
        return f"<|image_{number}|>"

    def replacement(self, features: Features, index: int = 0) -> Replacement:
        """Return the image token, repeated."""
        num = features.num_embeds
        return Replacement((self.image_token_id,) * num, ((0, num),))

    def positions(self, token_ids: Sequence[int], items: Sequence[PlacedItem]) -> None:
        """Return None: positions are plain."""
        return

    def _precomputed(
        self, modality: Modality, array: np.ndarray, param: str, size: tuple[int, int] | None
    ) -> Features:
        precomputed.check_width(array, self.hidden_size, param)
        if size is not None and len(array) != self.num_embeds(*size):
            raise InvalidEmbeddingsError(
                f"An image of {size[0]} x {size[1]} (height, width) has {self.num_embeds(*size)} "
                f"embeddings in this model, got shape {tuple(array.shape)}.",
                param=param,
            )
        if size is None and not self._is_some_image(len(array)):
            raise InvalidEmbeddingsError(
                f"No image has {len(array)} embeddings in this model; one of a single tile has "
                f"{self.num_embeds(self.tile, self.tile)}.",
                param=param,
            )
        meta = {} if size is None else {"image_size": size}
        return Features(modality, {"embeds": array}, len(array), meta, precomputed=True)

    def _is_some_image(self, num_embeds: int) -> bool:
        """Return whether some number of tiles gives this number of embeddings."""
        left = num_embeds - self.num_embeds(0, 0)
        height = self.cells
        while height * (self.cells + 1) <= left:
            width, rest = divmod(left, height)
            if not rest and width % self.cells == 1 % self.cells:
                return True
            height += self.cells
        return False

    def _sizes(self, value: Any, param: str) -> list[tuple[int, int]]:
        sizes = [(height, width) for height, width in precomputed.integers(value, 2, param)]
        for index, size in enumerate(sizes):
            if min(size) < 1 or size[0] % self.tile or size[1] % self.tile:
                raise InvalidEmbeddingsError(
                    "An image size is (height, width) in pixels after processing, positive "
                    f"multiples of {self.tile}; got {size}.",
                    param=f"{param}[{index}]",
                )
        return sizes


def build(config: Phi3VConfig, loaded: LoadedConfig) -> Phi3VProcessor:
    """Build the processor of a checkpoint.

    Raises ConfigError for an impossible ``num_crops`` and for another number of embeddings per tile
    than the tower makes.
    """
    preprocessor, num = loaded.preprocessor, config.cells**2
    if preprocessor.get("num_img_tokens", num) != num:
        raise ConfigError(
            f"preprocessor_config.json: num_img_tokens {preprocessor['num_img_tokens']!r} is not "
            f"the {num} of a tile of {config.vision.image_size} pixels.",
            param="model",
        )
    return Phi3VProcessor(
        image_token_id=config.image_token_id,
        hidden_size=config.text.hidden_size,
        tile=config.vision.image_size,
        cells=config.cells,
        num_crops=read_num_crops(preprocessor.get("num_crops", NUM_CROPS)),
    )


def read_num_crops(value: Any) -> int:
    """Return an integer from 1 to MAX_CROPS. Raises ConfigError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_CROPS:
        raise ConfigError(
            f"num_crops must be an integer from 1 to {MAX_CROPS}, got {value!r:.80}.",
            param="num_crops",
        )
    return value


def to_tiles(image: np.ndarray, tile: int, num_crops: int) -> np.ndarray:
    """Resize an image (H, W, 3) to at most ``num_crops`` tiles and pad it with white to whole ones.

    It gets the largest size that the tiles allow: its longer edge is a whole number of tiles; the
    padding is shared between the two sides of the other, the odd row going to the end. An upright
    image is handled lying on its side, which decides how resizing rounds. Raises
    InvalidRequestError for an image so narrow that nothing would be left of it.
    """
    upright = image.shape[0] > image.shape[1]
    lying = image.transpose(1, 0, 2) if upright else image
    height, width = lying.shape[:2]
    ratio = width / height
    across = 1
    while (across + 1) * math.ceil((across + 1) / ratio) <= num_crops:
        across += 1
    wide = across * tile
    tall = int(wide / ratio)
    if tall < 1:
        raise InvalidRequestError(
            f"An image of {image.shape[1]} x {image.shape[0]} pixels is too narrow for this model: "
            f"at {wide} pixels of length nothing of its width is left. Crop or pad it."
        )
    small = resize(lying, tall, wide, Image.Resampling.BILINEAR)
    canvas = np.full((-(-tall // tile) * tile, wide, 3), WHITE, np.uint8)
    top = (len(canvas) - tall) // 2
    canvas[top : top + tall] = small
    return np.ascontiguousarray(canvas.transpose(1, 0, 2)) if upright else canvas
