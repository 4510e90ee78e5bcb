"""LoRA adapters as PEFT writes them, for tiny checkpoints, and checkpoints with an adapter folded
in.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

UNCHANGED = re.compile(
    r".*(embed|norm|lm_head|wte|class_|newline|GN|ln_|layrnorm|resampler\.(attn|query|proj))"
)
"""Weights that are no linear layers, or none that adapters change."""


def linear_names(base: Path) -> dict[str, tuple[int, int]]:
    """Names of the linear layers of a checkpoint that adapters may change, with their shapes."""
    tensors = load_file(base / "model.safetensors")
    found = {}
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        hidden = UNCHANGED.match(module.replace("vision_embed_tokens.", ""))
        if name.endswith(".weight") and tensor.dim() == 2 and not hidden:
            found[module] = (tensor.shape[0], tensor.shape[1])
    return found


def make_adapter(
    folder: Path,
    base: Path,
    *,
    only: str = ".*",
    rank: int = 4,
    alpha: float = 8,
    seed: int = 0,
    strength: float = 0.2,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """A random adapter of the linear layers of ``base`` whose names match ``only``.

    ``config``: further values of adapter_config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": ".*",
        "bias": "none",
        "base_model_name_or_path": str(base),
        **config,
    }
    generator = torch.Generator().manual_seed(seed)
    weights = load_file(base / "model.safetensors")
    tensors = {}
    for name, (outputs, inputs) in linear_names(base).items():
        if re.fullmatch(only, name) is None:
            continue
        own = pattern_value(settings.get("rank_pattern"), name, rank)
        a = torch.randn((own, inputs), generator=generator) / inputs**0.5
        b = torch.randn((outputs, own), generator=generator) * strength / own**0.5
        tensors[f"base_model.model.{name}.lora_A.weight"] = a.to(dtype)
        tensors[f"base_model.model.{name}.lora_B.weight"] = b.to(dtype)
        if settings.get("use_dora"):
            norms = weights[f"{name}.weight"].float().norm(dim=1)
            factors = 0.7 + 0.6 * torch.rand(outputs, generator=generator)
            tensors[f"base_model.model.{name}.lora_magnitude_vector"] = (norms * factors).to(dtype)
    assert tensors, "the adapter changes nothing"
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def pattern_value(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value for a module by PEFT's rule: the first key that the end of its name matches."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def merged(folder: Path, base: Path, adapter: Path) -> Path:
    """The checkpoint ``base`` with an adapter folded into its weights, in float64."""
    shutil.copytree(base, folder)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    parts = load_file(adapter / "adapter_model.safetensors")
    weights = load_file(base / "model.safetensors")
    for key in [key for key in parts if "lora_A" in key]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        rank = pattern_value(settings.get("rank_pattern"), name, settings["r"])
        alpha = pattern_value(settings.get("alpha_pattern"), name, settings["lora_alpha"])
        scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
        b = parts[key.replace("lora_A", "lora_B")]
        weight = weights[f"{name}.weight"]
        added = scale * (b.double() @ parts[key].double())
        whole = weight.double() + added
        magnitude = parts.get(key.replace("lora_A.weight", "lora_magnitude_vector"))
        if magnitude is not None:
            whole *= (magnitude.double() / whole.norm(dim=1))[:, None]
        weights[f"{name}.weight"] = whole.to(weight.dtype).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
