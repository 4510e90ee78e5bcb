"""Which files of a folder or repository are the checkpoint.

``model.safetensors``, else its index, nothing else.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file

from sensorium.errors import ConfigError
from sensorium.models import loader
from sensorium.models.loading import checkpoint
from sensorium.models.loading.weight_files import INDEX, SINGLE, weight_files
from tests.checkpoints import make_llava, make_text, make_ultravox
from tests.checkpoints.hf import make_hf_text
from tests.models.harness import Harness

IDS = list(range(30, 50))
ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "someone/base", "r": 8}


def logits(folder: Path) -> torch.Tensor:
    harness = Harness(loader.load(str(folder), device="cpu"))
    return harness.prefill(harness.add(IDS))


def zeros(path: Path, to: Path) -> None:
    """A copy of a file of weights in which all are zero."""
    save_file({n: torch.zeros_like(t) for n, t in load_file(path).items()}, to)


@pytest.mark.parametrize("name", ["ema.safetensors", "a.safetensors", "old/model.safetensors"])
def test_another_copy_of_the_weights_does_not_count(tmp_path: Path, name: str) -> None:
    folder = make_text("qwen2", tmp_path)
    expected = logits(folder)
    (folder / name).parent.mkdir(exist_ok=True)
    zeros(folder / SINGLE, folder / name)
    assert torch.equal(logits(folder), expected)


@pytest.mark.parametrize("sharded", [False, True])
def test_what_trainers_leave_beside_a_model_does_not_count(tmp_path: Path, sharded: bool) -> None:
    folder = make_text("llama", tmp_path, sharded=sharded)
    expected = logits(folder)
    lora = {"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(8, 64)}
    save_file(lora, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    save_file({"state.0.exp_avg": torch.ones(3)}, folder / "optimizer.safetensors")
    save_file({"tok_embeddings.weight": torch.ones(2)}, folder / "consolidated.safetensors")
    for other in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / other).write_bytes(b"not read")
    assert torch.equal(logits(folder), expected)


def test_what_trainers_leave_beside_a_model_of_transformers(tmp_path: Path) -> None:
    folder = make_hf_text("gemma2", tmp_path)
    expected = logits(folder)
    zeros(folder / SINGLE, folder / "ema.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    save_file({"x.lora_A.weight": torch.ones(8, 64)}, folder / "adapter_model.safetensors")
    assert torch.equal(logits(folder), expected)


def test_the_single_file_wins_over_an_old_index_with_a_warning_that_names_both(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_text("llama", tmp_path / "new", seed=1)
    expected = logits(folder)
    old = make_text("llama", tmp_path / "old", seed=2, sharded=True)
    for file in old.glob("model*"):
        shutil.copy(file, folder)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(logits(folder), expected)
    [message] = [r.getMessage() for r in caplog.records if INDEX in r.getMessage()]
    assert f"has {SINGLE}, and {INDEX} with 3 files (model-00001-of-00003.safetensors" in message


def test_an_index_of_the_single_file_or_of_deleted_shards_needs_no_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_text("llama", tmp_path)
    for file in (SINGLE, "model-00001-of-00001.safetensors"):
        index = {"weight_map": {"model.norm.weight": file}}
        (folder / INDEX).write_text(json.dumps(index))
        assert weight_files(folder) == [folder / SINGLE]
    assert not caplog.records


def test_without_single_file_and_index_the_others_are_named(tmp_path: Path) -> None:
    folder = make_text("llama", tmp_path)
    (folder / SINGLE).rename(folder / "checkpoint.safetensors")
    with pytest.raises(ConfigError, match=r"neither .* \(checkpoint\.safetensors\) are not loaded"):
        logits(folder)


def test_a_folder_with_an_adapter_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(ADAPTER))
    with pytest.raises(ConfigError, match=r"an adapter .*Merge it into .*'someone/base'"):
        loader.read_config(str(tmp_path))


class Hub:
    """Stands for a repository: its files appear in a folder as patterns ask for them, as the
    hub's client does it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, repository: Path, cache: Path) -> None:
        self.repository, self.folder = repository, cache / "snapshots" / ("a1" * 20)
        self.fetched: list[str] = []
        self.revisions: list[str | None] = []
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.download)

    def download(self, name: str, **options: Any) -> str:
        assert name == "some/model"
        if not options.get("local_files_only"):
            self.revisions.append(options["revision"])
        files = sorted(str(p.relative_to(self.repository)) for p in self.repository.rglob("*.*"))
        for file in filter_repo_objects(
            files,
            allow_patterns=options["allow_patterns"],
            ignore_patterns=options["ignore_patterns"],
        ):
            target = self.folder / file
            if not target.exists():
                self.fetched.append(file)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.repository / file, target)
        return str(self.folder)

    @property
    def weights(self) -> list[str]:
        return [file for file in self.fetched if file.endswith(".safetensors")]


