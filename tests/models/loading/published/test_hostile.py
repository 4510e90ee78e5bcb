"""Quantized checkpoints with wrong tensors are refused with the name of the tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sensorium.errors import ConfigError
from sensorium.models import loader
from tests.checkpoints import make_text
from tests.checkpoints import quantized as q
from tests.models.loading.published.forms import FORMS

OWN = "model.layers.1.mlp.down_proj."
Change = Callable[[torch.Tensor], torch.Tensor | None]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    return make_text("llama", folder, intermediate_size=128)


def gone(tensor: torch.Tensor) -> None:
    """The tensor is missing."""


def first(value: float) -> Change:
    """The first element has another value."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        flat = tensor.clone()
        flat.view(-1)[0] = value
        return flat

    return change


def state(**values: Any) -> Change:
    """The JSON text of bitsandbytes says other things."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        own = json.loads(bytes(tensor.tolist())) | values
        return torch.tensor(list(json.dumps(own).encode()), dtype=torch.uint8)

    return change


STATE = "weight.quant_state.bitsandbytes__nf4"
CASES: dict[str, tuple[str, str, Change, str]] = {
    "a row of words is missing": ("awq-32", "qweight", lambda t: t[1:], r"is \(127, 8\), not"),
    "words of other bits": ("gptq", "qweight", lambda t: t[::2], "which are not 4 bits of 128"),
    "words as floats": ("awq-32", "qweight", lambda t: t.float(), "stored as F32, not I32"),
    "no scales": ("gptq-32-asymmetric", "scales", gone, "is missing"),
    "no zero points": ("awq-32", "qzeros", gone, "is missing"),
    "no order": ("gptq-act-order", "g_idx", gone, "is missing, though desc_act"),
    "too few groups": ("gptq-32-asymmetric", "scales", lambda t: t[:3], "has 3 groups"),
    "too many groups": ("awq-32", "scales", lambda t: t.repeat(2, 1), r"is \(8, 64\), not"),
    "an input in a group that is none": ("gptq-act-order", "g_idx", first(4), "groups outside"),
    "an input in a negative group": ("gptq-act-order", "g_idx", first(-7), "groups outside"),
    "a scale that is not a number": ("awq-32", "scales", first(float("nan")), "not finite"),
    "an infinite scale": ("gptq", "scales", first(float("inf")), "not finite"),
    "no scales of packed words": ("w4a16-asymmetric", "weight_scale", gone, "is missing"),
    "another shape": ("w4a16", "weight_shape", first(7), "says another shape"),
    "groups that do not fit": (
        "w8a16",
        "weight_scale",
        lambda t: t.repeat(1, 3),
        "has 3 groups, which 128 inputs cannot",
    ),
    "too few zero points": (
        "w4a16-asymmetric",
        "weight_zero_point",
        lambda t: t[1:].clone(),
        "as the layer needs",
    ),
    "an infinite scale of int8": ("w8a8", "weight_scale", first(float("inf")), "not finite"),
    "no scale of FP8": ("fp8-static", "weight_scale", gone, "is missing"),
    "a scale of FP8 for no block": (
        "fp8-block",
        "weight_scale_inv",
        lambda t: t.repeat(3, 5),
        "does not scale a weight",
    ),
    "a scale of FP8 that is not a number": (
        "fp8-compressed-channel",
        "weight_scale",
        first(float("nan")),
        "not finite",
    ),
    "half the bytes": ("nf4", "weight", lambda t: t[: len(t) // 2], "not 8192 numbers of 4 bits"),
    "no table": ("nf4", "weight.quant_map", gone, "is missing"),
    "no factors": ("nf4", "weight.absmax", gone, "is missing"),
    "too few outer factors": ("nf4", "weight.nested_absmax", lambda t: t[:0], "layer needs"),
    "a state that is no text": ("nf4", STATE, lambda t: t[5:], "cannot be read as JSON"),
    "a state of another shape": ("nf4", STATE, state(shape=[1 << 40, 8]), "says shape"),
    "a state of huge blocks": ("nf4", STATE, state(blocksize=1 << 60), "impossible sizes"),
    "a state without blocks": ("nf4", STATE, state(blocksize=0), "impossible sizes"),
    "a state of float blocks": ("nf4", STATE, state(blocksize=64.0), "impossible sizes"),
    "a state of float outer blocks": (
        "nf4",
        STATE,
        state(nested_blocksize=256.0),
        "impossible sizes",
    ),
    "an offset that is not finite": ("nf4", STATE, state(nested_offset=1e999), "impossible"),
    "codes of no bits": ("mlx", "weight", lambda t: t[:, :7], "no codes of a weight"),
    "codes as other integers": (
        "mlx-8",
        "weight",
        lambda t: t.view(torch.int32),
        "not 2 axes of U32",
    ),
    "scales that fit no groups": ("mlx", "scales", lambda t: t.repeat(1, 3)[:, :5], "not scale a"),
    "too few biases": ("mlx-5", "biases", lambda t: t[1:], "as the layer needs"),
    "no biases": ("mlx", "biases", gone, "is missing"),
    "a bias that is not finite": ("mlx-3", "biases", first(float("nan")), "not finite"),
    "no scales of rows": ("llm-int8", "SCB", gone, "SCB|int8"),
    "rows in another layout": ("llm-int8", "weight_format", first(2), "another layout"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_tensor(plain: Path, tmp_path: Path, case: str) -> None:
    form, end, change, message = CASES[case]
    folder = tmp_path / "model"
    shutil.copytree(plain, folder)
    q.quantize(folder, FORMS[form].write, FORMS[form].settings)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    changed = change(tensors.pop(OWN + end))
    if changed is not None:
        tensors[OWN + end] = changed.contiguous()
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=message) as caught:
        loader.load(str(folder), device="cpu")
    assert "layers.1.mlp.down_proj" in caught.value.message


@pytest.mark.parametrize(
    ("form", "key", "value", "message"),
    [
        ("gptq", "bits", "four", "bits of the quantization must be a number"),
        ("gptq", "bits", 3, "4 and 8 bits are supported, not 3"),
        ("gptq", "group_size", 0, "group_size of the quantization must be"),
        ("gptq", "group_size", [64], "group_size of the quantization must be a number"),
        ("gptq", "checkpoint_format", "marlin", "layout 'marlin' is not supported"),
        ("awq-32", "version", "gemv_fast", "layout 'gemv_fast' is not supported"),
        ("awq-32", "bits", 8, "of which 4 bits are supported, not 8"),
        ("fp8-block", "weight_block_size", [0, 128], "two positive numbers"),
        ("w4a16", "format", "nvfp4-pack-quantized", "format 'nvfp4-pack-quantized' is not"),
        ("w4a16", "sparsity_config", {"format": "sparse-24-bitmask"}, "with sparsity_config"),
        ("w4a16", "transform_config", {"config_groups": {}}, "with transform_config"),
        ("fp8-modelopt", "quant_algo", "NVFP4", "FP8 is supported, not NVFP4"),
        ("mlx", "mode", "mxfp4", "mode 'mxfp4' is not supported"),
        ("mlx", "bits", 7, "7 bits are not supported"),
        ("w4a16", "quant_method", "hqq", "which is not supported"),
    ],
)
def test_a_wrong_setting(
    plain: Path, tmp_path: Path, form: str, key: str, value: object, message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(plain, folder)
    q.quantize(folder, FORMS[form].write, dict(FORMS[form].settings) | {key: value})
    with pytest.raises(ConfigError, match=message):
        loader.load(str(folder), device="cpu")


@pytest.mark.parametrize("form", ["gptq", "w4a16"])
def test_biases_that_a_layer_does_not_have(plain: Path, tmp_path: Path, form: str) -> None:
    """AutoGPTQ writes one of zeros for each layer; another is missing in what is computed."""
    folder = tmp_path / "model"
    shutil.copytree(plain, folder)
    q.quantize(folder, FORMS[form].write, FORMS[form].settings)
    path, bias = folder / "model.safetensors", torch.zeros(64, dtype=torch.float16)
    tensors = load_file(path)
    save_file(tensors | {f"{OWN}bias": bias}, path)
    loader.load(str(folder), device="cpu")
    bias[3] = 0.5
    save_file(tensors | {f"{OWN}bias": bias}, path)
    with pytest.raises(ConfigError, match=r"no place .*layers\.1\.mlp\.down_proj\.bias"):
        loader.load(str(folder), device="cpu")
