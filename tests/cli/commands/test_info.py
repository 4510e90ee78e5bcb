"""sensorium info."""

from __future__ import annotations

import json
import os

import pytest

import sensorium
from sensorium.cli.main import main
from sensorium.kernels.cpu.linear import levels, table


def test_as_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["sensorium"] == sensorium.__version__
    assert found["cores"]["allowed here"].startswith(f"{len(os.sched_getaffinity(0))} (")
    assert found["cores"]["quota of CPU time"]
    assert found["would be used"]["device"] in ("cpu", "cuda")
    assert found["linear layers"]["CPU level"] == levels.level()
    assert found["linear layers"]["bfloat16"] == table.choose("bfloat16")


def test_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert f"sensorium     {sensorium.__version__}" in shown
    assert "would be used" in shown
