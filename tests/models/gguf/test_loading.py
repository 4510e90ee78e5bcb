"""Models of GGUF files: names, rows, configuration and tokens are those of the checkpoint."""

from __future__ import annotations

import fcntl
import json
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sensorium.errors import ConfigError, UnsupportedModelError
from sensorium.models import loader
from sensorium.models.gguf import folder as folders
from sensorium.models.interface import Part
from sensorium.models.loading import checkpoint
from sensorium.models.loading.published.gguf import GgufWeights
from sensorium.text.chat import chat_template
from sensorium.text.tokenizer import Tokenizer
from tests.checkpoints import SENTENCES, make_text
from tests.checkpoints.gguf import K_KINDS, QUANTIZED, as_folder, write_gguf
from tests.checkpoints.hf import make_hf_text
from tests.models.harness import Harness, Reference

IDS = list(range(20, 44))
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of models among the test's own files."""
    monkeypatch.setattr(folders, "cache_root", lambda: tmp_path / "caches")


def logits_of(model: Path, dtype: str = "float32") -> torch.Tensor:
    harness = Harness(loader.load(str(model), device="cpu", dtype=dtype))
    return harness.prefill(harness.add(IDS))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_a_file_gives_the_tokens_of_its_checkpoint(tmp_path: Path, family: str) -> None:
    source = make_text(family, tmp_path / "source")
    path = tmp_path / "model.gguf"
    write_gguf(source, path, "F32")
    own, expected = (Harness(loader.load(str(model), device="cpu")) for model in (path, source))
    assert own.greedy(own.add(IDS), 16) == expected.greedy(expected.add(IDS), 16)
    assert own.model.dtype == torch.float32


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_gemma_runs_through_transformers(tmp_path: Path, family: str) -> None:
    source = make_hf_text(family, tmp_path / "source", head_dim=16, query_pre_attn_scalar=16)
    config = json.loads((source / "config.json").read_text())
    caps = {
        name: float(config[name])
        for name in ("attn_logit_softcapping", "final_logit_softcapping")
        if config.get(name)
    }
    window = {"attention__sliding_window": config["sliding_window"]}
    path = tmp_path / "model.gguf"
    write_gguf(source, path, "F32", **window, **caps)
    own = Harness(loader.load(str(path), device="cpu"))
    reference = Reference(source)
    expected = reference.logits(own.add(IDS))
    torch.testing.assert_close(own.prefill(own.add(IDS)), expected, rtol=1e-4, atol=1e-4)


def test_other_shapes_than_transformers_wants(tmp_path: Path) -> None:
    source = make_hf_text("gemma2", tmp_path / "source", head_dim=16, query_pre_attn_scalar=16)
    values = {"feed_forward_length": 48, "attention__sliding_window": 16}
    write_gguf(source, tmp_path / "model.gguf", "Q8_0", **values)
    with pytest.raises(ConfigError, match=r"have other shapes .*mlp\.down_proj"):
        loader.load(str(tmp_path / "model.gguf"), device="cpu")


@pytest.mark.parametrize("kind", [*QUANTIZED, *K_KINDS, "F16", "BF16"])
def test_weights_of_every_kind_are_the_files(tmp_path: Path, kind: str) -> None:
    """All rows are the package's numbers, in the checkpoint's order."""
    source = make_text("llama", tmp_path / "source", **WIDE)
    expected = write_gguf(source, tmp_path / "model.gguf", kind)
    weights = GgufWeights(tmp_path / "model.gguf")
    found = dict(weights.tensors(torch.float32))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=2e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q4_K", "Q6_K"])
def test_answers_of_quantized_files(tmp_path: Path, kind: str) -> None:
    """Weights kept in their groups, or repacked, answer as the dequantized ones in float32."""
    source = make_text("llama", tmp_path / "source", **WIDE)
    weights = write_gguf(source, tmp_path / "model.gguf", kind)
    whole = as_folder(source, tmp_path / "whole", weights)
    expected, found = logits_of(whole), logits_of(tmp_path / "model.gguf")
    error = (found - expected).norm() / expected.norm()
    assert error < 0.05, f"relative error {error:.4f}"


