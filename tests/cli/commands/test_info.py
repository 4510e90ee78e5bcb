"""sensorium info."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import sensorium
from sensorium.cli.main import main
from sensorium.kernels.cpu.linear import levels, table
from sensorium.models.gguf import folder as folders
from tests.checkpoints import make_text
from tests.checkpoints.gguf import write_gguf


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


def without_memory(shown: str) -> list[str]:
    """The lines that do not change with what other programs take."""
    return [line for line in shown.splitlines() if not line.startswith("memory here")]


def test_what_a_file_is_and_needs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "cache_root", lambda: tmp_path / "caches")
    source = make_text("llama", tmp_path / "source")
    write_gguf(source, tmp_path / "model.gguf", "Q4_1")
    assert main(["info", str(tmp_path / "model.gguf")]) == 0
    shown = capsys.readouterr().out
    assert "GGUF version 3, llama: Q4_1" in shown
    assert "1 file of weights" in shown
    assert "to download     nothing: " in shown
    assert main(["models", str(tmp_path / "model.gguf")]) == 0
    assert without_memory(capsys.readouterr().out) == without_memory(shown)
    assert main(["info", str(source), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["format"] == "safetensors, float32"
    assert found["download"] == 0
    assert (
        main(["info", str(tmp_path / "model.gguf"), "--mmproj", str(tmp_path / "model.gguf")]) == 2
    )
    assert "no encoder of images" in capsys.readouterr().err
