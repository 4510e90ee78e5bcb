"""What a quantized checkpoint becomes and takes, told before it is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sensorium.config import engine_config
from sensorium.kernels import ops
from sensorium.models import loader
from sensorium.models.loading.published.settings import Settings, plan_of
from sensorium.models.loading.quantization import settings_of
from sensorium.models.needs import PROCESSES, least_memory, needs_of
from tests.checkpoints import make_text
from tests.checkpoints import quantized as q
from tests.models.loading.published.forms import FORMS

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_hidden_layers": 1,
}
LARGE = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
LLAMA2_GPTQ = {
    "bits": 4,
    "group_size": 128,
    "damp_percent": 0.01,
    "desc_act": False,
    "sym": True,
    "true_sequential": True,
    "model_name_or_path": None,
    "model_file_base_name": "model",
}
"""Of a published Llama 2 13B: in config.json with the method's name, beside it without."""
LLAMA3_BNB = {
    "_load_in_4bit": False,
    "_load_in_8bit": True,
    "bnb_4bit_compute_dtype": "float32",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "fp4",
    "bnb_4bit_use_double_quant": False,
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0,
    "load_in_4bit": False,
    "load_in_8bit": True,
    "quant_method": "bitsandbytes",
}
"""Of a published Llama 3.1 8B."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text("llama", tmp_path_factory.mktemp("plain"), dtype="bfloat16", **SIZES)


def held(model: Any) -> int:
    """Bytes of the weights of a model's layers and tables."""
    weights = {id(own.weight): own.weight for slot in model.slots() for own in slot.layers}
    return sum(weight.nbytes for weight in weights.values())


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("awq", "int4, as they are"),
        ("gptq-act-order", "int4, as they are"),
        ("gptq-8", "int8, as they are"),
        ("w4a16", "int4, as they are"),
        ("fp8-block", "int8, made when loaded"),
        ("nf4", "int8, made when loaded"),
        ("llm-int8", "int8, as they are"),
        ("mlx", "int4, as they are"),
    ],
)
def test_the_memory_that_is_told_is_the_memory_that_it_takes(
    plain: Path, tmp_path: Path, form: str, text: str
) -> None:
    if not ops.has_integer_products():
        pytest.skip("this CPU has no products of quantized weights")
    folder = tmp_path / "model"
    shutil.copytree(plain, folder)
    tables = ("embed_tokens.weight", "lm_head.weight") if form.startswith("mlx") else ()
    ends = ("proj.weight", *tables)
    q.quantize(folder, FORMS[form].write, FORMS[form].settings, lambda name: name.endswith(ends))
    config = engine_config(model=str(folder), dtype="bfloat16", device="cpu", max_model_len=16)
    needs = needs_of(config.model)
    assert needs.product == text
    found = held(loader.load(str(folder), device="cpu", dtype="bfloat16").model)
    assert abs(needs.weights - found) < 0.1 * found
    early = least_memory(config.model) - PROCESSES
    assert abs(early - found) < 0.1 * found + needs.context


@pytest.mark.parametrize(
    ("values", "label", "text"),
    [
        ({**LLAMA2_GPTQ, "quant_method": "gptq"}, "gptq, 4 bits", "int4, as they are"),
        (LLAMA2_GPTQ, "gptq, 4 bits", "int4, as they are"),
        (LLAMA3_BNB, "bitsandbytes, 8 bits", "int8, as they are"),
    ],
)
def test_settings_of_published_checkpoints(
    tmp_path: Path, values: dict[str, Any], label: str, text: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**LARGE, "quantization_config": values}))
    settings = settings_of(loader.read_config(str(tmp_path)))
    assert settings is not None
    assert settings.problem() is None
    assert settings.label == label
    assert plan_of(settings, None, True, "float16", 2).text() == text
    assert plan_of(settings, None, False, "float16", 2).text() == "float16, made when loaded"
    assert plan_of(settings, "none", True, "float16", 2).text() == "float16, made when loaded"
    asked = plan_of(settings, "int4", True, "float16", 2).text()
    assert asked == ("int4, as they are" if text.startswith("int4") else "int4, made when loaded")


def test_settings_beside_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LARGE))
    (tmp_path / "quantize_config.json").write_text(json.dumps(LLAMA2_GPTQ))
    settings = settings_of(loader.read_config(str(tmp_path)))
    assert settings == Settings("gptq", LLAMA2_GPTQ, "quantize_config.json")
