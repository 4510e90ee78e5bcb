"""Finding, reading and loading checkpoints, and the errors for broken ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sensorium.errors import ConfigError, UnsupportedModelError
from sensorium.kernels.cpu.linear import onednn
from sensorium.models import loader
from sensorium.models.configs import read_text_config
from sensorium.models.interface import LoadedConfig, stop_token_ids
from sensorium.models.loading import checkpoint
from sensorium.models.registry import FAMILIES, resolve
from tests.checkpoints import make_llava, make_qwen2_vl, make_text
from tests.models.harness import Harness, Reference, picture, text_ids


def load(folder: Path, **options: Any) -> loader.LoadedModel:
    return loader.load(str(folder), device="cpu", **options)


def logits_of(loaded: loader.LoadedModel, ids: list[int]) -> torch.Tensor:
    harness = Harness(loaded)
    return harness.prefill(harness.add(ids))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    "build",
    [make_llava, make_qwen2_vl, partial(make_text, "phi3")],
)
def test_t5_layout_is_what_transformers_writes(tmp_path: Path, build: Callable[..., Path]) -> None:
    folder = build(tmp_path / "built", layout="t5")
    Reference(folder).model.save_pretrained(tmp_path / "saved")
    written = load_file(tmp_path / "saved" / "model.safetensors")
    assert set(written) == set(load_file(folder / "model.safetensors"))
    ids = list(range(20, 60))
    assert torch.equal(logits_of(load(tmp_path / "saved"), ids), logits_of(load(folder), ids))


def test_missing_extra_and_misshapen_weights_are_listed(tmp_path: Path) -> None:
    folder = make_llava(tmp_path)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["language_model.model.layers.1.self_attn.k_proj.weight"]
        del tensors["multi_modal_projector.linear_1.bias"]
        tensors["language_model.model.norm.weight"] = torch.ones(63)
        tensors["language_model.model.layers.0.self_attn.k_proj.lora_a"] = torch.ones(1)

    edit_weights(folder, spoil)
    with pytest.raises(ConfigError) as caught:
        load(folder)
    message = caught.value.message
    assert "2 are missing" in message
    assert "language_model.layers.1.self_attn.k_proj.weight" in message
    assert "multi_modal_projector.linear_1.bias" in message
    assert "language_model.norm.weight is (63,), not (64,)" in message
    assert "1 have no place" in message
    assert "k_proj.lora_a" in message
    assert str(tmp_path) not in message


def test_long_lists_of_weights_are_cut(tmp_path: Path) -> None:
    folder = make_text("llama", tmp_path)
    edit_weights(folder, lambda tensors: [tensors.pop(n) for n in list(tensors) if "layers" in n])
    with pytest.raises(ConfigError, match=r"18 are missing \(.* and 12 more\)"):
        load(folder)


def test_unused_vision_layers_are_neither_needed_nor_loaded(tmp_path: Path) -> None:
    folder = make_llava(tmp_path)
    before = load(folder)
    edit_weights(
        folder,
        lambda tensors: [
            tensors.pop(n) for n in list(tensors) if "layers.2." in n or "post_layernorm" in n
        ],
    )
    harness, image = Harness(load(folder)), picture(40, 50, 0)
    ids = text_ids(folder, "<image> What?")
    expected = Harness(before)
    assert torch.equal(
        harness.prefill(harness.add(ids, [image])), expected.prefill(expected.add(ids, [image]))
    )


@pytest.mark.parametrize("build", [make_llava, make_qwen2_vl])
def test_skipped_images_need_no_tower(tmp_path: Path, build: Callable[..., Path]) -> None:
    folder = build(tmp_path)
    ids = text_ids(folder, "What is shown?")
    expected = logits_of(load(folder), ids)
    assert load(folder).model.has_encoder
    skipped = {"image", "video"}
    loaded: Any = load(folder, skip_modalities=skipped)
    assert not loaded.model.has_encoder
    assert torch.equal(logits_of(loaded, ids), expected)
    assert loaded.model.tower is None
    assert loaded.processor is not None
    features = loaded.processor.process("image", picture(30, 30, 0), {})
    with pytest.raises(ValueError, match="no encoder for image"):
        loaded.model.encode([features])
    towers = ("vision_tower", "visual", "multi_modal_projector")
    edit_weights(folder, lambda t: [t.pop(n) for n in list(t) if n.startswith(towers)])
    assert torch.equal(logits_of(load(folder, skip_modalities=skipped), ids), expected)


def test_running_model_does_not_look_at_its_files(tmp_path: Path) -> None:
    folder = make_qwen2_vl(tmp_path)
    loaded = load(folder)
    harness, image = Harness(loaded), picture(60, 90, 0)
    ids = text_ids(folder, "<|image_pad|> What?")
    expected = harness.prefill(harness.add(ids, [image]))
    path = folder / "model.safetensors"
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert torch.equal(harness.prefill(harness.add(ids, [image])), expected)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = make_text("llama", tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"\.bin.*[Ss]afetensors files are needed"):
        load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ConfigError, match=r"no safetensors files.*dummy"):
        load(folder)


def test_incomplete_and_damaged_files(tmp_path: Path) -> None:
    folder = make_text("llama", tmp_path / "a", sharded=True)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model-00002-of-00003\.safetensors.*not complete"):
        load(folder)
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"index\.json of the model cannot be read"):
        load(folder)
    folder = make_text("llama", tmp_path / "b")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ConfigError, match=r"model\.safetensors of the model is not a readable"):
        load(folder)


def test_unknown_architectures(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'Qwen2VLForGeneration'.*Qwen2VLForCond"):
        resolve({"architectures": ["Qwen2VLForGeneration"]})
    with pytest.raises(
        UnsupportedModelError, match=r"names no architectures.*None is none.*llama, llava"
    ):
        resolve({})
    assert resolve({"architectures": ["Unknown", "Qwen3ForCausalLM"]}).name == "Qwen3"


def test_registry_rows_are_distinct() -> None:
    names = [name for family in FAMILIES for name in family.architectures]
    assert len(set(names)) == len(names)
    assert {f.name: f.modalities for f in FAMILIES}["Qwen2-VL"] == ("image", "video")
    assert {"Llama", "Qwen2", "Qwen3", "Mistral", "Phi-3", "LLaVA-1.5"} <= {
        f.name for f in FAMILIES
    }


def test_folders_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json"):
        loader.read_config(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json of the model cannot be read"):
        loader.read_config(str(tmp_path))
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"not a JSON object"):
        loader.read_config(str(tmp_path))
    for name in ("./nothing", "~/nothing-here", "a/b/c"):
        with pytest.raises(ConfigError, match="no such folder"):
            loader.read_config(name)


def hub_errors() -> list[tuple[Exception, str]]:
    import httpx2 as httpx
    from huggingface_hub import errors

    response = httpx.Response(404, request=httpx.Request("GET", "https://example.org"))
    return [
        (errors.HFValidationError("x"), "well-formed Hugging Face id"),
        (errors.GatedRepoError("x", response=response), "accept the terms"),
        (errors.RevisionNotFoundError("x", response=response), "no such revision"),
        (errors.RepositoryNotFoundError("x", response=response), "has no such model"),
        (errors.LocalEntryNotFoundError("x"), "cannot be reached.*local folder"),
        (errors.OfflineModeIsEnabled("x"), "HF_HUB_OFFLINE"),
        (ConnectionError("x"), "cannot be reached"),
    ]


@pytest.mark.parametrize("index", range(7))
def test_hub_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    error, pattern = hub_errors()[index]

    def fail(*args: object, **options: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ConfigError, match=pattern) as caught:
        loader.read_config("some/model", revision="v9")
    assert "'some/model' at revision 'v9'" in caught.value.message


def test_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "has_units", lambda dtype: True)
    folder = make_text("llama", tmp_path, dtype="float16")
    assert load(folder).model.dtype == torch.float16
    assert load(folder, dtype="bfloat16").model.dtype == torch.bfloat16
    edit_config(folder, lambda c: c.update(torch_dtype=None, dtype="float32"))
    assert load(folder).model.dtype == torch.float32
    edit_config(folder, lambda c: c.pop("dtype"))
    assert load(folder).model.dtype == torch.float16, "that of the weights"
    assert load(folder, load_format="dummy").model.dtype == torch.float32
    edit_config(folder, lambda c: c.update(dtype="float8_e4m3fn"))
    with pytest.raises(ConfigError, match="float8_e4m3fn"):
        load(folder)


def test_dummy_weights(tmp_path: Path) -> None:
    folder = make_qwen2_vl(tmp_path)
    (folder / "model.safetensors").unlink()
    ids, image = text_ids(folder, "<|image_pad|> What?"), picture(60, 90, 0)

    def run(seed: int) -> torch.Tensor:
        harness = Harness(load(folder, load_format="dummy", seed=seed))
        return harness.prefill(harness.add(ids, [image]))

    first = run(1)
    assert torch.isfinite(first).all()
    assert first.std() > 0
    assert torch.equal(first, run(1))
    assert not torch.equal(first, run(2))


def test_dummy_weights_are_normal() -> None:
    from sensorium.models.interface import Part
    from sensorium.models.loading.weights import DummyWeights

    weights = DummyWeights(0, torch.float32)
    big = weights.read(Part("a.weight", (1500, 1024)))
    assert abs(big.mean()) < 1e-4
    assert abs(big.std() - 0.02) < 1e-4
    assert len(big.unique(dim=0)) == 1500
    other = weights.read(Part("b.weight", (1500, 1024)))
    assert (big - other).abs().mean() > 0.01
    assert weights.read(Part("norm.weight", (7,))).tolist() == [1.0] * 7
    assert weights.read(Part("fc.bias", (7,))).tolist() == [0.0] * 7


def test_overrides_reach_nested_values(tmp_path: Path) -> None:
    folder = make_llava(tmp_path)
    over = {"text_config": {"max_position_embeddings": 128}, "vision_feature_layer": -1}
    loaded = loader.read_config(str(folder), hf_overrides=over)
    assert loaded.config["text_config"]["hidden_size"] == 64
    assert loaded.config["vision_feature_layer"] == -1
    assert resolve(loaded.config).shape(loaded).max_position == 128
    assert checkpoint.merged({"a": {"b": 1}}, {"a": 2}) == {"a": 2}


WINDOWED = {"use_sliding_window": True, "sliding_window": 100}
BOTH_KINDS = ["sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("family", "sizes", "windows"),
    [
        ("mistral", {"sliding_window": 100}, (100, 100)),
        ("mistral", {"sliding_window": None}, (None, None)),
        ("phi3", {"sliding_window": 100}, (100, 100)),
        ("phi3", {"sliding_window": 10**6}, (None, None)),
        ("qwen2", WINDOWED, (None, None)),
        ("qwen2", WINDOWED | {"max_window_layers": 1}, (None, 100)),
        ("qwen2", WINDOWED | {"max_window_layers": 0}, (100, 100)),
        ("qwen2", WINDOWED | {"max_window_layers": 0, "use_sliding_window": False}, (None, None)),
        ("qwen3", WINDOWED | {"layer_types": BOTH_KINDS}, (100, None)),
    ],
)
def test_windows_of_layers(
    tmp_path: Path, family: str, sizes: dict[str, object], windows: tuple[int | None, ...]
) -> None:
    model: Any = load(make_text(family, tmp_path, **sizes)).model
    layers = model.decoder.layers
    assert tuple(layer.attention.variant.window for layer in layers) == windows
    assert model.shape.max_position > 100


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "qwen2_vl", "qwen2_vl_text"])
@pytest.mark.parametrize("given", [{}, {"use_sliding_window": None}, {"layer_types": BOTH_KINDS}])
def test_qwen_has_no_window_unless_it_is_switched_on(
    model_type: str, given: dict[str, object]
) -> None:
    """Published files name a size that is not used; transformers' default is off, too."""
    config: dict[str, object] = {"model_type": model_type, "num_hidden_layers": 2, **given}
    config |= {"sliding_window": 100, "max_window_layers": 0}
    assert read_text_config(config).windows == (None, None)
    assert read_text_config(config | {"use_sliding_window": True}).windows[0] == 100


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        ({"hidden_size": "big"}, "hidden_size must be an integer, got 'big'"),
        ({"num_key_value_heads": 3}, "3 does not divide 4 heads"),
        ({"hidden_act": "mystery"}, "unknown activation 'mystery'"),
        ({"rope_scaling": {"type": "spiral"}}, "unknown rope type 'spiral'"),
        ({"rope_scaling": {"type": "linear"}}, "rotary scaling lacks 'factor'"),
        ({"rope_scaling": {"type": "linear", "inner": {}}}, "one mapping of plain values"),
        (
            {"model_type": "qwen2", **WINDOWED, "layer_types": BOTH_KINDS * 2},
            "layer_types must name 2 layers of full_attention, sliding_attention",
        ),
        ({"model_type": "gpt9"}, "no decoder for model_type 'gpt9'"),
    ],
)
def test_impossible_configurations(tmp_path: Path, change: dict[str, object], pattern: str) -> None:
    folder = make_text("llama", tmp_path)
    with pytest.raises(ConfigError, match=pattern):
        load(folder, hf_overrides=change)


