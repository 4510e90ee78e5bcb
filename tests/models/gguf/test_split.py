"""GGUF files in several parts."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from sensorium.config import ModelConfig
from sensorium.errors import ConfigError
from sensorium.models import hub_gguf, loader
from sensorium.models.gguf import folder as folders
from sensorium.models.gguf import split
from sensorium.models.loading import checkpoint
from sensorium.models.loading.published.gguf import GgufWeights
from tests.checkpoints import make_text
from tests.checkpoints.gguf import write_gguf
from tests.models.gguf.raw import Raw, Tensor, string, value
from tests.models.harness import Harness

IDS = list(range(20, 44))


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of models among the test's own files."""
    monkeypatch.setattr(folders, "cache_root", lambda: tmp_path / "caches")


def test_parts_are_one_model(tmp_path: Path) -> None:
    source, folder = make_text("llama", tmp_path / "source"), tmp_path / "parts"
    folder.mkdir()
    write_gguf(source, folder / "model.gguf", per_part=8)
    parts = sorted(folder.iterdir())
    assert [path.name for path in parts] == split.part_names("model-00002-of-00003.gguf")
    own, expected = (Harness(loader.load(str(model), device="cpu")) for model in (folder, source))
    assert own.greedy(own.add(IDS), 8) == expected.greedy(expected.add(IDS), 8)
    found = checkpoint.find(str(parts[0]))
    assert folders.file_of(found) == parts[0]
    with pytest.raises(ConfigError, match=r"name its first, model-00001-of-00003\.gguf"):
        checkpoint.find(str(parts[1]))
    write_gguf(source, folder / "model.gguf", "Q8_0", per_part=8)
    assert checkpoint.find(str(folder)) != found
    parts[2].unlink()
    with pytest.raises(ConfigError, match=r"part model-00003-of-00003\.gguf is missing"):
        checkpoint.find(str(folder))
    parts[0].rename(folder / "renamed.gguf")
    with pytest.raises(ConfigError, match="one of 3 parts, and its name is not"):
        checkpoint.find(str(folder / "renamed.gguf"))


def numbers(place: int, count: int, tensors: int = 2) -> list[tuple[str | bytes, bytes]]:
    """The metadata of a part."""
    return [
        ("split.no", value(2, struct.pack("<H", place))),
        ("split.count", value(2, struct.pack("<H", count))),
        ("split.tensors.count", value(5, struct.pack("<i", tensors))),
    ]


def write_parts(folder: Path, *parts: Raw) -> Path:
    """Write parts under their names; returns the first."""
    for place, part in enumerate(parts, start=1):
        path = folder / f"model-{place:05}-of-{len(parts):05}.gguf"
        part.write(folder).rename(path)
    return folder / f"model-00001-of-{len(parts):05}.gguf"


WRONG: dict[str, tuple[Callable[[], tuple[Raw, Raw]], str]] = {
    "order": (
        lambda: (Raw(numbers(0, 2)), Raw(numbers(0, 2), [Tensor("b.weight")])),
        "does not say that it is part 2 of 2",
    ),
    "another number": (
        lambda: (Raw(numbers(0, 2)), Raw(numbers(1, 3), [Tensor("b.weight")])),
        "does not say that it is part 2 of 2",
    ),
    "no part": (
        lambda: (Raw(numbers(0, 2)), Raw((), [Tensor("b.weight")])),
        "does not say that it is part 2 of 2",
    ),
    "twice": (
        lambda: (Raw(numbers(0, 2)), Raw(numbers(1, 2))),
        "has the tensor 'a.weight', and so has a part before it",
    ),
    "number of tensors": (
        lambda: (Raw(numbers(0, 2, 3)), Raw(numbers(1, 2, 3), [Tensor("b.weight")])),
        "has 2 tensors in its parts, and says that it has 3",
    ),
    "many parts": (lambda: (Raw(numbers(0, 60_000)), Raw()), "one of 60000 parts"),
}


@pytest.mark.parametrize("name", WRONG)
def test_parts_that_do_not_belong_together(tmp_path: Path, name: str) -> None:
    make, message = WRONG[name]
    with pytest.raises(ConfigError, match=message):
        split.read(write_parts(tmp_path, *make()))


def test_tensors_are_in_their_parts(tmp_path: Path) -> None:
    parts = Raw(numbers(0, 2), []), Raw(numbers(1, 2, 1), [Tensor("b.weight")])
    with pytest.raises(ConfigError, match="says that it has 2"):
        split.read(write_parts(tmp_path, *parts))
    parts = Raw(numbers(0, 2, 1), []), Raw(numbers(1, 2, 1), [Tensor("b.weight")])
    found = split.read(write_parts(tmp_path, *parts))
    assert [path.name for path, _ in found.parts] == split.part_names(found.path.name)
    assert found.tensors["b.weight"].part == 1


def test_encoders_in_parts_are_refused(tmp_path: Path) -> None:
    """All ways to an encoder read one file, and say so."""
    model, name = tmp_path / "own.gguf", "some/model:own.gguf"
    write_gguf(make_text("llama", tmp_path / "source", num_hidden_layers=1), model, "Q8_0")
    kind = ("general.architecture", value(8, string("clip")))
    encoder = Raw([kind, *numbers(0, 2)]).write(tmp_path)
    ways: list[Callable[[], object]] = [
        lambda: checkpoint.find(str(model), mmproj=str(encoder)),
        lambda: GgufWeights(model, (), encoder),
        lambda: hub_gguf.encoder("some/model", ModelConfig(model=name, mmproj=str(encoder))),
    ]
    message = r"one of 2 parts, and an encoder \(mmproj\)"
    for way in ways:
        with pytest.raises(ConfigError, match=message) as caught:
            way()
        assert caught.value.param == "mmproj"


def test_another_part_than_the_first_is_refused_by_its_name() -> None:
    """Nothing is asked for: the hub cannot be reached here."""
    name = "q8/model-00002-of-00003.gguf"
    options = ModelConfig(model=f"some/model:{name}")
    ways: list[Callable[[], object]] = [
        lambda: checkpoint.find(options.model),
        lambda: hub_gguf.beginning("some/model", name, options),
    ]
    for way in ways:
        with pytest.raises(ConfigError, match=r"name its first, q8/model-00001-of-00003\.gguf"):
            way()


def test_names_that_are_no_parts() -> None:
    for name in ("a.gguf", "a-00000-of-00000.gguf", "a-00001-of-99999.gguf", "a-1-of-2.gguf"):
        assert split.part_names(name) == [name]
        assert split.is_first(name)
    assert split.part_names("q4/a-00002-of-00002.gguf")[0] == "q4/a-00001-of-00002.gguf"
    assert not split.is_first("a-00002-of-00002.gguf")
