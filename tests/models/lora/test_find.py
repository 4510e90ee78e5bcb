"""Adapters of the hub: their configuration first, before the weights of a model, and once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from sensorium.config import engine_config
from sensorium.engine.executor import build_engine
from sensorium.errors import ConfigError
from sensorium.models.lora.find import WEIGHTS, find_adapter
from tests import checkpoints
from tests.checkpoints.adapters import make_adapter
from tests.cli.commands.fake_hub import COMMIT, FakeHub

CONFIG = "adapter_config.json"


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hub")
    base = checkpoints.make_text("llama", folder / "model")
    return {
        "some/model": base,
        "some/brief": make_adapter(folder / "brief", base),
        "some/late": make_adapter(folder / "late", base, modules_to_save=["lm_head"]),
    }


@pytest.fixture
def hub(repositories: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with FakeHub(repositories) as made:
        for name, value in {
            "ENDPOINT": made.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": made.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
        }.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield made


def test_an_adapter_is_downloaded_once_and_found_offline(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = find_adapter("some/brief", str(tmp_path))
    assert hub.downloaded == [CONFIG, WEIGHTS]
    assert folder == tmp_path / "models--some--brief" / "snapshots" / COMMIT
    assert (folder / WEIGHTS).is_file()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert find_adapter("some/brief", str(tmp_path)) == folder
    with pytest.raises(ConfigError, match=r"^'some/other': .*HF_HUB_OFFLINE is unset") as caught:
        find_adapter("some/other", str(tmp_path))
    assert caught.value.param == "lora_modules"


def test_weights_of_an_adapter_that_cannot_be_used_are_not_downloaded(
    hub: FakeHub, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="modules_to_save is set"):
        find_adapter("some/late", str(tmp_path))
    assert hub.downloaded == [CONFIG]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("some/late", "Adapter 'x': adapter_config.json of the adapter: modules_to_save is set"),
        ("some/none", "Adapter 'x': 'some/none': .*the Hugging Face hub has no such model"),
        ("/no/such/folder", "Adapter 'x': There is no folder '/no/such/folder'"),
        ("{empty}", "Adapter 'x': The adapter's folder has no adapter_config.json"),
    ],
)
def test_adapters_are_looked_at_before_a_model_is_downloaded(
    hub: FakeHub, tmp_path: Path, path: str, words: str
) -> None:
    modules = [json.dumps({"name": "x", "path": path.format(empty=tmp_path)})]
    config = engine_config(
        model="some/model",
        enable_lora=True,
        lora_modules=modules,
        download_dir=str(tmp_path / "hub"),
    )
    with pytest.raises(ConfigError, match=words):
        build_engine(config)
    assert not {name for name in hub.downloaded if name.startswith("model")}
