"""Text models without a family of their own run as transformers runs them, or are refused with
the reason.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sensorium.errors import ConfigError, UnsupportedModelError
from sensorium.models import loader
from sensorium.models.families.hf import attention, config
from sensorium.models.interface import LoadedConfig
from sensorium.models.registry import resolve
from tests.checkpoints.common import write_json
from tests.checkpoints.hf import make_hf_text
from tests.models.harness import Harness
from tests.models.test_parity import TEXT_PROMPTS, assert_parity

RUNNING = ("cohere", "gemma2", "gpt2", "gpt_oss", "granite", "olmo2", "stablelm")


@pytest.mark.parametrize("family", RUNNING)
def test_equal_to_the_reference(tmp_path: Path, family: str) -> None:
    """Windows, capped scores and logits, sinks, experts, scaled heads, learned positions.

    Whatever they have.
    """
    assert_parity(make_hf_text(family, tmp_path), TEXT_PROMPTS)


def test_latent_attention_with_values_smaller_than_keys(tmp_path: Path) -> None:
    folder = make_hf_text("deepseek_v3", tmp_path)
    assert_parity(folder, TEXT_PROMPTS)
    assert loader.load(str(folder), device="cpu").model.shape.head_dim == 24


def test_random_weights_and_other_values(tmp_path: Path) -> None:
    folder = make_hf_text("granite", tmp_path)
    (folder / "model.safetensors").unlink()
    overrides = {"num_hidden_layers": 3}
    models = [
        loader.load(
            str(folder), device="cpu", load_format="dummy", hf_overrides=overrides, seed=seed
        ).model
        for seed in (1, 1, 2)
    ]
    assert models[0].shape.num_layers == 3
    ids = torch.arange(4)
    first, same, other = (model.embed(ids) for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_half_precision(tmp_path: Path) -> None:
    folder = make_hf_text("granite", tmp_path)
    model = loader.load(str(folder), device="cpu", dtype="bfloat16").model
    assert model.embed(torch.arange(3)).dtype == torch.bfloat16
    assert model.logits(torch.zeros(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def _without_attention_interface() -> str:
    """A family whose modelling code in the installed transformers has attention of its own.

    Each release has fewer: CodeGen's called the interface from 5.24 on.
    """
    import transformers

    for family in ("codegen", "gpt_neo"):
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        if not hasattr(module, "ALL_ATTENTION_FUNCTIONS"):
            return family
    pytest.fail(f"transformers {transformers.__version__} has none of these families: name another")


def test_attention_of_its_own_is_refused(tmp_path: Path) -> None:
    folder = make_hf_text(_without_attention_interface(), tmp_path)
    with pytest.raises(UnsupportedModelError, match="do not call the attention interface"):
        loader.load(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("family", "values", "reason"),
    [
        ("mamba", {}, "linear_attention"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "computed in pieces"),
        ("diffllama", {}, r"attention was called by the layers \[0, 0, 1, 1\]"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(
    tmp_path: Path, family: str, values: dict[str, Any], reason: str
) -> None:
    folder = make_hf_text(family, tmp_path, **values)
    with pytest.raises(UnsupportedModelError, match=reason) as caught:
        loader.load(str(folder), device="cpu")
    assert caught.value.param == "model"
    assert family in caught.value.message


@pytest.mark.parametrize(
    "architecture", ["T5ForConditionalGeneration", "WhisperForConditionalGeneration"]
)
def test_encoder_decoders_are_refused(architecture: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{architecture}.*encoder-decoder"):
        resolve({"architectures": [architecture]})


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model_type": "gemma3n_text"}, "num_kv_shared_layers"),
        ({"model_type": "gemma4_text"}, "hidden_size_per_layer_input"),
        (
            {
                "model_type": "gemma4_text",
                "hidden_size_per_layer_input": 0,
                "num_kv_shared_layers": 0,
            },
            "its layers differ",
        ),
        ({"model_type": "llama4_text"}, "chunk"),
        ({"model_type": "bloom"}, "no usable max_position_embeddings"),
        ({"model_type": "bart"}, "encoder-decoder"),
    ],
)
def test_configurations_that_are_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        config.text_shape(LoadedConfig("", values, {}, {}, {}))


def test_a_configuration_that_its_class_does_not_take() -> None:
    with pytest.raises(ConfigError, match="does not fit model_type 'granite'"):
        config.read_hf_config({"model_type": "granite", "hidden_size": "many"})
    with pytest.raises(UnsupportedModelError, match="no model_type 'grunite'"):
        config.read_hf_config({"model_type": "grunite"})


def test_infinite_numbers_are_read_as_transformers_writes_them() -> None:
    values = {"model_type": "bamba", "time_step_limit": [0.0, {"__float__": "Infinity"}]}
    assert config.read_hf_config(values).time_step_limit[1] == float("inf")


def test_longrope_ends_at_the_original_length() -> None:
    factors = [1.0] * 16
    values = {
        "model_type": "phi3",
        "hidden_size": 128,
        "num_attention_heads": 4,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 512,
        "rope_scaling": {"type": "longrope", "short_factor": factors, "long_factor": factors},
    }
    assert config.text_shape(LoadedConfig("", values, {}, {}, {})).max_position == 512


def test_unknown_architectures_still_name_the_nearest() -> None:
    with pytest.raises(UnsupportedModelError, match=r"nearest are .*LlamaForCausalLM"):
        resolve({"architectures": ["LamaForCausalLM"]})
    with pytest.raises(UnsupportedModelError, match=r"nearest are .*Gemma2ForCausalLM"):
        resolve({"architectures": ["Gemma22ForCausalLM"]})


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    folder = make_hf_text("granite", tmp_path)
    values = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", values | {"num_hidden_layers": 3})
    with pytest.raises(ConfigError, match=r"9 are missing \(model.layers.2"):
        loader.load(str(folder), device="cpu")


def test_calls_that_are_not_a_decoders(tmp_path: Path) -> None:
    model: Any = loader.load(str(make_hf_text("granite", tmp_path)), device="cpu").model
    layer = model.decoder.layers[0].self_attn
    q, k = torch.zeros(1, 4, 3, 16), torch.zeros(1, 2, 3, 16)
    with attention.running(attention.Step(None)):
        with pytest.raises(attention.UnfitError, match="mask of its own"):
            attention.attend(layer, q, k, k, torch.zeros(1))
        with pytest.raises(attention.UnfitError, match="cross-attention"):
            attention.attend(layer, q, k[:, :, :2], k[:, :, :2], None)
        with pytest.raises(attention.UnfitError, match="its number"):
            attention.attend(torch.nn.Identity(), q, k, k, None)


def test_a_running_model_does_not_look_at_its_files(tmp_path: Path) -> None:
    folder = make_hf_text("gemma2", tmp_path)
    harness = Harness(loader.load(str(folder), device="cpu"))
    ids = list(range(30, 50))
    expected = harness.prefill(harness.add(ids))
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert torch.equal(harness.prefill(harness.add(ids)), expected)
