"""``sensorium embed``: inputs from flags and files, lines out."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sensorium import LLM
from sensorium.cli.commands.embed import Input
from sensorium.cli.main import main
from tests import checkpoints

TEMPLATE = Path(__file__).parents[3] / "examples" / "templates" / "dse_qwen2_vl.jinja"
ROOM = {"num_kv_blocks": 100, "block_size": 16, "max_model_len": 300}
FLAGS = ("--num-kv-blocks", "100", "--block-size", "16", "--max-model-len", "300")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make_qwen2_vl(tmp_path_factory.mktemp("dse"))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(path)
    return path


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_texts_and_pictures(
    folder: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["embed", str(folder), *FLAGS, "--chat-template", str(TEMPLATE)]
    asked = ["--text", "How many", "--text", "birds?", "--image", str(picture)]
    assert main([*command, *asked]) == 0
    found = lines(capsys.readouterr().out)
    assert [one["index"] for one in found] == [0, 1, 2]
    assert [one.get("text") for one in found] == ["How many", "birds?", None]
    assert found[2]["images"] == [str(picture)]
    assert main([*command, *asked, "--together", "--normalize"]) == 0
    [together] = lines(capsys.readouterr().out)
    assert together["text"] == "How many birds?"
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": url}}
    with LLM(str(folder), runner="pooling", chat_template=str(TEMPLATE), **ROOM) as llm:
        message = {"role": "user", "content": [image]}
        both = {"role": "user", "content": [image, {"type": "text", "text": "How many birds?"}]}
        prompts = ["How many", "birds?", {"messages": [message]}, {"messages": [both]}]
        wanted = llm.embed(prompts, use_tqdm=False)
    for one, output in zip([*found, together], wanted, strict=True):
        np.testing.assert_allclose(one["embedding"], output.outputs.embedding, atol=1e-6)
        assert one["num_prompt_tokens"] == len(output.prompt_token_ids)


def test_a_file_in_and_a_file_out(
    folder: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = f'"a\u2028text"\n\n{{"text": "and", "images": ["{picture}"]}}\n'
    monkeypatch.setattr("sys.stdin", io.StringIO(given))
    out = tmp_path / "out.jsonl"
    cut = ["--dimensions", "8", "--hf-overrides", '{"is_matryoshka": true}', "--no-normalize"]
    assert main(["embed", str(folder), *FLAGS, *cut, "--input", "-", "-o", str(out)]) == 0
    found = [json.loads(line) for line in out.read_text().split("\n") if line]
    assert found[0]["text"] == "a\u2028text"
    assert [len(one["embedding"]) for one in found] == [8, 8]
    assert found[1]["images"] == [str(picture)]
    assert all(abs(np.linalg.norm(one["embedding"]) - 1) > 1e-3 for one in found)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "nothing to embed"),
        (("--text", "a", "--dimensions", "0"), "dimensions must be between 1"),
        (("--image", "nowhere.png"), "'nowhere.png' cannot be read"),
        (("--input", "nowhere.jsonl"), "--input 'nowhere.jsonl' cannot be read"),
        (("--text", "a", "-o", "nowhere/out.jsonl"), "its folder does not exist"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(
    flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["embed", "demo", *flags]) in (1, 2)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not valid JSON"),
        ("5", "line 2 must be a string or an object"),
        ("{}", "line 2 must be a string or an object"),
        ('{"picture": "a"}', "line 2 must be a string or an object"),
        ('{"text": 5}', 'line 2 has a "text" that is no string: 5'),
        ('{"images": "a.png"}', "no list of paths or URLs"),
    ],
)
def test_wrong_lines(
    tmp_path: Path, line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(f'"good"\n{line}\n')
    assert main(["embed", "demo", "--input", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_texts_by_the_chat_template() -> None:
    assert Input("a").prompt(chat=False) == {"prompt": "a"}
    assert Input("a").prompt(chat=True) == {"messages": [{"role": "user", "content": "a"}]}


def test_help_names_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["embed", "--help"])
    text = capsys.readouterr().out
    for flag in ("--text", "--image", "--together", "--input", "--output", "--dimensions"):
        assert flag in text
    assert "--runner" not in text
    assert "--help all" in text
