"""Vision encoders in GGUF files of their own (``mmproj``): Qwen2-VL's. No torch.

Source: ``conversion/qwenvl.py`` of llama.cpp and its ``clip.cpp``. Files of other projectors are
refused.
"""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np

from sensorium.errors import ConfigError, UnsupportedModelError
from sensorium.models.gguf.config import count
from sensorium.models.gguf.reader import GgufFile

_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
PROJECTOR = "qwen2vl_merger"
_MERGE, _FRAMES = 2, 2


def with_vision(
    file: GgufFile, encoder: GgufFile, config: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configuration of a model with its encoder, and that of its image processor.

    config: as ``config_of`` returns it. Raises UnsupportedModelError for other projectors than
    Qwen2-VL's, and ConfigError for files that do not belong together.
    """
    kind = encoder.metadata.get("clip.projector_type")
    if encoder.architecture != "clip" or not isinstance(kind, str):
        _bad(encoder, "is no encoder of images (mmproj)")
    if kind != PROJECTOR or file.architecture != "qwen2vl":
        raise UnsupportedModelError(
            f"{encoder.path.name} is an encoder with the projector {kind!r:.40}, for a model of "
            f"the architecture {file.architecture!r}. GGUF files of Qwen2-VL run with theirs "
            f"({PROJECTOR}); take the safetensors checkpoint of other models.",
            param="mmproj",
        )
    vision = _vision(encoder)
    if vision["hidden_size"] != config["hidden_size"]:
        _bad(
            encoder,
            f"makes embeddings of {vision['hidden_size']} numbers, the model has "
            f"{config['hidden_size']}",
        )
    tokens = {token: i for i, token in enumerate(file.metadata["tokenizer.ggml.tokens"])}
    missing = [token for token in _TOKENS.values() if token not in tokens]
    if missing:
        _bad(file, f"has no tokens {', '.join(missing)}")
    sections = file.own("rope.dimension_sections")
    if not isinstance(sections, np.ndarray) or len(sections) < 3:
        _bad(file, "has no sections of rotary positions (rope.dimension_sections)")
    whole = config | {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "rope_scaling": {"type": "mrope", "mrope_section": [int(n) for n in sections[:3]]},
        "vision_config": vision,
        **{name: tokens[token] for name, token in _TOKENS.items()},
    }
    return whole, _processor(encoder, vision)


def _vision(encoder: GgufFile) -> dict[str, Any]:
    """Return ``vision_config``. The width of the MLP is that of its weights: files misstate it."""
    width = count(encoder, "vision.embedding_length")
    layers = [encoder.tensors.get(f"v.blk.0.{name}.weight") for name in ("ffn_up", "ffn_down")]
    shapes = [info.shape for info in layers if info is not None]
    inner = max((max(shape) for shape in shapes), default=0)
    if not inner or inner % width:
        _bad(encoder, "has no MLP of a vision encoder (v.blk.0.ffn_up)")
    depth = count(encoder, "vision.block_count")
    if f"v.blk.{depth - 1}.ln1.weight" not in encoder.tensors:
        _bad(encoder, f"has no {depth} layers")
    return {
        "depth": depth,
        "embed_dim": width,
        "hidden_size": count(encoder, "vision.projection_dim"),
        "mlp_ratio": inner // width,
        "num_heads": count(encoder, "vision.attention.head_count"),
        "patch_size": count(encoder, "vision.patch_size"),
        "spatial_merge_size": _MERGE,
        "temporal_patch_size": _FRAMES,
        "hidden_act": "quick_gelu",
        "in_channels": 3,
    }


def _processor(encoder: GgufFile, vision: dict[str, Any]) -> dict[str, Any]:
    """Return the image processor's configuration; files hold its means, and no range of pixels."""
    found = {}
    for name in ("image_mean", "image_std"):
        values = encoder.own(f"vision.{name}")
        if not isinstance(values, np.ndarray) or len(values) != 3 or not np.isfinite(values).all():
            _bad(encoder, f"has no three numbers as clip.vision.{name}")
        found[name] = [round(float(value), 8) for value in values]
    return found | {
        "image_processor_type": "Qwen2VLImageProcessor",
        "min_pixels": 56 * 56,
        "max_pixels": 16384 * 28 * 28,
        "patch_size": vision["patch_size"],
        "temporal_patch_size": _FRAMES,
        "merge_size": _MERGE,
    }


def _bad(file: GgufFile, reason: str) -> NoReturn:
    raise ConfigError(f"{file.path.name} {reason}.", param="mmproj")
