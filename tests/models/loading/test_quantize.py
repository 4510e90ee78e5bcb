"""Weights are quantized while they are loaded: the numbers, and which layers get which format."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium import LLM
from sensorium.errors import ConfigError
from sensorium.kernels import ops
from sensorium.kernels.cpu.linear import int8 as int8_products
from sensorium.kernels.cpu.linear.grouped import int4 as int4_products
from sensorium.kernels.weight import QuantizedTensor
from sensorium.models import loader
from sensorium.models.families import hf
from sensorium.models.interface import BuildOptions
from sensorium.models.loading import calibrate, quantize
from sensorium.models.loading.calibrate import NUM_TOKENS, mean_squares
from sensorium.models.loading.quantize import WeightFormats, int4, int8
from sensorium.models.loading.weights import SafetensorsFiles
from sensorium.models.registry import resolve
from tests import checkpoints
from tests.checkpoints.hf import make_hf_text
from tests.models.harness import Harness, picture

SHAPES = [(3, 32), (5, 96), (64, 100), (1, 7), (300, 576)]


def weights(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Normal numbers, some rows with outliers."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(shape, generator=generator) / math.sqrt(shape[1])
    found[::3, ::17] *= 8
    return found


def plain(weight: torch.Tensor, most: int, group: int) -> torch.Tensor:
    """Rounded to the scale at which the number of largest magnitude is ``most``."""
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % group))
    groups = padded.view(len(weight), -1, group)
    scale = groups.abs().amax(-1, keepdim=True) / most
    return ((groups / scale).round() * scale).flatten(1)[:, : weight.shape[1]]


def error(found: torch.Tensor, weight: torch.Tensor) -> float:
    return float((found - weight).square().sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_int8(shape: tuple[int, int]) -> None:
    weight = weights(shape)
    found = int8(weight)
    assert found.scales.shape == (shape[0], 1)
    assert found.values.abs().max() == 127
    assert error(found.dequantized(), weight) <= error(plain(weight, 127, shape[1]), weight)
    assert (found.dequantized() - weight).abs().max() < weight.abs().max() / 100


@pytest.mark.parametrize("shape", SHAPES)
def test_int4(shape: tuple[int, int]) -> None:
    weight = weights(shape)
    found = int4(weight)
    assert found.scales.shape == (shape[0], math.ceil(shape[1] / 32))
    assert torch.equal(found.scales, found.scales.bfloat16().float())
    assert found.values.min() == -8
    assert found.values.max() <= 7
    assert error(found.dequantized(), weight) < 0.95 * error(plain(weight, 7, 32), weight)


def test_int4_uses_minus_8_for_peaks_of_either_sign() -> None:
    weight = torch.linspace(-1, 1, 32)[None].repeat(2, 1)
    weight[0, 0], weight[1, -1] = -1.1, 1.1
    found = int4(weight)
    assert found.values[0, 0] == found.values[1, -1] == -8
    assert found.scales[0, 0] > 0 > found.scales[1, 0]


def test_int4_spares_the_inputs_that_count() -> None:
    weight = weights((64, 100))
    importance = torch.ones(100)
    importance[::9] = 1000.0

    def weighed(found: QuantizedTensor) -> float:
        return float(((found.dequantized() - weight).square() * importance).sum())

    spared = int4(weight, importance)
    assert weighed(spared) < 0.6 * weighed(int4(weight))
    alike = error(int4(weight, torch.full((100,), 7.0)).dequantized(), weight)
    assert alike == pytest.approx(error(int4(weight).dequantized(), weight), rel=0.01)
    importance[32:64] = 0.0
    assert int4(weight, importance).dequantized().isfinite().all()


def test_int4_weighs_errors_by_the_inputs_of_each_layer(tmp_path: Path) -> None:
    folder = str(checkpoints.make_text("qwen2", tmp_path))
    model: Any = loader.load(folder, dtype="float32").model
    layer = model.decoder.layers[0]
    config = loader.read_config(folder)
    family = resolve(config.config)
    options = BuildOptions(torch.float32, torch.device("cpu"))
    source = SafetensorsFiles(tmp_path, family.renames)
    means = mean_squares(family.build_model(config, options), source)
    generator = torch.Generator().manual_seed(0)
    length = min(NUM_TOKENS, model.shape.max_position, model.shape.vocab_size)
    ids = torch.randint(model.shape.vocab_size, (length,), generator=generator)
    inputs = layer.attention_norm(model.embed(ids))
    name = "layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(means[name], inputs.square().mean(0))
    names = {slot.parts[0].name for slot in model.slots() if slot.role == "decoder" and slot.layers}
    assert means.keys() == names | {"lm_head.weight", "embed_tokens.weight"}
    headed: Any = loader.load(folder, dtype="float32", formats=WeightFormats(head="int4")).model
    every = torch.arange(model.shape.vocab_size)
    weighed = int4(model.embed(every), means["lm_head.weight"]).dequantized()
    assert torch.equal(headed.embed(every), weighed)
    assert not torch.equal(weighed, int4(model.embed(every)).dequantized())
    quantized: Any = loader.load(folder, dtype="float32", formats=WeightFormats("int4")).model
    eye = torch.eye(layer.attention.o.num_inputs)
    stored = layer.attention.o(eye).t().contiguous()
    plain_rows = int4(stored).dequantized()
    own = quantized.decoder.layers[0].attention.o.weight.rows(torch.arange(len(stored)))
    assert not torch.allclose(own, plain_rows, atol=1e-6)
    torch.testing.assert_close(own, stored, atol=float(stored.abs().max()) / 6, rtol=0)


@pytest.mark.parametrize("make", [int8, int4])
def test_numbers_that_a_scale_holds_exactly_come_back(
    make: Callable[[torch.Tensor], QuantizedTensor],
) -> None:
    generator = torch.Generator().manual_seed(1)
    least, most = (-127, 128) if make is int8 else (-8, 8)
    values = torch.randint(least, most, (40, 64), generator=generator)
    values[:, ::32] = least
    scales = torch.exp2(torch.arange(40) % 7 - 9.0)[:, None]
    assert torch.equal(make(values * scales).dequantized(), values * scales)


@pytest.mark.parametrize("make", [int8, int4])
def test_zeros_and_numbers_that_are_not_finite(
    make: Callable[[torch.Tensor], QuantizedTensor],
) -> None:
    weight = torch.zeros(4, 64)
    weight[1, 3], weight[2, 40], weight[3] = torch.nan, -torch.inf, 1e-30
    found = make(weight)
    assert found.scales[0].eq(0).all()
    assert not found.dequantized()[1:3].isfinite().all(dim=1).any()
    assert found.dequantized()[3].isfinite().all()


@settings(max_examples=20, deadline=None)
@given(
    make=st.sampled_from([int8, int4]),
    num_outputs=st.integers(1, 70),
    num_inputs=st.sampled_from([1, 31, 32, 33, 128, 200]),
    band=st.sampled_from([1, 100, 1000]),
)
def test_bands_do_not_matter(
    make: Callable[[torch.Tensor], QuantizedTensor], num_outputs: int, num_inputs: int, band: int
) -> None:
    weight = weights((num_outputs, num_inputs)).bfloat16()
    whole = make(weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantize, "BAND", band)
        found = make(weight)
    assert torch.equal(found.values, whole.values)
    assert torch.equal(found.scales, whole.scales)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava")
    checkpoints.make_llava(folder)
    return folder


def formats_of(model: Any) -> dict[str, set[str]]:
    """Formats of the layers in each part of a model."""
    found: dict[str, set[str]] = {}
    for slot in model.slots():
        for layer in slot.layers:
            held = layer.weight
            name = "plain" if isinstance(held, torch.Tensor) else held.format
            found.setdefault(slot.role, set()).add(name)
    return found


def test_each_part_of_a_model_gets_its_own_format(llava: Path) -> None:
    own = WeightFormats(decoder="int4", encoder="int8")
    model = loader.load(str(llava), dtype="bfloat16", formats=own).model
    found = formats_of(model)
    assert found["decoder"] == {"int4"}
    assert found["encoder"] == {"int8"}
    assert "int8" not in found["head"]
    assert "int4" not in found["head"]
    model = loader.load(str(llava), formats=WeightFormats(head="int8")).model
    assert formats_of(model)["head"] == {"int8"}
    assert not {"int4", "int8"} & (formats_of(model)["decoder"] | formats_of(model)["encoder"])


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_tied_embedding_looks_up_rows_of_the_quantized_head(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrate, "mean_squares", lambda *_: {})  # errors are not weighed
    folder = str(checkpoints.make_text("qwen2", tmp_path))
    exact: Any = loader.load(folder, dtype="float32").model
    model: Any = loader.load(folder, dtype="float32", formats=WeightFormats(head=name)).model
    assert exact.decoder.config.tied
    assert model.decoder.embedding.weight is model.decoder.head.linear.weight
    ids = torch.tensor([0, 5, 77, 10_000_000])
    table = quantize.QUANTIZERS[name](exact.embed(torch.arange(model.shape.vocab_size)))
    torch.testing.assert_close(model.embed(ids)[:3], table.dequantized()[ids[:3]])


BOUNDS = {"int8": 0.02, "int4": 0.03}
"""Largest difference of a logit, as a share of the largest logit, that activations may cause."""


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.parametrize("family", ["llava", "ultravox", "minicpmv", "qwen2_5_vl", "phi3_v"])
def test_a_quantized_model_computes_what_the_dequantized_weights_say(
    tmp_path: Path, family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(getattr(checkpoints, f"make_{family}")(tmp_path) or tmp_path)
    formats = WeightFormats(decoder=name, encoder=name, head=name)
    own: dict[str, Any] = {"dtype": "float32", "load_format": "dummy", "seed": 1}
    quantized = loader.load(folder, **own, formats=formats)
    exact = loader.load(folder, **own)
    make = quantize.QUANTIZERS[name]
    monkeypatch.setitem(quantize.QUANTIZERS, name, lambda weight: make(weight).dequantized())
    rounded = loader.load(folder, **own, formats=formats)
    ids = [3 + index * 7 % 60 for index in range(40)]
    logits = []
    for loaded in (quantized, rounded, exact):
        harness = Harness(loaded)
        logits.append(harness.prefill(harness.add(ids)))
    found, expected, original = logits
    largest = float(expected.abs().max())
    assert float((found - expected).abs().max()) < BOUNDS[name] * largest
    assert not torch.equal(expected, original)
    if family == "llava":
        harness, other = Harness(quantized), Harness(rounded)
        features = harness.process([picture(40, 30, 1)])
        with torch.inference_mode():
            [coded], [embeds] = (h.model.encode(features) for h in (harness, other))
        assert float((coded - embeds).abs().max()) < BOUNDS[name] * float(embeds.abs().max())


def test_what_cannot_be_quantized_is_refused(tmp_path: Path, llava: Path) -> None:
    folder = str(make_hf_text("gpt2", tmp_path))
    for option in ("quantization", "quantization_towers", "quantization_head"):
        with pytest.raises(ConfigError, match=f"{option} is set, but this model runs through"):
            LLM(folder, **{option: "int8"})
    family = hf.find(["LlamaForCausalLM"])
    assert family is not None
    WeightFormats().check(family, torch.device("cuda"))
    native = resolve(loader.read_config(str(llava)).config)
    with pytest.raises(ConfigError, match="quantized weights run on CPUs alone, not on cuda"):
        WeightFormats(encoder="int4").check(native, torch.device("cuda"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "awq"}, "is 'awq', but the checkpoint is not quantized"),
        ({"quantization": "auto"}, "must be one of none, int8, int4, got 'auto'"),
        ({"quantization": 8}, "quantization must be a string, got 8"),
        ({"quantization_towers": "auto"}, "must be one of none, int8, int4, got 'auto'"),
        ({"quantization_head": "int5"}, "must be one of auto, none, int8, int4, got 'int5'"),
    ],
)
def test_wrong_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM("demo", **options)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("num_outputs", [48, 50, 7])
def test_packing_in_bands_gives_the_same_bytes(
    name: str, num_outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = weights((num_outputs, 100)).bfloat16()
    make = quantize.QUANTIZERS[name]
    whole = ops.pack_weight(make(weight), torch.bfloat16)
    monkeypatch.setattr(ops, "QUANTIZED_BAND", 16 * 100)
    calls: list[int] = []

    def counted(band: torch.Tensor) -> QuantizedTensor:
        calls.append(len(band))
        return make(band)

    found = ops.quantize_and_pack(weight, counted, torch.bfloat16)
    assert type(found) is type(whole)
    for key, part in whole.tensors().items():
        assert torch.equal(found.tensors()[key], part)
    if isinstance(found, int8_products.Int8Weight | int4_products.Int4Weight):
        assert max(calls) <= 16
        assert sum(calls) == num_outputs


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_an_embedding_without_a_head_is_packed_as_well(tmp_path: Path, name: str) -> None:
    folder = str(checkpoints.make_text("llama", tmp_path))
    model: Any = loader.load(folder, dtype="float32", formats=WeightFormats(head=name)).model
    assert not model.decoder.config.tied
    table, head = model.decoder.embedding.weight, model.decoder.head.linear.weight
    assert type(table) is type(head)
    assert table is not head
    assert table.nbytes == head.nbytes
    exact: Any = loader.load(folder, dtype="float32").model
    ids = torch.tensor([0, 5, 77, 10_000_000])
    rounded = quantize.QUANTIZERS[name](exact.embed(torch.arange(model.shape.vocab_size)))
    torch.testing.assert_close(model.embed(ids)[:3], rounded.dequantized()[ids[:3]])
