"""Facts of published checkpoints.

What a few lines of their configurations must come out as, and the check of whole folders (`python
-m tests.checkpoints.published`) that found them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from sensorium.models.interface import BuildOptions, LoadedConfig
from sensorium.models.registry import resolve
from tests.checkpoints import (
    make_llava,
    make_llava_onevision,
    make_minicpmv,
    make_phi3_v,
    make_qwen2_5_vl,
    make_qwen2_vl,
    make_qwen3_vl,
    make_text,
)
from tests.checkpoints.published import report

PHI3 = {"model_type": "phi3", "rms_norm_eps": 1e-05, "original_max_position_embeddings": 4096}
QWEN2_VL_7B = {
    "model_type": "qwen2_vl",
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
    "vision_config": {"in_chans": 3, "model_type": "qwen2_vl", "spatial_patch_size": 14},
}
QWEN3_VL_8B = {
    "model_type": "qwen3_vl",
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "text_config": {
        "model_type": "qwen3_vl_text",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20]},
        "rope_theta": 5000000,
    },
    "tie_word_embeddings": False,
    "vision_config": {"depth": 27, "hidden_size": 1152, "out_hidden_size": 4096},
}
FACTS: dict[str, tuple[dict[str, Any], int]] = {
    # What config.json says (the rest are defaults of the class), and the bytes that the index says
    # the weights have.
    "Llama 3.2 3B": (
        {
            "model_type": "llama",
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
        },
        6425499648,
    ),
    "Qwen2-VL 7B": (QWEN2_VL_7B, 16582751232),
    "Qwen3-VL-Embedding 8B": (QWEN3_VL_8B, 16289587680),
    "Phi-3-mini": (PHI3 | {"sliding_window": 2047}, 7642159104),
}


def loaded(config: dict[str, Any]) -> LoadedConfig:
    return LoadedConfig("", config, {}, {}, {})


@pytest.mark.parametrize("name", FACTS)
def test_weights_have_the_published_size(name: str) -> None:
    """Of defaults too: no file says how large the tower of Qwen2-VL is."""
    config, size = FACTS[name]
    family = resolve(config)
    options = BuildOptions(torch.bfloat16, torch.device("cpu"), head="Embedding" not in name)
    model = family.build_model(loaded(config), options)
    slots = [slot for slot in model.slots() if slot.tied is None]
    assert 2 * sum(math.prod(part.shape) for slot in slots for part in slot.parts) == size


def test_phi_4_mini_turns_three_quarters_of_a_head_and_ties_its_head() -> None:
    config = PHI3 | {
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "partial_rotary_factor": 0.75,
        "tie_word_embeddings": True,
        "sliding_window": 262144,
        "max_position_embeddings": 131072,
        "rope_scaling": {"type": "longrope", "long_factor": [1.5] * 48, "short_factor": [1.0] * 48},
    }
    options = BuildOptions(torch.bfloat16, torch.device("cpu"))
    model: Any = resolve(config).build_model(loaded(config), options)
    assert model.shape.head_dim == 128
    assert model.rotary(torch.arange(3))[0].shape == (3, 48)
    assert model.decoder.config.tied
    assert model.shape.max_position == 131072


SHARDED: dict[str, Callable[..., Path]] = {
    "llama": partial(make_text, "llama"),
    "phi3": partial(make_text, "phi3"),
    "qwen2_vl": make_qwen2_vl,
    "qwen2_5_vl": make_qwen2_5_vl,
    "qwen3_vl": make_qwen3_vl,
    "llava": make_llava,
    "llava_onevision": make_llava_onevision,
    "phi3_v": make_phi3_v,
    "minicpmv": make_minicpmv,
}


def without_weights(folder: Path) -> Path:
    for file in folder.glob("*.safetensors"):
        file.unlink()
    return folder


@pytest.mark.parametrize("family", SHARDED)
def test_the_check_of_folders_finds_nothing_where_all_is_well(tmp_path: Path, family: str) -> None:
    folder = without_weights(SHARDED[family](tmp_path, sharded=True))
    what, problems = report(folder)
    assert not problems
    assert what.endswith(": text")


def test_the_check_of_folders_finds_what_is_wrong(tmp_path: Path) -> None:
    folder = make_qwen2_vl(tmp_path, sharded=True)
    index = folder / "model.safetensors.index.json"
    weights = json.loads(index.read_text())
    name = next(n for n in weights["weight_map"] if n.endswith("down_proj.weight"))
    weights["weight_map"]["model.stranger.weight"] = weights["weight_map"].pop(name)
    index.write_text(json.dumps(weights))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ nothing"}))
    _, problems = report(folder)
    assert [problem.partition(":")[0] for problem in problems] == ["weights", "templates"]
    assert "stranger" in problems[0]
