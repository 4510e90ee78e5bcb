"""Values of generation_config.json that cannot be.

Ignored with a warning at start, never an error of a request.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from sensorium import LLM, SamplingParams
from sensorium.config import engine_config
from sensorium.engine.prompts.defaults import generation_values, sampling_defaults
from sensorium.models.interface import LoadedConfig, stop_token_ids
from tests.checkpoints import make_text
from tests.reliability.asking import log_of, serving, text

IMPOSSIBLE: list[tuple[str, Any]] = [
    ("top_p", 0),
    ("top_p", 1.5),
    ("top_p", "0.9"),
    ("repetition_penalty", 0),
    ("repetition_penalty", -1.2),
    ("temperature", "0.7"),
    ("temperature", -1),
    ("temperature", True),
    ("temperature", [0.7]),
    ("top_k", -5),
    ("top_k", 0.5),
    ("min_p", 2),
    ("max_new_tokens", 0),
    ("max_new_tokens", "20"),
]
SIZES = {"num_kv_blocks": 40, "block_size": 16, "max_model_len": 256}


def defaults(**values: Any) -> dict[str, Any]:
    return sampling_defaults(generation_values(values, engine_config(model="demo").model))


@pytest.mark.parametrize(("name", "value"), IMPOSSIBLE)
def test_a_value_that_cannot_be_is_ignored_with_a_warning(
    caplog: pytest.LogCaptureFixture, name: str, value: Any
) -> None:
    with caplog.at_level(logging.WARNING):
        found = defaults(**{"min_p": 0.25, "top_k": 7, name: value})
    expected = {"min_p": 0.25, "top_k": 7}
    expected.pop(name, None)
    assert found == expected
    SamplingParams(**found)
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"generation_config.json of the model: {name} must be")
    assert repr(value) in message
    assert message.endswith("The value is ignored.")


def test_values_that_can_be_are_kept_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    """Those that are published: null for none, whole numbers written as fractions, temperatures
    next to zero.
    """
    assert defaults(temperature=0.000001, top_p=0.001, top_k=None, repetition_penalty=1.05) == {
        "temperature": 0.000001,
        "top_p": 0.001,
        "repetition_penalty": 1.05,
    }
    assert defaults(top_k=50.0, max_new_tokens=2048, top_p=1) == {
        "top_k": 50,
        "max_tokens": 2048,
        "top_p": 1,
    }
    assert defaults(do_sample=False, temperature=0.6, top_p=0.9) == {"temperature": 0.0}
    assert not caplog.records


def test_an_ignored_temperature_does_not_hide_that_nothing_is_sampled() -> None:
    assert defaults(do_sample=False, temperature="0.7") == {"temperature": 0.0}


@pytest.mark.parametrize("value", ["x", ["x", None], -1, [[5]], 2.5, {}])
def test_end_tokens_that_are_no_ids_are_left_out(value: Any) -> None:
    assert stop_token_ids(
        LoadedConfig("", {"eos_token_id": 7}, {"eos_token_id": value}, {}, {})
    ) == (7,)


def spoilt(folder: Path) -> Path:
    make_text("llama", folder)
    path = folder / "generation_config.json"
    values = {"top_p": 0, "temperature": "0.7", "repetition_penalty": 0, "eos_token_id": ["x", -1]}
    path.write_text(json.dumps(values))
    return folder


def test_a_model_with_such_values_answers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), LLM(str(spoilt(tmp_path)), **SIZES) as llm:
        assert llm.get_default_sampling_params() == SamplingParams()
        [output] = llm.generate("Hello", use_tqdm=False)
        assert 1 <= len(output.outputs[0].token_ids) <= 16
    named = [r.getMessage() for r in caplog.records if "generation_config" in r.getMessage()]
    assert len(named) == 3


@pytest.mark.slow
def test_a_server_with_such_values_answers(tmp_path: Path) -> None:
    folder = spoilt(tmp_path / "model")
    options = ["--num-kv-blocks", "40", "--max-model-len", "256"]
    with serving(str(folder), tmp_path, options) as service:
        answer = service.ask(text("Hello"), temperature=None, max_tokens=3)
        assert answer.status == 200
        log = log_of(service)
    for name in ("top_p", "temperature", "repetition_penalty"):
        assert log.count(f"generation_config.json of the model: {name}") == 1
