"""A null in config.json is as good as nothing.

The value of the reference implementation's class holds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sensorium.errors import ConfigError
from sensorium.models.configs import DEFAULTS, read_text_config
from sensorium.models.families.llava.config import read_llava_config
from sensorium.models.families.llava_onevision.config import read_llava_onevision_config
from sensorium.models.families.qwen2_5_vl.config import read_qwen2_5_vl_config
from sensorium.models.families.qwen2_vl.config import read_qwen2_vl_config
from sensorium.models.families.qwen3_vl.config import read_qwen3_vl_config
from sensorium.models.families.ultravox.config import read_ultravox_config
from sensorium.models.loading import checkpoint
from tests.checkpoints import (
    make_llava,
    make_llava_onevision,
    make_qwen2_5_vl,
    make_qwen2_vl,
    make_qwen3_vl,
    make_ultravox,
)

TEXT = {"hidden_size": 4096, "num_attention_heads": 32}


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_a_null_base_of_rotary_positions(model_type: str) -> None:
    config = TEXT | {"model_type": model_type, "rope_theta": None}
    assert read_text_config(config).rope_theta == DEFAULTS[model_type]["rope_theta"]
    inside = config | {"rope_parameters": {"rope_type": "default", "rope_theta": None}}
    assert read_text_config(inside).rope_theta == DEFAULTS[model_type]["rope_theta"]


@pytest.mark.parametrize("model_type", DEFAULTS)
def test_every_null_of_a_decoder_is_as_good_as_nothing(model_type: str) -> None:
    names = set(DEFAULTS[model_type]) - {"sliding_window"} | {"max_window_layers", "rope_scaling"}
    plain = read_text_config(TEXT | {"model_type": model_type})
    for name in sorted(names - set(TEXT)):
        assert read_text_config(TEXT | {"model_type": model_type, name: None}) == plain, name


def test_a_null_window_means_none() -> None:
    config = TEXT | {"model_type": "mistral", "num_key_value_heads": 8}
    assert set(read_text_config(config).windows) == {4096}
    assert set(read_text_config(config | {"sliding_window": None}).windows) == {None}


FAMILIES: dict[str, tuple[Callable[..., Path], Callable[[Any], Any]]] = {
    "llava": (make_llava, read_llava_config),
    "llava_onevision": (make_llava_onevision, read_llava_onevision_config),
    "qwen2_vl": (make_qwen2_vl, read_qwen2_vl_config),
    "qwen2_5_vl": (make_qwen2_5_vl, read_qwen2_5_vl_config),
    "qwen3_vl": (make_qwen3_vl, read_qwen3_vl_config),
}


def places(config: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Every place of a value: the mapping that holds it, and its name there."""
    for holder in (config, config.get("text_config"), config.get("vision_config")):
        for name in tuple(holder or ()):
            if name not in ("text_config", "vision_config"):
                yield holder, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_null_anywhere_reads_as_a_value_left_out(tmp_path: Path, family: str) -> None:
    make, read = FAMILIES[family]
    config = json.loads((make(tmp_path) / "config.json").read_text())

    def outcome() -> Any:
        try:
            return read(config)
        except ConfigError as error:
            return error.message

    for holder, name in places(config):
        if name == "sliding_window":
            continue
        value = holder[name]
        holder[name] = None
        with_null = outcome()
        del holder[name]
        without = outcome()
        holder[name] = value
        assert with_null == without, name


def test_nulls_of_sounds(tmp_path: Path) -> None:
    loaded = checkpoint.read(make_ultravox(tmp_path, layout="embedded"))
    plain = read_ultravox_config(loaded)
    for name in ("stack_factor", "projector_act", "audio_latency_block_size"):
        old = loaded.config.get(name)
        loaded.config[name] = None
        assert read_ultravox_config(loaded) == plain
        loaded.config[name] = old
