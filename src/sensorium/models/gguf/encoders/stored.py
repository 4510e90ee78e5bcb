"""Parts that encoders in GGUF files share: sizes, colours, and weights made of stored tensors.

Source: ``conversion/base.py`` of llama.cpp, its ``clip.cpp``, and, for files of LLaVA, its
``legacy-models/convert_image_encoder_to_gguf.py``. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import numpy as np

from sensorium.errors import ConfigError
from sensorium.models.gguf.config import count, number
from sensorium.models.gguf.reader import GgufFile, TensorInfo

BLOCK = re.compile(r"v\.blk\.(0|[1-9][0-9]{0,5})\.([a-z0-9_]+)\.(weight|bias)")
_LAYER = {
    "ln1": "layer_norm1",
    "ln2": "layer_norm2",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
_OUTSIDE = {
    "v.patch_embd": "embeddings.patch_embedding",
    "v.position_embd": "embeddings.position_embedding",
    "v.pre_ln": "pre_layrnorm",
    "v.post_ln": "post_layernorm",
}
CLASS_TOKEN = "v.class_embd"


@dataclass(frozen=True, slots=True)
class TowerWeight:
    """A weight of an encoder: its shape, and the tensors that it is made of.

    Several are joined along the rows, or stacked as the frames of a convolution (axis 2).
    """

    shape: tuple[int, ...]
    parts: tuple[TensorInfo, ...]
    join: Literal["rows", "frames"] = "rows"


Configured = tuple[dict[str, Any], dict[str, dict[str, Any]]]
"""``config.json`` of a model with its encoder, and further files of its folder by name."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """A kind of encoder: its name in files, the models that it belongs to, and how it is read.

    architectures: of the language model's file. configure: from the files of the language model and
    of the encoder, and the former's configuration. weights: by transformers' names. text_prefix:
    beginning of the names of the language model's weights, and what it is in the whole model.
    """

    projector: str
    models: str
    architectures: tuple[str, ...]
    configure: Callable[[GgufFile, GgufFile, dict[str, Any]], Configured]
    weights: Callable[[GgufFile], dict[str, TowerWeight]]
    text_prefix: tuple[str, str] = ("", "")

    def text_name(self, name: str) -> str:
        """Return the name of a weight of the language model in the whole model."""
        old, new = self.text_prefix
        return new + name.removeprefix(old) if name.startswith(old) else name


def clip_config(encoder: GgufFile) -> dict[str, Any]:
    """Return sizes of a CLIP or SigLIP tower by the names of ``vision_config``.

    The width of the MLP is that of its weights, as files misstate it. Raises ConfigError for sizes
    that do not fit the tensors.
    """
    width, heads = count(encoder, "vision.embedding_length"), "vision.attention.head_count"
    size, patch = count(encoder, "vision.image_size"), count(encoder, "vision.patch_size")
    own = (1 if CLASS_TOKEN in encoder.tensors else 0) + (size // patch) ** 2
    check_shape(encoder, "v.position_embd.weight", (own, width))
    check_shape(encoder, "v.patch_embd.weight", (width, 3, patch, patch))
    if width % count(encoder, heads):
        bad(encoder, f"has {count(encoder, heads)} heads, which do not divide {width}")
    return {
        "hidden_size": width,
        "intermediate_size": inner_size(encoder, width),
        "num_hidden_layers": num_layers(encoder),
        "num_attention_heads": count(encoder, heads),
        "image_size": size,
        "patch_size": patch,
        "layer_norm_eps": number(encoder, "vision.attention.layer_norm_epsilon"),
    }


def clip_weights(
    encoder: GgufFile, prefix: str, others: Mapping[str, str]
) -> dict[str, TowerWeight]:
    """Return the weights of a CLIP or SigLIP tower under ``prefix``, and of what is behind it.

    others: names of layers outside the tower, by those of the file. Raises ConfigError for a tensor
    of another name.
    """
    swapped = is_swapped(encoder)
    outside = {name: f"{prefix}{own}" for name, own in _OUTSIDE.items()} | dict(others)
    found = {}
    for info in encoder.tensors.values():
        block = BLOCK.fullmatch(info.name)
        stem, _, end = info.name.rpartition(".")
        shape = info.shape
        if info.name == CLASS_TOKEN:
            name, shape = f"{prefix}embeddings.class_embedding", (info.num_values,)
        elif block is not None and block[2] in _LAYER:
            own = unswapped(block[2]) if swapped else block[2]
            name = f"{prefix}encoder.layers.{block[1]}.{_LAYER[own]}.{block[3]}"
        elif stem in outside and end in ("weight", "bias"):
            name = f"{outside[stem]}.{end}"
        else:
            bad(encoder, f"has the tensor {info.name!r:.80}, which has no place in its model")
        found[name] = TowerWeight(shape, (info,))
    return found


def num_layers(encoder: GgufFile) -> int:
    """Return the number of layers of an encoder, the last of which has tensors."""
    depth = count(encoder, "vision.block_count")
    if depth > len(encoder.tensors) or f"v.blk.{depth - 1}.ln1.weight" not in encoder.tensors:
        bad(encoder, f"has no {depth} layers")
    return depth


def inner_size(encoder: GgufFile, width: int) -> int:
    """Return the width of the MLP in an encoder's layers of ``width`` inputs."""
    layer = encoder.tensors.get("v.blk.0.ffn_up.weight")
    if layer is None or len(layer.shape) != 2 or width not in layer.shape:
        bad(encoder, "has no MLP of a vision encoder (v.blk.0.ffn_up)")
    first, second = layer.shape
    return first if second == width else second


def is_swapped(encoder: GgufFile) -> bool:
    """Return whether the two layers of an MLP have each other's name, as in early files."""
    width, layer = encoder.own("vision.embedding_length"), "v.blk.0.ffn_up.weight"
    up = encoder.tensors.get(layer)
    return up is not None and up.shape[0] == width and up.shape[-1] != width


def unswapped(name: str) -> str:
    """Return the name of a layer where those of an MLP are swapped."""
    return {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}.get(name, name)


def colours(encoder: GgufFile) -> dict[str, list[float]]:
    """Return the mean and the standard deviation of the three colours."""
    found = {}
    for name in ("image_mean", "image_std"):
        values = encoder.own(f"vision.{name}")
        if not isinstance(values, np.ndarray) or len(values) != 3 or not np.isfinite(values).all():
            bad(encoder, f"has no three numbers as clip.vision.{name}")
        found[name] = [round(float(value), 8) for value in values]
    if min(found["image_std"]) <= 0:
        bad(encoder, "has numbers that are not positive as clip.vision.image_std")
    return found


def check_shape(encoder: GgufFile, name: str, shape: tuple[int, ...]) -> None:
    """Raise ConfigError unless the file has a tensor of this name and shape."""
    info = encoder.tensors.get(name)
    if info is None or info.shape != shape:
        found = "none" if info is None else str(info.shape)
        bad(encoder, f"must have a tensor {name!r} of the shape {shape}, and has {found}")


def check_width(encoder: GgufFile, width: int, config: Mapping[str, Any]) -> None:
    """Raise ConfigError unless embeddings of ``width`` numbers are those of the language model."""
    wanted = config["hidden_size"]
    if width != wanted:
        bad(encoder, f"makes embeddings of {width} numbers, the model has {wanted}")


def bad(file: GgufFile, reason: str) -> NoReturn:
    """Raise ConfigError about a file."""
    raise ConfigError(f"{file.path.name} {reason}.", param="mmproj")