def test_the_tokenizer_is_that_of_the_checkpoint(tmp_path: Path) -> None:
    source = make_text("qwen2", tmp_path / "source")
    write_gguf(source, tmp_path / "model.gguf")
    own = Tokenizer.from_folder(checkpoint.find(str(tmp_path / "model.gguf")))
    expected = Tokenizer.from_folder(source)
    for text in (*SENTENCES, "<|im_start|>user\nhi<|im_end|>"):
        ids = expected.encode(text)
        assert own.encode(text) == ids
        assert own.decode(ids) == expected.decode(ids)
    assert own.eos_token_ids == (
        expected.token_id("<|im_end|>"),
        expected.token_id("<|endoftext|>"),
    )
    assert own.special_tokens["bos_token"] == "<s>"


def test_the_template_is_in_the_file(tmp_path: Path) -> None:
    source = make_text("llama", tmp_path / "source")
    write_gguf(source, tmp_path / "model.gguf")
    folder = checkpoint.find(str(tmp_path / "model.gguf"))
    template = chat_template.ChatTemplate.load(folder, Tokenizer.from_folder(folder))
    assert template.exists
    assert "<|im_start|>" in template.text


def test_a_folder_with_one_file_is_that_file(tmp_path: Path) -> None:
    source = make_text("llama", tmp_path / "source")
    folder = tmp_path / "folder"
    folder.mkdir()
    write_gguf(source, folder / "model-q8_0.gguf", "Q8_0")
    for name in ("mmproj-model.gguf", "model-mmproj-f16.gguf"):
        (folder / name).write_bytes(b"GGUF")
    found = checkpoint.find(str(folder))
    assert folders.file_of(found) == folder / "model-q8_0.gguf"
    assert checkpoint.find(str(folder / "model-q8_0.gguf")) == found
    assert checkpoint.is_local(str(folder / "model-q8_0.gguf"))
    (folder / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"2 GGUF files \(model-q8_0.gguf, other.gguf\)"):
        checkpoint.find(str(folder))


def test_a_changed_file_gets_another_folder(tmp_path: Path) -> None:
    source, path = make_text("llama", tmp_path / "source"), tmp_path / "model.gguf"
    write_gguf(source, path)
    first = checkpoint.find(str(path))
    assert checkpoint.find(str(path)) == first
    write_gguf(source, path, "Q8_0")
    assert checkpoint.find(str(path)) != first


def test_old_folders_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "MOST_FOLDERS", 2)
    monkeypatch.setattr(folders, "MOST_HELD", 1)
    source = make_text("llama", tmp_path / "source", num_hidden_layers=1)
    found = []
    for name in "abc":
        write_gguf(source, tmp_path / f"{name}.gguf", "Q8_0")
        found.append(checkpoint.find(str(tmp_path / f"{name}.gguf")))
    assert [path.is_dir() for path in found] == [False, True, True]


def test_no_other_folder_names_a_file(tmp_path: Path) -> None:
    """A downloaded folder must not make this process read any file of its choice."""
    (tmp_path / folders.MARK).write_text(json.dumps({"file": "/etc/passwd"}))
    assert folders.file_of(tmp_path) is None


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "model.safetensors"
    other.write_bytes(bytes(64))
    with pytest.raises(ConfigError, match="no GGUF file: give its folder"):
        checkpoint.find(str(other))
    other.rename(tmp_path / "model.gguf")
    with pytest.raises(ConfigError, match="does not begin with 'GGUF', so it is damaged"):
        checkpoint.find(str(tmp_path / "model.gguf"))
    with pytest.raises(ConfigError, match="no such folder or file"):
        checkpoint.find("absent.gguf")


CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "layers": ({"block_count": 3}, "block_count"),
    "heads": ({"attention__head_count": 2}, "attn_q.weight|attn_k.weight"),
    "hidden size": ({"embedding_length": 32}, "embedding_length"),
    "context": ({"context_length": 0}, "context_length"),
    "rotary": ({"rope__dimension_count": 6}, "rope.dimension_count"),
    "scaling": ({"rope__scaling__type": "new", "rope__scaling__factor": 2.0}, "linear and yarn"),
    "scalings": ({"rope__scaling__type": [1, 2]}, "rope.scaling.type is no text"),
    "experts": ({"expert_count": [1, 2]}, "mixture of experts"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_values_that_do_not_fit_are_named(tmp_path: Path, name: str) -> None:
    values, message = CHANGED[name]
    source = make_text("llama", tmp_path / "source")
    write_gguf(source, tmp_path / "model.gguf", **values)
    with pytest.raises(ConfigError, match=message):
        checkpoint.find(str(tmp_path / "model.gguf"))


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    source = make_text("llama", tmp_path / "source")
    write_gguf(source, tmp_path / "model.gguf", expert_count=8)
    with pytest.raises(UnsupportedModelError, match="mixture of experts"):
        checkpoint.find(str(tmp_path / "model.gguf"))


def test_sampling_defaults_are_in_the_file(tmp_path: Path) -> None:
    source = make_text("llama", tmp_path / "source")
    values = {"temp": 0.6, "top_k": 20, "top_p": 0.95, "penalty_repeat": 1.05, "min_p": "none"}
    write_gguf(
        source, tmp_path / "model.gguf", general={f"sampling.{k}": values[k] for k in values}
    )
    found = checkpoint.read(checkpoint.find(str(tmp_path / "model.gguf"))).generation
    del found["eos_token_id"]
    own = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.05}
    assert found == own


def test_llama3_factors_divide_frequencies(tmp_path: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    source = make_text("llama", tmp_path / "source", rope_scaling=scaling)
    write_gguf(source, tmp_path / "model.gguf")
    expected, found = logits_of(source), logits_of(tmp_path / "model.gguf")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_rows_of_heads_are_in_order(tmp_path: Path) -> None:
    source = make_text("llama", tmp_path / "source")
    expected = write_gguf(source, tmp_path / "model.gguf")
    weights = GgufWeights(tmp_path / "model.gguf", ((r"^model\.", ""),))
    name = "layers.0.self_attn.k_proj.weight"
    found = weights.read(Part(name, (32, 64)))
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, expected[f"model.{name}"])


def test_quantized_norms_are_numbers(tmp_path: Path) -> None:
    """No writer makes them, and a reader must not stumble over them."""
    source = make_text("llama", tmp_path / "source")
    write_gguf(source, tmp_path / "model.gguf", "Q8_0", norms="Q8_0")
    assert logits_of(tmp_path / "model.gguf").isfinite().all()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_1", "Q8_0", "Q4_K"])
def test_kept_weights_are_those_of_the_file(tmp_path: Path, kind: str) -> None:
    source = make_text("llama", tmp_path / "source", **WIDE)
    expected = write_gguf(source, tmp_path / "model.gguf", kind)
    model: Any = loader.load(str(tmp_path / "model.gguf"), device="cpu", dtype="float32").model
    weight = model.decoder.layers[0].mlp.down.weight
    assert weight.format == ("int8" if kind in ("Q8_0", "Q5_1") else "int4") or not weight.has_rows
    if weight.has_rows:
        found = weight.rows(torch.arange(256))
        own = expected["model.layers.0.mlp.down_proj.weight"]
        torch.testing.assert_close(found, own, rtol=1e-3, atol=1e-3 if kind == "Q4_K" else 1e-6)


def test_parts_of_several_kinds_are_one_matrix(tmp_path: Path) -> None:
    """As in files of Q4_K_M, whose V is Q6_K."""
    source = make_text("llama", tmp_path / "source", **WIDE)
    others = {"attn_v": "Q6_K", "ffn_up": "F16"}
    weights = write_gguf(source, tmp_path / "model.gguf", "Q4_K", others=others)
    whole = as_folder(source, tmp_path / "whole", weights)
    expected, found = logits_of(whole), logits_of(tmp_path / "model.gguf")
    assert (found - expected).norm() / expected.norm() < 0.05


