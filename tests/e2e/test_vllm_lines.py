"""Eight everyday ``vllm serve`` lines of vLLM's documentation start a server here.

The same words, with a tiny checkpoint of the same family, of dummy weights, in place of the model,
and our templates in place of vLLM's.
"""

from __future__ import annotations

import io
import json
import shlex
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import soundfile
from PIL import Image

from sensorium import LLM, SamplingParams
from sensorium.cli.commands.serve import models_of
from sensorium.cli.flags import build_server_config, engine_keywords
from sensorium.cli.main import build_parser
from tests import checkpoints
from tests.e2e.serving import Server

pytestmark = pytest.mark.slow
TEMPLATES = Path(__file__).parents[2] / "examples" / "templates"

LINES: dict[str, tuple[Callable[..., Path], tuple[str, ...]]] = {
    "vllm serve llava-hf/llava-1.5-7b-hf": (checkpoints.make_llava, ("image",)),
    """vllm serve microsoft/Phi-3.5-vision-instruct --runner generate --trust-remote-code --max-model-len 4096
    --limit-mm-per-prompt '{"image":2}'""": (checkpoints.make_phi3_v, ("image", "image")),
    "vllm serve llava-hf/llava-onevision-qwen2-0.5b-ov-hf --runner generate --max-model-len 8192": (
        checkpoints.make_llava_onevision,
        ("image",),
    ),
    "vllm serve fixie-ai/ultravox-v0_5-llama-3_2-1b": (checkpoints.make_ultravox, ("audio",)),
    """vllm serve Qwen/Qwen2.5-VL-3B-Instruct --media-io-kwargs '{"video": {"num_frames": 40}}' --disable-log-requests
    --limit-mm-per-prompt.image 1 --async-scheduling -O3 --mm-encoder-tp-mode data -tp 1""": (
        checkpoints.make_qwen2_5_vl,
        ("image",),
    ),
    """vllm serve TIGER-Lab/VLM2Vec-Full --runner pooling --trust-remote-code --max-model-len 4096
    --chat-template examples/template_vlm2vec_phi3v.jinja""": (checkpoints.make_phi3_v, ("image",)),
    """vllm serve MrLight/dse-qwen2-2b-mrl-v1 --task embed --trust-remote-code --max-model-len 8192
    --chat-template examples/template_dse_qwen2_vl.jinja""": (checkpoints.make_qwen2_vl, ("image",)),
    """vllm serve Qwen/Qwen2.5-1.5B-Instruct --dtype half --api-key token-abc123 --enable-auto-tool-choice
    --tool-call-parser hermes --enable-prompt-tokens-details --uvicorn-log-level warning""": (
        lambda folder: checkpoints.make_text("qwen2", folder),
        (),
    ),
}  # fmt: skip


def here(line: str, folder: Path) -> list[str]:
    """The flags of a line, without its model."""
    words = shlex.split(line)
    assert words[:2] == ["vllm", "serve"]
    ours = {"vlm2vec": TEMPLATES / "vlm2vec.jinja", "dse": TEMPLATES / "dse_qwen2_vl.jinja"}
    flags = [
        next((str(path) for name, path in ours.items() if name in word and ".jinja" in word), word)
        for word in words[3:]
    ]
    config = json.loads((folder / "config.json").read_text())
    longer: dict[str, Any] = {"max_position_embeddings": 8192}
    if "text_config" in config:
        longer = {"text_config": longer}
    small = [
        "--load-format",
        "dummy",
        "--num-kv-blocks",
        "300",
        "--hf-overrides",
        json.dumps(longer),
    ]
    return [*flags, *(small if "--max-model-len" in flags else small[:4])]


def part(kind: str) -> dict[str, Any]:
    """A part of a message with an item of a modality."""
    file = io.BytesIO()
    if kind == "image":
        Image.new("RGB", (60, 45), "red").save(file, "PNG")
        url = f"data:image/png;base64,{b64encode(file.getvalue()).decode()}"
        return {"type": "image_url", "image_url": {"url": url}}
    soundfile.write(file, np.zeros(8000, np.float32), 16000, format="WAV")
    return {
        "type": "input_audio",
        "input_audio": {"data": b64encode(file.getvalue()).decode(), "format": "wav"},
    }


OFFLINE = ("llava-1.5", "Phi-3.5", "llava-onevision", "ultravox")
"""Models of lines whose flags are those of the engine alone: they start one in this process."""


def lines(*, offline: bool) -> list[Any]:
    """Return the lines of one kind, as parameters of a test."""
    chosen = [line for line in LINES if any(name in line for name in OFFLINE) == offline]
    return [pytest.param(line, id=line.split()[2]) for line in chosen]


def length_of(line: str) -> int | None:
    """Return the ``--max-model-len`` of a line."""
    _, flag, rest = line.partition("--max-model-len")
    return int(rest.split()[0]) if flag else None


@pytest.mark.parametrize("line", lines(offline=True))
def test_the_line_starts_an_engine(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, items = LINES[line]
    (tmp_path / "model").mkdir()
    folder = make(tmp_path / "model")
    arguments = build_parser().parse_args(["serve", str(folder), *here(line, folder)])
    build_server_config(arguments)
    [model] = models_of(arguments)
    content = [*map(part, items), {"type": "text", "text": "What is this?"}]
    with LLM(**engine_keywords(model)) as llm:
        length = length_of(line)
        assert length is None or llm.config.model.max_model_len == length
        params = SamplingParams(max_tokens=3)
        [answer] = llm.chat([{"role": "user", "content": content}], params, use_tqdm=False)
    assert len(answer.prompt_token_ids) > 3
    assert "unknown flag" not in capsys.readouterr().err


@pytest.mark.parametrize("line", lines(offline=False))
def test_the_line_starts_a_server(line: str, tmp_path: Path) -> None:
    make, items = LINES[line]
    (tmp_path / "model").mkdir()
    folder = make(tmp_path / "model")
    server = Server(str(folder), tmp_path / "server.log", here(line, folder))
    try:
        key = "token-abc123" if "--api-key" in line else "none"
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
        content = [*map(part, items), {"type": "text", "text": "What is this?"}]
        messages: Any = [{"role": "user", "content": content}]
        model = client.models.list().data[0].id
        length = length_of(line)
        if length is not None:
            assert client.models.list().data[0].model_dump()["max_model_len"] == length
        if "pooling" in line or "embed" in line:
            body = {"model": model, "messages": messages, "encoding_format": "float"}
            answer = client.post("/embeddings", cast_to=object, body=body)
            assert len(answer["data"][0]["embedding"]) > 8  # type: ignore[index]
        else:
            answer = client.chat.completions.create(model=model, messages=messages, max_tokens=3)
            assert answer.usage is not None
            assert answer.usage.prompt_tokens > 3
        client.close()
    finally:
        status = server.stop()
    log = (tmp_path / "server.log").read_text()
    assert status == 0, log
    assert "Traceback" not in log
    assert "unknown flag" not in log
