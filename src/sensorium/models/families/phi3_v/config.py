"""Configuration of Phi-3.5-Vision, read from config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sensorium.models.configs import (
    CLIP_LARGE_336,
    ClipConfig,
    TextConfig,
    bad,
    count,
    read_clip_config,
    read_text_config,
    section,
)
from sensorium.models.interface import TextShape

IMAGE_TOKEN_ID = 32044
"""``<|image|>`` in the published vocabulary."""
ORDERS = ("sub_glb", "glb_sub")
_REQUIRED = {
    "embedding_cls": "image",
    "projection_cls": "mlp",
    "use_hd_transform": True,
    "with_learnable_separator": True,
}


@dataclass(frozen=True, slots=True)
class Phi3VConfig:
    """Configuration of Phi-3.5-Vision: CLIP tower, separators, projector and Phi-3 decoder."""

    text: TextConfig
    vision: ClipConfig
    image_token_id: int
    """Stands at an image's positions in the expanded prompt."""
    feature_layer: int
    """After how many layers of the tower features are taken."""
    global_first: bool
    """If true, the thumbnail comes before the tiles."""

    @property
    def cells(self) -> int:
        """Number of rows, and of columns, of embeddings that one tile makes.

        Four patches are merged into each.
        """
        return self.vision.image_size // self.vision.patch_size // 2

    @property
    def shape(self) -> TextShape:
        """Sizes that the engine needs."""
        return self.text.shape


def read_phi3_v_config(config: Mapping[str, Any]) -> Phi3VConfig:
    """Interpret config.json.

    Published files describe no vision tower. Two keys go beyond them, so that other sizes are
    possible: ``img_processor.vision_config`` overrides sizes of the tower, ``image_token_id`` the
    id that stands for images. Raises ConfigError naming the field for values that are impossible.
    """
    text = read_text_config({**config, "model_type": "phi3"})
    image, layout = section(config, "img_processor"), section(config, "embd_layer")
    for name, wanted in _REQUIRED.items():
        if layout.get(name, wanted) != wanted:
            bad(f"embd_layer.{name}", f"{layout[name]!r} is not supported, only {wanted!r}")
    order = layout.get("hd_transform_order", ORDERS[1])
    if order not in ORDERS:
        bad("embd_layer.hd_transform_order", f"must be one of {', '.join(ORDERS)}, got {order!r}")
    result = Phi3VConfig(
        text=text,
        vision=_read_tower(image),
        image_token_id=_image_token_id(config, text.vocab_size),
        feature_layer=_feature_layer(image),
        global_first=order == ORDERS[1],
    )
    if image.get("image_dim_out", result.vision.hidden_size) != result.vision.hidden_size:
        size = result.vision.hidden_size
        bad("img_processor.image_dim_out", f"{image['image_dim_out']!r} is not the tower's {size}")
    if image.get("num_img_tokens", result.cells**2) != result.cells**2:
        num = result.cells**2
        bad("img_processor.num_img_tokens", f"{image['num_img_tokens']!r} is not a tile's {num}")
    return result


def _read_tower(image: Mapping[str, Any]) -> ClipConfig:
    if image.get("name", "clip_vision_model") != "clip_vision_model":
        bad("img_processor.name", f"{image['name']!r} is not supported, only 'clip_vision_model'")
    if image.get("type_feature", "patch") != "patch":
        bad("img_processor.type_feature", f"{image['type_feature']!r} is not supported")
    sizes = section(image, "vision_config") if "vision_config" in image else {}
    tower = read_clip_config(sizes, CLIP_LARGE_336)
    if tower.image_size % (2 * tower.patch_size):
        bad(
            "img_processor.vision_config.image_size",
            f"{tower.image_size} is not a multiple of two patches of {tower.patch_size}",
        )
    return tower


def _feature_layer(image: Mapping[str, Any]) -> int:
    """Return the number of layers before the features; ``layer_idx`` indexes hidden states.

    -1 is after the last layer, 0 before the first.
    """
    num_layers = _read_tower(image).num_layers
    index = image.get("layer_idx", -2)
    if isinstance(index, bool) or not isinstance(index, int):
        bad("img_processor.layer_idx", f"must be an integer, got {index!r}")
    number = index + num_layers + 1 if index < 0 else index
    if not 0 <= number <= num_layers:
        bad("img_processor.layer_idx", f"{index} is outside a tower of {num_layers} layers")
    return number


def _image_token_id(config: Mapping[str, Any], vocab_size: int) -> int:
    token_id = count(config, "image_token_id", IMAGE_TOKEN_ID)
    if token_id >= vocab_size:
        bad("image_token_id", f"{token_id} is outside the vocabulary of {vocab_size}")
    return token_id
