"""MiniCPM-V 2.6: views of images and frames, a SigLIP tower, a resampler, a Qwen2 decoder."""

from __future__ import annotations

from sensorium.models.families.minicpmv.config import read_minicpmv_config
from sensorium.models.families.minicpmv.processing import build, normalization
from sensorium.models.native import native_family

FAMILIES = (
    native_family(
        lambda loaded: read_minicpmv_config(loaded.config),
        build,
        "sensorium.models.families.minicpmv.model:MiniCPMVModel",
        normalization=normalization,
        name="MiniCPM-V 2.6",
        checkpoint="openbmb/MiniCPM-V-2_6",
        architectures=("MiniCPMV",),
        model_types=("minicpmv",),
        modalities=("image", "video"),
        renames=(
            (r"^llm\.lm_head\.", "lm_head."),
            (r"^llm\.model\.", "language_model."),
        ),
        stop_tokens=("<|im_end|>", "<|endoftext|>"),
        template=(__name__, "chat_template.jinja"),
        same_on_threads=False,  # the resampler's attention is torch's
    ),
)
