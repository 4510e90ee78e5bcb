"""``sensorium generate``: what it prints."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace
from typing import Any

import pytest

from sensorium.cli.main import main
from sensorium.params import SamplingParams

ATTACK = "a\x1b]0;owned\x07\x9b31mé\nb"


class Model:
    """Answers with what would set the title of a terminal."""

    def __init__(self, **_: Any) -> None: ...

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None: ...

    def get_default_sampling_params(self) -> SamplingParams:
        return SamplingParams()

    def chat(self, *_: Any, **__: Any) -> list[Any]:
        sample = SimpleNamespace(text=ATTACK, finish_reason="stop", stop_reason=None, token_ids=[1])
        details = {"prompt_token_ids": [1], "num_cached_tokens": 0, "num_item_tokens": 0}
        return [SimpleNamespace(outputs=[sample], metrics=None, **details)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sensorium.llm.LLM", Model)


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_an_answer_does_not_control_the_terminal(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    assert main(["generate", "Hi", *flags]) == 0
    shown = screen.getvalue()
    assert not set(shown) & set("\x1b\x07\x9b")
    assert "owned" in shown
    assert "é" in shown


def test_a_file_gets_the_answer_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "Hi"]) == 0
    assert capsys.readouterr().out == f"{ATTACK}\n"
    assert main(["generate", "Hi", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["outputs"][0]["text"] == ATTACK
