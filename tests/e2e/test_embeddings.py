"""A server of vectors as a user meets it.

A process, HTTP, the ``openai`` client, against ``transformers``.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import openai
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests import checkpoints
from tests.e2e.prompts import MixedPrompt, qwen2_vl_inputs
from tests.e2e.serving import Server

pytestmark = pytest.mark.slow

TEMPLATE = Path(__file__).parents[2] / "examples" / "templates" / "dse_qwen2_vl.jinja"
VISION = "<|vision_start|><|image_pad|><|vision_end|>"
TEXTS = ["How many birds?", "a", "The quick brown fox jumps over the lazy dog. " * 4]
FLAGS = (
    *("--runner", "pooling", "--chat-template", str(TEMPLATE)),
    *("--hf-overrides", json.dumps({"matryoshka_dimensions": [16, 32]})),
    *("--num-kv-blocks", "300", "--block-size", "16", "--max-model-len", "512"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.make_qwen2_vl(tmp_path_factory.mktemp("dse"))


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(str(folder), tmp_path_factory.mktemp("log") / "server.log", FLAGS)
    yield server
    assert server.stop() == 0


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def expected(folder: Path, prompts: list[MixedPrompt], size: int | None = None) -> np.ndarray:
    """The reference's vectors."""
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    for values in qwen2_vl_inputs(folder, prompts):
        values = {"attention_mask": torch.ones_like(values["input_ids"]), **values}
        with torch.inference_mode():
            state = model.model(**values).last_hidden_state[0, -1]
        found.append(F.normalize(state[:size], dim=-1).numpy())
    return np.array(found)


def test_the_openai_client(client: openai.OpenAI, folder: Path) -> None:
    model = client.models.list().data[0].id
    wanted = expected(folder, [MixedPrompt(text, []) for text in TEXTS])
    answer = client.embeddings.create(model=model, input=TEXTS)
    found = [entry.embedding for entry in answer.data]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens > len(TEXTS)
    numbers = client.embeddings.create(model=model, input=TEXTS, encoding_format="float")
    np.testing.assert_allclose([e.embedding for e in numbers.data], found, atol=1e-6)
    cut = client.embeddings.create(model=model, input=TEXTS[0], dimensions=16)
    wanted = expected(folder, [MixedPrompt(TEXTS[0], [])], 16)
    np.testing.assert_allclose(cut.data[0].embedding, wanted[0], atol=1e-4)
    with pytest.raises(openai.BadRequestError, match="cut to 16, 32 only"):
        client.embeddings.create(model=model, input="a", dimensions=17)
    with pytest.raises(openai.BadRequestError, match="returns embeddings here"):
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "a"}])
    long = client.embeddings.create(model=model, input=[[5] * 512])
    assert long.usage.prompt_tokens == 512
    with pytest.raises(openai.BadRequestError, match="513 tokens"):
        client.embeddings.create(model=model, input=[[5], [5] * 513])


async def test_messages_and_metrics(server: Server, folder: Path) -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (70, 50, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    text = "What is shown in this image?"
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": text},
    ]
    body = {"messages": [{"role": "user", "content": parts}]}
    prompt = (
        "<|im_start|>system\nYou are a helpful "
        f"assistant.<|im_end|>\n<|im_start|>user\n{VISION}{text}"
        "<|im_end|>\n<|im_start|>assistant\n<|endoftext|>"
    )
    [wanted] = expected(folder, [MixedPrompt(prompt, [image])])
    async with aiohttp.ClientSession() as session:
        cached = []
        for _ in ("cold", "warm"):
            async with session.post(f"{server.url}/v1/embeddings", json=body) as response:
                assert response.status == 200, await response.text()
                answer = await response.json()
            np.testing.assert_allclose(answer["data"][0]["embedding"], wanted, atol=1e-4)
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
            assert answer["usage"]["prompt_tokens_details"]["image_tokens"] > 0
        assert cached[0] < cached[1] < answer["usage"]["prompt_tokens"]
        async with session.get(f"{server.url}/metrics") as response:
            metrics = await response.text()
    numbers = {
        line.split("{")[0]: float(line.rsplit(" ", 1)[1])
        for line in metrics.splitlines()
        if not line.startswith("#") and "{" in line and 'reason="abort"' not in line
    }
    assert numbers["sensorium:vectors_total"] >= 2
    assert numbers["sensorium:generation_tokens_total"] == 0
    assert numbers["sensorium:num_requests_running"] == 0
    assert 'finished_reason="stop"' in metrics


def test_inputs_are_cut_where_asked(server: Server, client: openai.OpenAI) -> None:
    def ask(**fields: Any) -> tuple[int, np.ndarray]:
        answer = client.embeddings.create(
            model=client.models.list().data[0].id,
            input=fields.pop("input"),
            encoding_format="float",
            extra_body=fields,
        )
        return answer.usage.prompt_tokens, np.array(answer.data[0].embedding)

    ids = list(range(20, 60))
    for side, kept in (("right", ids[:10]), ("left", ids[-10:])):
        num_tokens, vector = ask(input=ids, truncate_prompt_tokens=10, truncation_side=side)
        assert num_tokens == 10
        np.testing.assert_allclose(vector, ask(input=kept)[1], atol=1e-5)
    long = "The quick brown fox. " * 2000
    assert ask(input=long, truncate_prompt_tokens=10)[0] == 10
    assert ask(input=long, truncate_prompt_tokens=-1)[0] == 512
    assert ask(input="a", truncate_prompt_tokens=10)[0] == ask(input="a")[0]
    for wrong in (513, 0, -2):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(input=long, truncate_prompt_tokens=wrong)
        assert caught.value.param == "truncate_prompt_tokens"
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512 tokens"):
        ask(input=long)