@pytest.mark.parametrize(
    ("build", "change", "pattern"),
    [
        (make_llava, {"image_token_index": 448}, "448 is outside the vocabulary of 448"),
        (make_llava, {"vision_feature_layer": 4}, "4 is outside a tower of 3 layers"),
        (make_llava, {"vision_feature_select_strategy": "some"}, "'default' or 'full'"),
        (make_llava, {"vision_config": {"model_type": "siglip_vision_model"}}, "not supported"),
        (make_llava, {"vision_config": None}, "vision_config must be a mapping, got None"),
        (make_qwen2_vl, {"vision_config": {"hidden_size": 32}}, "not the decoder's hidden size"),
        (make_qwen2_vl, {"vision_config": {"num_heads": 16}}, "divisible by 4"),
        (make_qwen2_vl, {"rope_scaling": {"mrope_section": [1, 1, 1]}}, "must sum to 8"),
        (make_qwen2_vl, {"video_token_id": 9999}, "outside the vocabulary"),
    ],
)
def test_impossible_vision_configurations(
    tmp_path: Path, build: Callable[..., Path], change: dict[str, object], pattern: str
) -> None:
    with pytest.raises(ConfigError, match=pattern):
        load(build(tmp_path), hf_overrides=change)


def test_wrong_devices(tmp_path: Path) -> None:
    folder = make_text("llama", tmp_path)
    for device in ("tpu", "meta", "cuda:99"):
        with pytest.raises(ConfigError) as caught:
            loader.load(str(folder), device=device)
        assert caught.value.param == "device"


