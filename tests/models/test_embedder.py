"""Which checkpoints make vectors, what of them is fetched, and what their files may say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sensorium.errors import ConfigError
from sensorium.models.embedder import PUBLISHED, Embedder, embedder_of
from sensorium.models.loading import checkpoint
from sensorium.models.registry import resolve
from tests.checkpoints.embedder import write_modules

STEPS = ("Transformer", "Pooling", "Normalize")


def config(**values: Any) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        **values,
    }


def found(folder: Path, runner: str = "auto", **values: Any) -> Embedder | None:
    (folder / "config.json").write_text(json.dumps(config(**values)))
    loaded = checkpoint.read(folder)
    return embedder_of(loaded, resolve(loaded.config), runner)


def test_the_runner_decides_unless_it_is_auto(tmp_path: Path) -> None:
    assert found(tmp_path) is None
    assert found(tmp_path, "pooling") == Embedder(64)
    assert found(tmp_path, architectures=["Qwen3Model"]) == Embedder(64)
    assert found(tmp_path, "generate", architectures=["Qwen3Model"]) is None
    write_modules(tmp_path, STEPS, "lasttoken")
    assert found(tmp_path) == Embedder(64)
    assert found(tmp_path, "generate") is None
    write_modules(tmp_path, STEPS[:2], "lasttoken")
    assert found(tmp_path) == Embedder(64, normalize=False)


def test_sizes_of_matryoshka_models(tmp_path: Path) -> None:
    cut = found(tmp_path, "pooling", is_matryoshka=True)
    assert cut == Embedder(64, matryoshka=True)
    listed = found(tmp_path, "pooling", matryoshka_dimensions=[32, 8])
    assert listed == Embedder(64, matryoshka=True, sizes=(8, 32))
    for wrong in ([0], ["8"], [True], 8):
        with pytest.raises(ConfigError, match="matryoshka_dimensions must be a list"):
            found(tmp_path, "pooling", matryoshka_dimensions=wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling_mode": "lasttoken"}, None),
        ({"pooling_mode": "mean"}, "pools by mean;"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_cls_token": True}, "cls_token, lasttoken"),
        ({"pooling_mode_lasttoken": False}, "an unknown rule"),
        ([], "are not a JSON object"),
    ],
)
def test_settings_of_pooling(tmp_path: Path, settings: Any, message: str | None) -> None:
    write_modules(tmp_path, STEPS, "lasttoken")
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    if message is None:
        assert found(tmp_path) == Embedder(64)
        return
    with pytest.raises(ConfigError, match=message):
        found(tmp_path)
    assert found(tmp_path, "generate") is None


@pytest.mark.parametrize("text", ["{", '{"a": 1}', "[5]"])
def test_damaged_lists_of_modules(tmp_path: Path, text: str) -> None:
    (tmp_path / "modules.json").write_text(text)
    with pytest.raises(ConfigError, match=r"modules\.json of the model"):
        found(tmp_path)


def test_missing_settings_of_pooling(tmp_path: Path) -> None:
    write_modules(tmp_path, STEPS, "lasttoken")
    (tmp_path / "1_Pooling" / "config.json").unlink()
    with pytest.raises(ConfigError, match="cannot be read: FileNotFoundError"):
        found(tmp_path)


def test_the_models_that_the_docs_name_are_of_known_architectures() -> None:
    for _, _, architecture in PUBLISHED:
        family = resolve({"architectures": [architecture]})
        assert architecture in (*family.architectures, *family.embedders)