def test_plain_numbers_are_made_where_they_are_asked_for(tmp_path: Path) -> None:
    """Without integer products every kind gives the tokens of the dequantized checkpoint."""
    source = make_text("llama", tmp_path / "source", **WIDE)
    weights = write_gguf(source, tmp_path / "model.gguf", "Q5_K", others={"ffn": "Q3_K"})
    whole = as_folder(source, tmp_path / "whole", weights)
    numbers = dict(GgufWeights(tmp_path / "model.gguf").tensors(torch.float32))
    plain = as_folder(source, tmp_path / "plain", numbers)
    own, expected = (Harness(loader.load(str(model), device="cpu")) for model in (plain, whole))
    assert own.greedy(own.add(IDS), 16) == expected.greedy(expected.add(IDS), 16)


def config_of(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(checkpoint.find(str(path)), "config.json").read_text())
    return found


def test_a_factor_without_a_type_is_linear(tmp_path: Path) -> None:
    """As llama.cpp has it, also for the name that early files use."""
    source = make_text("llama", tmp_path / "source")
    forms: list[dict[str, Any]] = [
        {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0},
        {"rope__scaling__factor": 4.0},
        {"rope__scale_linear": 4.0},
    ]
    found = []
    for number, values in enumerate(forms):
        write_gguf(source, tmp_path / f"{number}.gguf", **values)
        found.append(config_of(tmp_path / f"{number}.gguf")["rope_scaling"])
    assert (found[0]["rope_type"], found[0]["factor"]) == ("linear", 4.0)
    assert found[1:] == found[:1] * 2


@pytest.mark.parametrize(
    ("family", "caps"), [("gemma2", (50.0, 30.0)), ("gemma3_text", (None, None))]
)
def test_caps_that_a_file_does_not_state(
    tmp_path: Path, family: str, caps: tuple[float | None, ...]
) -> None:
    source = make_hf_text(family, tmp_path / "source", head_dim=16, query_pre_attn_scalar=16)
    write_gguf(source, tmp_path / "model.gguf", attention__sliding_window=16)
    found = config_of(tmp_path / "model.gguf")
    assert (found["attn_logit_softcapping"], found["final_logit_softcapping"]) == caps


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_gguf(make_text("llama", tmp_path / "source", num_hidden_layers=1), tmp_path / "own.gguf")
    return tmp_path / "own.gguf"


def test_folders_in_use_stay(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process, here a lock of its own, uses the first of three."""
    monkeypatch.setattr(folders, "MOST_FOLDERS", 2)
    monkeypatch.setattr(folders, "MOST_HELD", 1)
    names = [tmp_path / f"{name}.gguf" for name in "abc"]
    found = []
    for name in names:
        shutil.copy(model, name)
    found.append(checkpoint.find(str(names[0])))
    with (found[0] / folders.MARK).open("rb") as mark:
        fcntl.flock(mark, fcntl.LOCK_SH)
        found += [checkpoint.find(str(name)) for name in names[1:]]
        assert [path.is_dir() for path in found] == [True, False, True]
    checkpoint.find(str(names[1]))
    assert [path.is_dir() for path in found] == [False, True, True]


def test_this_process_holds_its_folder(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "MOST_FOLDERS", 0)
    found = checkpoint.find(str(model))
    shutil.copy(model, tmp_path / "other.gguf")
    checkpoint.find(str(tmp_path / "other.gguf"))
    assert folders.file_of(found) == model


def test_what_remains_of_a_folder_is_replaced(model: Path) -> None:
    found = checkpoint.find(str(model))
    (found / folders.MARK).unlink()
    assert checkpoint.find(str(model)) == found
    assert folders.file_of(found) == model
    assert [path.name for path in found.parent.iterdir()] == [found.name]


def test_a_disk_that_takes_no_more(model: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(ConfigError, match="free some space") as caught:
            checkpoint.find(str(model))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.param == "model"
    assert not list((tmp_path / "caches").rglob("*.json"))
    assert folders.file_of(checkpoint.find(str(model))) == model