def test_stop_tokens_of_the_configuration() -> None:
    def loaded(config: dict[str, Any], generation: dict[str, Any]) -> LoadedConfig:
        return LoadedConfig("", config, generation, {}, {})

    assert stop_token_ids(loaded({"eos_token_id": 1}, {"eos_token_id": [5, 6, 5]})) == (5, 6)
    assert stop_token_ids(loaded({"eos_token_id": 1}, {})) == (1,)
    assert stop_token_ids(loaded({"text_config": {"eos_token_id": 3}}, {})) == (3,)
    assert stop_token_ids(loaded({}, {})) == ()


LIGHT = """
import sys
from sensorium.models import loader
from sensorium.models.registry import resolve
for folder in sys.argv[1:]:
    loaded = loader.read_config(folder)
    family = resolve(loaded.config)
    family.build_processor(loaded), family.shape(loaded), family.chat_template()
heavy = sorted({"torch", "transformers", "numba", "huggingface_hub"} & set(sys.modules))
assert not heavy, heavy
for folder in sys.argv[1:]:
    loader.load(folder, device="cpu")
from sensorium import LLM, SamplingParams
llm = LLM(sys.argv[-1], device="cpu", max_model_len=64)
llm.generate("a", SamplingParams(max_tokens=8, ignore_eos=True), use_tqdm=False)
late = sorted({"transformers", "torch._dynamo"} & set(sys.modules))
assert not late, late
"""


def test_decoding_imports_neither_transformers_nor_the_compiler(tmp_path: Path) -> None:
    folders = [
        make_llava(tmp_path / "llava"),
        make_qwen2_vl(tmp_path / "qwen2_vl"),
        make_text("phi3", tmp_path / "phi3"),
    ]
    command = [sys.executable, "-c", LIGHT, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
