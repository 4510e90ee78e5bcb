"""The offline examples run as they stand, with small checkpoints in place of the published ones."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from sensorium import RequestOutput
from tests.checkpoints import (
    make_llava,
    make_minicpmv,
    make_phi3_v,
    make_qwen2_5_vl,
    make_qwen2_vl,
    make_ultravox,
)

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> ModuleType:
    """An example as a module."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def checked(outputs: list[RequestOutput], num_prompts: int = 1) -> list[RequestOutput]:
    """All prompts were answered, each with tokens of its own."""
    assert len(outputs) == num_prompts
    assert all(output.finished and output.outputs[0].token_ids for output in outputs)
    return outputs


def long_phi3_v(folder: Path) -> Path:
    """With a context as long as the example asks for."""
    return make_phi3_v(folder, max_position_embeddings=4096)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Callable[[Path], Path]], str]:
    made: dict[str, str] = {}

    def folder(build: Callable[[Path], Path]) -> str:
        name = build.__name__
        if name not in made:
            made[name] = str(build(tmp_path_factory.mktemp(name)))
        return made[name]

    return folder


@pytest.mark.parametrize("name", ["one_image", "batch", "chat", "background_color"])
def test_images_of_llava(folders: Callable[..., str], name: str) -> None:
    outputs = example("images_offline").EXAMPLES[name](folders(make_llava))
    checked(outputs, 2 if name in ("batch", "chat") else 1)
    assert all(len(output.prompt_token_ids) > 16 for output in outputs)


def test_frames_as_images(folders: Callable[..., str]) -> None:
    checked(example("images_offline").frames_as_images(folders(make_qwen2_vl)))


@pytest.mark.parametrize("name", ["llava", "llava_chat"])
def test_embeddings_of_llava(folders: Callable[..., str], tmp_path: Path, name: str) -> None:
    torch.save(torch.randn(1, 16, 64), tmp_path / "image.pt")
    run = example("embeddings_offline").EXAMPLES[name]
    checked(run(str(tmp_path / "image.pt"), folders(make_llava)))


def test_embeddings_of_qwen2_vl(folders: Callable[..., str], tmp_path: Path) -> None:
    saved = {"image_embeds": torch.randn(6, 64), "image_grid_thw": torch.tensor([[1, 4, 6]])}
    torch.save(saved, tmp_path / "image.pt")
    file = str(tmp_path / "image.pt")
    checked(example("embeddings_offline").qwen2_vl(file, folders(make_qwen2_vl)))


def test_several_images(folders: Callable[..., str]) -> None:
    [output] = checked(example("images_offline").several_images(folders(long_phi3_v)))
    assert output.prompt is not None
    assert "<|image_2|>" in output.prompt


def test_embeddings_of_minicpmv(folders: Callable[..., str], tmp_path: Path) -> None:
    folder = folders(make_minicpmv)
    config = json.loads((Path(folder) / "config.json").read_text())
    embeds = torch.randn(1, config["query_num"], config["hidden_size"])
    torch.save({"image_embeds": embeds, "image_sizes": [[28, 28]]}, tmp_path / "image.pt")
    checked(example("embeddings_offline").minicpmv(str(tmp_path / "image.pt"), folder))


@pytest.mark.parametrize("name", ["one_audio", "two_audios", "chat"])
def test_sounds(folders: Callable[..., str], name: str) -> None:
    checked(example("audio_offline").EXAMPLES[name](folders(make_ultravox)))


@pytest.mark.parametrize("name", ["array", "tensor_with_metadata", "images", "chat"])
def test_videos(folders: Callable[..., str], name: str) -> None:
    checked(example("videos_offline").EXAMPLES[name](folders(make_qwen2_5_vl)))


def test_an_event_loop(folders: Callable[..., str]) -> None:
    texts = asyncio.run(example("async_offline").main(folders(make_qwen2_vl)))
    assert len(texts) == 3
    assert all(texts)


def test_many_questions(
    folders: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = tmp_path / "questions.txt"
    questions.write_text("".join(f"What is {i}?\n" for i in range(20)))
    example("many_offline").main(str(questions), folders(make_qwen2_vl))
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(answer["line"] for answer in answers) == list(range(20))
    assert all(answer["answer"] for answer in answers)
