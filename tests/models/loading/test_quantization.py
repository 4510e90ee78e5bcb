"""Quantized checkpoints are refused with the reason, before a byte of their weights is fetched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sensorium import LLM
from sensorium.config import engine_config
from sensorium.errors import ConfigError
from sensorium.models import loader
from sensorium.models.loading.quantization import check_method
from sensorium.models.loading.weight_files import INDEX, SINGLE
from sensorium.models.needs import needs_of
from tests.checkpoints import make_text, make_ultravox
from tests.models.loading.test_weight_files import Hub

GPTQ = {"bits": 3, "group_size": 128, "damp_percent": 0.01, "desc_act": False, "sym": True}
"""As published: without a name."""
AWQ = {"zero_point": True, "q_group_size": 128, "w_bit": 3, "version": "GEMM"}
HQQ = {"quant_method": "hqq", "nbits": 4}
MODELOPT = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
COMPRESSED = {"config_groups": {"group_0": {}}, "format": "nvfp4-pack-quantized"}
IN_CONFIG: dict[str, tuple[dict[str, Any], str]] = {
    "named": ({"quantization_config": {"quant_method": "awq", "bits": 2}}, "awq, 2 bits"),
    "gptq": ({"quantization_config": GPTQ}, "gptq, 3 bits"),
    "hqq": ({"quantization_config": HQQ}, "hqq"),
    "compressed-tensors": (
        {"compression_config": COMPRESSED},
        "compressed-tensors, nvfp4-pack-quantized",
    ),
    "mlx": (
        {"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}},
        "mlx, 4 bits",
    ),
    "mlx, newer": (
        {"quantization_config": {"group_size": 64, "bits": 4, "a.layer": {"bits": 7}}},
        "mlx, 4 bits",
    ),
    "of the text part": (
        {"text_config": {"quantization_config": {"quant_method": "quark"}}},
        "quark",
    ),
}
BESIDE = {
    "quantize_config.json": (GPTQ, "gptq, 3 bits"),
    "quant_config.json": (AWQ, "awq, 3 bits"),
    "hf_quant_config.json": (MODELOPT, "modelopt, NVFP4"),
}


def edit(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refused(model: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loader.load(model, device="cpu")
    assert f"is quantized ({what}" in caught.value.message
    assert "take the unquantized one" in caught.value.message


@pytest.mark.parametrize("kind", IN_CONFIG)
def test_what_config_json_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str) -> None:
    folder = make_text("llama", tmp_path / "repository")
    values, what = IN_CONFIG[kind]
    edit(folder / "config.json", values)
    hub = Hub(monkeypatch, folder, tmp_path)
    refused("some/model", f"{what}, says config.json)")
    assert not hub.weights


@pytest.mark.parametrize("file", BESIDE)
def test_what_the_files_beside_it_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str
) -> None:
    folder = make_text("llama", tmp_path / "repository")
    settings, what = BESIDE[file]
    (folder / file).write_text(json.dumps(settings))
    hub = Hub(monkeypatch, folder, tmp_path)
    refused("some/model", f"{what}, says {file})")
    assert not hub.weights


@pytest.mark.parametrize("file", BESIDE)
def test_files_that_a_merge_has_left_behind_do_not_count(tmp_path: Path, file: str) -> None:
    folder = make_text("llama", tmp_path)
    (folder / file).write_text(json.dumps(BESIDE[file][0]))
    assert loader.load(str(folder), device="cpu").family.name == "Llama"


@pytest.mark.parametrize("indexed", [False, True])
def test_what_the_names_of_the_weights_say(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, indexed: bool
) -> None:
    folder = make_text("llama", tmp_path / "repository", sharded=indexed)
    own = "model.layers.0.mlp.down_proj"
    added = {f"{own}.codebooks": torch.ones(4)}
    if not indexed:
        save_file(load_file(folder / SINGLE) | added, folder / SINGLE)
        refused(str(folder), f"aqlm, says the name {own}.codebooks)")
        return
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(added, "model-00001-of-00003.safetensors")
    (folder / INDEX).write_text(json.dumps(index))
    hub = Hub(monkeypatch, folder, tmp_path)
    refused("some/model", f"aqlm, says the name {own}.codebooks)")
    assert not hub.weights


def test_integers_under_plain_names(tmp_path: Path) -> None:
    folder = make_text("llama", tmp_path)
    name = "model.layers.0.mlp.down_proj.weight"
    tensors = load_file(folder / SINGLE)
    save_file(tensors | {name: tensors[name].to(torch.int8)}, folder / SINGLE)
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp.* is stored as torch\.int8"):
        loader.load(str(folder), device="cpu")


def test_a_quantized_backbone(tmp_path: Path) -> None:
    folder = make_ultravox(tmp_path)
    edit(folder / "text" / "config.json", {"quantization_config": HQQ})
    refused(str(folder), "hqq, says config.json)")


def test_the_reason_comes_before_what_else_is_wrong(tmp_path: Path) -> None:
    folder = make_text("llama", tmp_path)
    edit(folder / "config.json", {"quantization_config": HQQ})
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"is quantized \(hqq, says"):
        LLM(str(folder))


def test_a_method_that_is_named_is_the_checkpoints_own(tmp_path: Path) -> None:
    """Those who come from vLLM name it; another one is refused."""
    folder = make_text("llama", tmp_path)
    own = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    edit(folder / "config.json", {"quantization_config": own})
    loaded = loader.read_config(str(folder))
    for named in (None, "int8", "none", "gptq", "gptq_marlin"):
        check_method(loaded, named)
    with pytest.raises(
        ConfigError, match=r"'awq', but the checkpoint is published as gptq, 4 bits"
    ):
        check_method(loaded, "awq")
    edit(folder / "config.json", {"quantization_config": None})
    with pytest.raises(ConfigError, match=r"'fp8', but the checkpoint is not quantized.*int8"):
        LLM(str(folder), quantization="fp8")
    with pytest.raises(ConfigError, match="'gguf', but the checkpoint is not quantized") as caught:
        needs_of(engine_config(model=str(folder), quantization="gguf").model)
    assert caught.value.param == "quantization"