def repository(folder: Path, **options: Any) -> Path:
    """A text model with what else lies in repositories."""
    make_text("llama", folder, **options)
    for name in ("adapter_model", "consolidated", "original/model", "onnx/model", "2_Dense/model"):
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file({"x": torch.ones(2)}, path)
    for name in ("1_Pooling/config.json", "onnx/config.json", "original/params.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("{}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    return folder


def test_the_configuration_needs_no_weights(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub = Hub(monkeypatch, repository(tmp_path / "repository"), tmp_path)
    loader.read_config("some/model", revision="v1")
    loader.load("some/model", device="cpu", load_format="dummy")
    assert not hub.weights
    others = {file for file in hub.fetched if "/" in file}
    assert others == {"1_Pooling/config.json", "additional_chat_templates/tool_use.jinja"}
    assert hub.revisions == ["v1", None]


@pytest.mark.parametrize("sharded", [False, True])
def test_of_the_weights_only_the_checkpoint_is_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sharded: bool
) -> None:
    hub = Hub(monkeypatch, repository(tmp_path / "repository", sharded=sharded), tmp_path)
    loader.load("some/model", device="cpu")
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert hub.weights == (shards if sharded else [SINGLE])
    # The weights are those that the configuration belongs to, also if it is changed in between.
    assert hub.revisions == [None, *["a1" * 20] * (1 + sharded)]


def test_where_a_repository_has_both_one_is_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = repository(tmp_path / "repository", sharded=True)
    make_text("llama", folder)
    hub = Hub(monkeypatch, folder, tmp_path)
    loader.load("some/model", device="cpu")
    assert hub.weights == [SINGLE]


def test_a_repository_without_such_files_is_told_from_a_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = make_text("llama", tmp_path / "repository")
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    hub = Hub(monkeypatch, folder, tmp_path)
    with pytest.raises(ConfigError, match=r"repository .* no safetensors files.*HF_HUB_OFFLINE"):
        loader.load("some/model", device="cpu")
    assert "pytorch_model.bin" not in hub.fetched


def test_an_index_may_name_the_single_file_among_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = repository(tmp_path / "repository", sharded=True)
    (folder / "model-00001-of-00003.safetensors").rename(folder / SINGLE)
    index = (folder / INDEX).read_text()
    (folder / INDEX).write_text(index.replace("model-00001-of-00003.safetensors", SINGLE))
    hub = Hub(monkeypatch, folder, tmp_path)
    for _ in range(2):  # the second time with the first file there, as after an interruption
        loader.load("some/model", device="cpu")
        shards = [f"model-0000{i}-of-00003.safetensors" for i in (2, 3)]
        assert sorted(hub.weights) == [*shards, SINGLE]
        (hub.folder / shards[1]).unlink()
        hub.fetched.remove(shards[1])


@pytest.mark.parametrize("make", [make_llava, make_ultravox])
def test_other_families_load_from_the_same_files(tmp_path: Path, make: Any) -> None:
    folder = make(tmp_path)
    expected = logits(folder)
    zeros(folder / SINGLE, folder / "ema.safetensors")
    for part in ("text", "audio"):
        if (folder / part / SINGLE).is_file():
            zeros(folder / part / SINGLE, folder / part / "ema.safetensors")
    assert torch.equal(logits(folder), expected)


def test_patterns_of_the_hub_are_those_of_its_client() -> None:
    files = ["config.json", "adapters/a.json", "openvino/b.json", "1_Pooling/config.json"]
    found = filter_repo_objects(
        files,
        allow_patterns=list(checkpoint.TEXT_FILES),
        ignore_patterns=list(checkpoint.NOT_NEEDED),
    )
    assert set(found) >= {"config.json", "1_Pooling/config.json"}
    assert "openvino/b.json" not in set(found)
