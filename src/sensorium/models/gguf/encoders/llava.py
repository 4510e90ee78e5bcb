"""The CLIP tower and projector of LLaVA-1.5. No torch.

Files name no preprocessing. Images are prepared as for the checkpoints of ``llava-hf``: the shorter
edge is resized and the centre cut out.
"""

from __future__ import annotations

from typing import Any

from sensorium.errors import UnsupportedModelError
from sensorium.models.gguf.config import token_ids
from sensorium.models.gguf.encoders.stored import (
    CLASS_TOKEN,
    Configured,
    Encoder,
    TowerWeight,
    bad,
    check_width,
    clip_config,
    clip_weights,
    colours,
)
from sensorium.models.gguf.reader import GgufFile, integers
from sensorium.models.gguf.tokens import acting_tokens

PLACEHOLDER = "<image>"
_TILED = ("vision.image_grid_pinpoints", "vision.mm_patch_merge_type")
_PROJECTOR = {"mm.0": "multi_modal_projector.linear_1", "mm.2": "multi_modal_projector.linear_2"}
_TOWER = "vision_tower."
_OTHER_PROJECTORS = ("mm.1.weight", "mm.3.weight", "mm.4.weight", "v.post_ln.weight")


def configure(file: GgufFile, encoder: GgufFile, config: dict[str, Any]) -> Configured:
    """Return the configuration of a model with its encoder, and that of its image processor.

    Raises UnsupportedModelError for LLaVA 1.6, and for encoders other than CLIP.
    """
    _check_kind(encoder)
    vision = clip_config(encoder) | {
        "model_type": "clip_vision_model",
        "hidden_act": "gelu" if encoder.own("use_gelu") is True else "quick_gelu",
    }
    projector = encoder.tensors.get("mm.2.weight")
    if projector is None:
        bad(encoder, "has no projector of two layers (mm.0, mm.2)")
    check_width(encoder, projector.shape[0], config)
    tokens, ids = acting_tokens(file, (PLACEHOLDER,)), token_ids(file)
    filler = ids.get("unknown", ids.get("bos", 0))
    whole = {
        **{name: value for name, value in config.items() if name.endswith("token_id")},
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": config,
        "vision_config": vision,
        "vision_feature_layer": _feature_layers(encoder, vision["num_hidden_layers"]),
        "vision_feature_select_strategy": "default",
        "image_token_index": tokens.get(PLACEHOLDER, filler),
        "image_token_in_vocabulary": PLACEHOLDER in tokens,
        "projector_hidden_act": "gelu",
        "tie_word_embeddings": config["tie_word_embeddings"],
        "torch_dtype": config["torch_dtype"],
    }
    size = vision["image_size"]
    processor = colours(encoder) | {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "resample": 3,
    }
    return whole, {"preprocessor_config.json": processor}


def _check_kind(encoder: GgufFile) -> None:
    """Raise UnsupportedModelError for relatives of LLaVA-1.5 that prepare or encode otherwise."""
    tiled = [name for name in _TILED if encoder.own(name) is not None]
    tiled += [name for name in encoder.tensors if name.endswith("image_newline")]
    other = [name for name in _OTHER_PROJECTORS if name in encoder.tensors]
    if CLASS_TOKEN not in encoder.tensors:
        reason = "an encoder without class token, which is no CLIP"
    elif tiled:
        reason = f"the encoder of LLaVA 1.6 or of another model that cuts images up ({tiled[0]})"
    elif other:
        reason = f"an encoder with {other[0]}, which LLaVA-1.5 does not have"
    else:
        return
    raise UnsupportedModelError(
        f"{encoder.path.name} is {reason}. GGUF files of LLaVA-1.5 run; take the safetensors "
        "checkpoint of this model.",
        param="mmproj",
    )


def _feature_layers(encoder: GgufFile, depth: int) -> list[int]:
    """Return after how many layers features are taken: after all that are stored, by default.

    Conversions leave out the last layer, whose result is not used.
    """
    layers = encoder.own("vision.feature_layer")
    if layers is None:
        return [depth]
    found = integers(layers)
    if found is None or not 1 <= len(found) <= depth:
        bad(encoder, "has no list of layers as clip.vision.feature_layer")
    if not all(0 <= layer <= depth for layer in found):
        bad(encoder, f"takes features after the layers {found}, and has {depth}")
    return found


def weights(encoder: GgufFile) -> dict[str, TowerWeight]:
    """Return each weight by transformers' name, such as ``vision_tower.…``."""
    return clip_weights(encoder, _TOWER, _PROJECTOR)


ENCODER = Encoder(
    "mlp", "LLaVA-1.5", ("llama",), configure, weights, text_prefix=("", "language_model.")
)
