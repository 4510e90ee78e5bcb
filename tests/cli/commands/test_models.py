"""``sensorium models``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sensorium.cli.main import build_parser, main
from sensorium.models.embedder import PUBLISHED
from sensorium.models.families.hf import EXAMPLES
from sensorium.models.registry import FAMILIES, resolve


def test_every_family_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(FAMILIES) + len(PUBLISHED) + len(EXAMPLES)
    for family, line in zip(FAMILIES, lines[1:], strict=False):
        assert line.startswith(family.name)
        assert line.endswith(family.checkpoint)
        assert family.architectures[0] in line
    for (name, checkpoint, architecture), line in zip(
        PUBLISHED, lines[1 + len(FAMILIES) : -len(EXAMPLES)], strict=True
    ):
        assert line.startswith(name)
        assert line.endswith(checkpoint)
        assert f"  embeddings  {architecture}" in line
    for (name, checkpoint, architecture, _), line in zip(
        EXAMPLES, lines[-len(EXAMPLES) :], strict=True
    ):
        assert line.startswith(f"{name} (through transformers")
        assert line.endswith(checkpoint)
        assert architecture in line


def test_what_runs_through_transformers_has_no_family_of_its_own() -> None:
    native = {name for family in FAMILIES for name in family.architectures}
    for _, _, architecture, _ in EXAMPLES:
        assert architecture not in native
        assert resolve({"architectures": [architecture]}).architectures == (architecture,)


def test_as_objects(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "--json"]) == 0
    found = {row["family"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["Qwen2-VL"]["takes"] == ["text", "image", "video"]
    assert found["Llama"]["takes"] == ["text"]
    assert found["Llama"]["makes"] == "text"
    assert found["VLM2Vec"] == {
        "family": "VLM2Vec",
        "takes": ["text", "image"],
        "makes": "embeddings",
        "architectures": ["Phi3VForCausalLM"],
        "checkpoint": "TIGER-Lab/VLM2Vec-Full",
    }


@pytest.mark.parametrize("page", ["README.md", "docs/models.md"])
def test_a_page_lists_the_same_families(page: str) -> None:
    text = (Path(__file__).parents[3] / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| [^|]+/[^|]+ \| (text[^|]*) \|$", text, re.MULTILINE)
    listed = {
        name: takes.replace("images", "image").split(", ")
        for names, takes in rows
        for name in names.split(", ")
    }
    assert listed == {family.name: ["text", *family.modalities] for family in FAMILIES}


@pytest.mark.parametrize("page", ["README.md", "docs/embedding_models.md"])
def test_a_page_lists_the_same_embedding_models(page: str) -> None:
    text = (Path(__file__).parents[3] / page).read_text(encoding="utf-8")
    _, _, table = text.partition("| embedding model |")
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+/[^|]+) \| ([^|]*) \|$", table, re.MULTILINE)
    assert [(name, checkpoint) for name, checkpoint, _ in rows] == [
        (name, checkpoint) for name, checkpoint, _ in PUBLISHED
    ]


def test_one_model_takes_the_flags_of_info() -> None:
    flags = ["some/model", "--kv-cache-dtype", "int8", "--port", "9000", "--json"]
    found, expected = (vars(build_parser().parse_args([c, *flags])) for c in ("models", "info"))
    assert found.pop("handler") != expected.pop("handler")
    assert found == expected


@pytest.mark.parametrize("flags", [["--dtype", "float32"], ["--model", "some/model"]])
def test_flags_of_a_model_need_one(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", *flags]) == 2
    assert "name it, as in sensorium models demo" in capsys.readouterr().err
