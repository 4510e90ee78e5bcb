"""The SigLIP tower and connector of Idefics3 and SmolVLM, which run through transformers. No torch.

Source: ``conversion/smolvlm.py`` of llama.cpp, and the processor of Idefics3 in ``transformers``.
"""

from __future__ import annotations

from typing import Any

from sensorium.models.gguf.config import count
from sensorium.models.gguf.encoders.stored import (
    Configured,
    Encoder,
    TowerWeight,
    bad,
    check_shape,
    clip_config,
    clip_weights,
    colours,
)
from sensorium.models.gguf.reader import GgufFile
from sensorium.models.gguf.tokens import acting_tokens

_IMAGE, _AROUND, _WHOLE = "<image>", "<fake_token_around_image>", "<global-img>"
_FC = "mm.model.fc"
_LANCZOS = 1
_MOST_TILES = 8
"""Tiles along an edge."""
_USUAL = 4
"""Tiles along the longest edge in the published processors."""


def configure(file: GgufFile, encoder: GgufFile, config: dict[str, Any]) -> Configured:
    """Return the configuration of a model with its encoder, and those of its processor.

    A file without ``preproc_image_size``, as early ones are, gives images as a whole alone, made of
    one of the published size.
    """
    vision = clip_config(encoder) | {"hidden_act": "gelu_pytorch_tanh"}
    scale = count(encoder, "vision.projector.scale_factor", 2)
    across, remainder = divmod(vision["image_size"] // vision["patch_size"], scale)
    if remainder or not across:
        bad(encoder, f"has a scale_factor of {scale}, which does not divide its rows of patches")
    width = vision["hidden_size"] * scale * scale
    check_shape(encoder, f"{_FC}.weight", (config["hidden_size"], width))
    size = vision["image_size"]
    longest = count(encoder, "vision.preproc_image_size", size)
    tiles = -(-longest // size)
    if tiles > _MOST_TILES:
        bad(
            encoder,
            f"cuts images of {longest} pixels into tiles of {size}: more than {_MOST_TILES}",
        )
    corner = (f"<row_{tiles}_col_{tiles}>",) if tiles > 1 else ()
    tokens = _tokens(file, _IMAGE, _AROUND, _WHOLE, *corner)
    whole = {
        **{name: value for name, value in config.items() if name.endswith("token_id")},
        "architectures": ["Idefics3ForConditionalGeneration"],
        "model_type": "idefics3",
        "text_config": config,
        "vision_config": vision,
        "scale_factor": scale,
        "image_token_id": tokens[_IMAGE],
        "tie_word_embeddings": config["tie_word_embeddings"],
        "torch_dtype": config["torch_dtype"],
    }
    processor = {"processor_class": "Idefics3Processor", "image_seq_len": across * across}
    images = colours(encoder) | {
        "image_processor_type": "Idefics3ImageProcessor",
        "do_image_splitting": tiles > 1,
        "size": {"longest_edge": longest if tiles > 1 else _USUAL * size},
        "max_image_size": {"longest_edge": size},
        "resample": _LANCZOS,
    }
    return whole, {"preprocessor_config.json": images, "processor_config.json": processor}


def _tokens(file: GgufFile, *names: str) -> dict[str, int]:
    """Return the ids of tokens that act in a text. Raises ConfigError where there are none."""
    found = acting_tokens(file, names)
    missing = [name for name in names if name not in found]
    if missing:
        bad(file, f"has no tokens {', '.join(missing)}")
    return found


def weights(encoder: GgufFile) -> dict[str, TowerWeight]:
    """Return each weight by transformers' name, such as ``model.vision_model.…``."""
    others = {_FC: "model.connector.modality_projection.proj"}
    return clip_weights(encoder, "model.vision_model.", others)


ENCODER = Encoder(
    "idefics3",
    "SmolVLM and Idefics3",
    ("llama",),
    configure,
    weights,
    text_prefix=("model.", "model.text_model."),
)
