"""``sensorium models``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sensorium.cli.main import main
from sensorium.models.registry import FAMILIES


def test_every_family_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(FAMILIES)
    for family, line in zip(FAMILIES, lines[1:], strict=True):
        assert line.startswith(family.name)
        assert line.endswith(family.checkpoint)
        assert family.architectures[0] in line


def test_as_objects(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    found = {row["family"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["Qwen2-VL"]["takes"] == ["text", "image"]
    assert found["Llama"]["takes"] == ["text"]


def test_the_readme_lists_the_same_families() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| [^|]+/[^|]+ \| (text[^|]*) \|$", text, re.MULTILINE)
    listed = {
        name: takes.replace("images", "image").split(", ")
        for names, takes in rows
        for name in names.split(", ")
    }
    assert listed == {family.name: ["text", *family.modalities] for family in FAMILIES}
