"""The server as a user meets it: a process, HTTP, the ``openai`` client."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import signal
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import openai
import psutil
import pytest
import torch
from PIL import Image

from tests import checkpoints
from tests.e2e.prompts import (
    MixedPrompt,
    llava_inputs,
    mixed_prompts,
    qwen2_vl_inputs,
    reference_tokens,
)
from tests.e2e.serving import Server

pytestmark = pytest.mark.slow

NUM_TOKENS = 10
FLAGS = ("--num-kv-blocks", "300", "--block-size", "16", "--max-model-len", "512")
VISION = "<|vision_start|><|image_pad|><|vision_end|>"


def data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def picture(seed: int = 0, size: tuple[int, int] = (60, 45)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def tensor_text(tensor: torch.Tensor) -> str:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.fixture(scope="module")
def allowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("allowed")
    picture(4).save(folder / "picture.png")
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, allowed: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("qwen2_vl")
    checkpoints.make_qwen2_vl(folder)
    flags = (*FLAGS, "--enable-mm-embeds", "--allowed-local-media-path", str(allowed))
    server = Server(str(folder), tmp_path_factory.mktemp("log") / "server.log", flags)
    server.folder = folder  # type: ignore[attr-defined]
    yield server
    assert server.stop() == 0


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def model_of(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def chat(client: openai.OpenAI, *parts: dict[str, Any], **fields: Any) -> Any:
    return client.chat.completions.create(
        model=model_of(client),
        messages=[{"role": "user", "content": list(parts)}],  # type: ignore[list-item,misc]
        **{"max_tokens": 6, "temperature": 0, **fields},
    )


def image_part(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_tokens_over_http_equal_the_reference(
    family: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """64 conversations at once, under a small token budget and few blocks, cold and warm."""
    folder = tmp_path_factory.mktemp(family)
    if family == "llava":
        checkpoints.make_llava(folder)
        inputs, placeholder = llava_inputs, "<image>"
    else:
        checkpoints.make_qwen2_vl(folder)
        inputs, placeholder = qwen2_vl_inputs, VISION
    prompts = mixed_prompts(64, placeholder, chat=("", ""), seed=3)
    flags = ("--max-num-batched-tokens", "60", "--num-kv-blocks", "60", "--block-size", "8")
    server = Server(str(folder), tmp_path / "log", (*flags, "--max-model-len", "300"))
    try:
        rendered = asyncio.run(rendered_chats(server.url, prompts, placeholder))
        as_reference = [
            MixedPrompt(text, prompt.images)
            for (text, _), prompt in zip(rendered, prompts, strict=True)
        ]
        expected = reference_tokens(folder, inputs(folder, as_reference), NUM_TOKENS)
        assert [tokens for _, tokens in rendered] == expected
        again = asyncio.run(rendered_chats(server.url, prompts, placeholder))
        assert [tokens for _, tokens in again] == expected
    finally:
        assert server.stop() == 0


async def rendered_chats(
    url: str, prompts: list[MixedPrompt], placeholder: str
) -> list[tuple[str, list[int]]]:
    """Each prompt as a conversation, all at once: its rendered text and its greedy tokens."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(600)) as session:
        async with session.get(f"{url}/v1/models") as answer:
            model = (await answer.json())["data"][0]["id"]

        async def one(prompt: MixedPrompt) -> tuple[str, list[int]]:
            texts = prompt.text.split(placeholder)
            parts: list[dict[str, Any]] = []
            for index, text in enumerate(texts):
                if text.strip():
                    parts.append(text_part(text.strip()))
                if index < len(prompt.images):
                    parts.append(image_part(data_url(prompt.images[index])))
            body = {"model": model, "messages": [{"role": "user", "content": parts}]}
            async with session.post(f"{url}/tokenize", json=body) as answer:
                assert answer.status == 200, await answer.text()
                text = (await answer.json())["prompt"]
            options = {
                "max_tokens": NUM_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
                "return_token_ids": True,
            }
            async with session.post(
                f"{url}/v1/chat/completions", json={**body, **options}
            ) as answer:
                assert answer.status == 200, await answer.text()
                return text, (await answer.json())["choices"][0]["token_ids"]

        return list(await asyncio.gather(*(one(prompt) for prompt in prompts)))


def test_the_openai_client_streams_and_does_not(client: openai.OpenAI) -> None:
    parts = (image_part(data_url(picture())), text_part("what is it"))
    whole = chat(client, *parts)
    assert whole.choices[0].finish_reason in ("length", "stop")
    assert whole.usage.prompt_tokens_details.image_tokens == 4
    chunks = list(chat(client, *parts, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_a_file_below_the_allowed_folder(client: openai.OpenAI, allowed: Path) -> None:
    answer = chat(client, image_part(f"file://{allowed}/picture.png"), text_part("what"))
    assert answer.usage.prompt_tokens_details.image_tokens == 4


def counters(server: Server) -> dict[str, float]:
    """All samples of /metrics without labels, by name."""

    async def fetch() -> str:
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{server.url}/metrics") as answer,
        ):
            return await answer.text()

    lines = asyncio.run(fetch()).splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def media_work(server: Server) -> dict[str, float]:
    """How often pictures were decoded, preprocessed and encoded."""
    return {
        name.split(":")[-1]: value
        for name, value in counters(server).items()
        if "mm_encoder_items_total" in name
        or ("media_stage_items_total" in name and "fetch" not in name)
    }


def test_the_same_image_again_is_not_worked_on_again(client: openai.OpenAI, server: Server) -> None:
    url = data_url(picture(123, (400, 300)))
    first = chat(client, image_part(url), text_part("what is it"))
    before = media_work(server)
    assert len(before) == 4
    assert all(before.values())
    second = chat(client, image_part(url), text_part("something else"))
    third = chat(client, image_part(url), text_part("what is it"))
    assert media_work(server) == before
    num_image = first.usage.prompt_tokens_details.image_tokens
    assert first.usage.prompt_tokens_details.cached_tokens < num_image
    assert second.usage.prompt_tokens_details.cached_tokens >= num_image
    assert third.usage.prompt_tokens_details.cached_tokens >= second.usage.prompt_tokens - 40


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to no data."""

    def chunk(name: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 100)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def encoded(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


BAD_MEDIA = {
    "not an image": (encoded(b"hello"), 400, "media_undecodable"),
    "huge header": (encoded(png_header(50_000, 50_000)), 413, "media_too_large"),
    "loopback": ("http://127.0.0.1:9/x.png", 400, "media_refused"),
    "private": ("http://10.0.0.1/x.png", 400, "media_refused"),
    "metadata service": ("http://169.254.169.254/latest", 400, "media_refused"),
    "decimal address": ("http://2130706433/x.png", 400, "media_refused"),
    "mapped address": ("http://[::ffff:127.0.0.1]/x.png", 400, "media_refused"),
    "backslash": ("http://example.org\\@127.0.0.1/x.png", 400, "media_refused"),
    "outside the folder": ("file:///etc/passwd", 400, "media_refused"),
    "scheme": ("ftp://example.org/x.png", 400, "media_refused"),
}


@pytest.mark.parametrize("name", BAD_MEDIA)
def test_bad_media_get_a_clear_answer(client: openai.OpenAI, name: str) -> None:
    url, status, code = BAD_MEDIA[name]
    with pytest.raises(openai.APIStatusError) as caught:
        chat(client, text_part("what"), image_part(url))
    error = caught.value
    assert error.status_code == status
    body: Any = error.body
    assert (body["code"], body["param"]) == (code, "messages[0].content[1].image_url")
    assert "0x" not in body["message"]
    assert "/etc" not in body["message"]
    assert chat(client, text_part("still there?")).choices[0].message.content is not None


def test_a_folder_traversal_is_refused(client: openai.OpenAI, allowed: Path) -> None:
    for path in ("../x.png", "%2e%2e/x.png", "..%2fx.png"):
        with pytest.raises(openai.BadRequestError) as caught:
            chat(client, image_part(f"file://{allowed}/{path}"))
        assert caught.value.body["code"] == "media_refused"  # type: ignore[index]


def test_wrong_embeddings_are_refused_and_harm_nothing(client: openai.OpenAI) -> None:
    for tensor in (torch.zeros(3), torch.zeros(1, 4, 7), torch.full((4, 64), torch.nan)):
        part = {
            "type": "image_embeds",
            "image_embeds": {
                "image_embeds": tensor_text(tensor),
                "image_grid_thw": tensor_text(torch.tensor([[1, 4, 4]])),
            },
        }
        with pytest.raises(openai.BadRequestError) as caught:
            chat(client, part, text_part("what"))
        assert caught.value.body["code"] == "invalid_embeddings"  # type: ignore[index]
    assert chat(client, text_part("still there?")).choices


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 10**9}, "n"),
        ({"temperature": float("nan")}, None),
        ({"temperature": -1}, "temperature"),
        ({"extra_body": {"tempature": 1}}, "tempature"),
        ({"extra_body": {"min_p": "high"}}, "min_p"),
        ({"top_p": 7}, "top_p"),
        ({"logit_bias": {"999999": 1}}, "logit_bias[999999]"),
    ],
)
def test_bad_fields_are_refused(
    client: openai.OpenAI, server: Server, fields: Any, param: str | None
) -> None:
    with pytest.raises((openai.BadRequestError, ValueError)) as caught:
        chat(client, text_part("what"), **fields)
    if isinstance(caught.value, openai.BadRequestError):
        body: Any = caught.value.body
        assert body["code"] == "invalid_request"
        assert param is None or body["param"] == param
    assert chat(client, text_part("still there?")).choices


def test_nan_in_json_is_refused(server: Server, client: openai.OpenAI) -> None:
    async def send() -> tuple[int, dict[str, Any]]:
        body = {"model": model_of(client), "messages": [{"role": "user", "content": "x"}]}
        text = json.dumps(body)[:-1] + ', "temperature": NaN}'
        headers = {"Content-Type": "application/json"}
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{server.url}/v1/chat/completions", data=text, headers=headers) as answer,
        ):
            return answer.status, await answer.json()

    status, body = asyncio.run(send())
    assert status == 400
    assert body["error"]["code"] == "invalid_request"


async def one_client(session: aiohttp.ClientSession, url: str, model: str, index: int) -> str:
    """Stream an answer about a picture; every third client leaves after its first chunk."""
    body = {
        "model": model,
        "stream": True,
        "max_tokens": 40,
        "ignore_eos": True,
        "messages": [
            {
                "role": "user",
                "content": [image_part(data_url(picture(index % 16))), text_part(f"what {index}")],
            }
        ],
    }
    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        last = ""
        async for line in answer.content:
            if index % 3 == 0 and line.startswith(b"data: "):
                answer.close()
                return "left"
            last = line.decode().strip() or last
        assert last == "data: [DONE]", last
        return "done"


async def crowd(url: str, model: str, num_clients: int) -> list[str]:
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(600)
    ) as session:
        clients = (one_client(session, url, model, index) for index in range(num_clients))
        return list(await asyncio.gather(*clients))


async def settled(server: Server) -> dict[str, float]:
    """The gauges once nothing runs or waits any more."""
    async with aiohttp.ClientSession() as session:
        for _ in range(600):
            async with session.get(f"{server.url}/metrics") as answer:
                lines = (await answer.text()).splitlines()
            found = {
                name.split(":")[-1].split("{")[0]: float(value)
                for name, value in (
                    line.rsplit(" ", 1) for line in lines if line and not line.startswith("#")
                )
            }
            if not found["num_requests_running"] and not found["num_requests_waiting"]:
                return found
            await asyncio.sleep(0.05)
    raise AssertionError("requests of clients that left go on running")


def test_64_clients_of_which_a_third_leave(server: Server, client: openai.OpenAI) -> None:
    model = model_of(client)
    segments, descriptors = [], 0
    for _ in range(3):
        outcomes = asyncio.run(crowd(server.url, model, 64))
        assert outcomes.count("left") == 22
        assert outcomes.count("done") == 42
        gauges = asyncio.run(settled(server))
        assert gauges["kv_cache_usage_perc"] == 0
        assert gauges["mm_held_requests"] == 0
        segments.append({path.name for path in server.segments().iterdir()})
        # The first crowd starts all media workers.
        descriptors = descriptors or server.num_descriptors()
    # The later crowds bring the pictures of the first: what is shared between the processes is
    # there already.
    assert segments[0]
    assert segments[0] == segments[1] == segments[2]
    # Sockets of the metrics requests themselves may still be closing.
    assert server.num_descriptors() <= descriptors + 4
    assert chat(client, text_part("well?")).choices


def test_sigterm_lets_running_requests_finish_and_leaves_nothing(
    tmp_path: Path, server: Server
) -> None:
    """No process stays behind, and no shared memory."""
    own = Server(str(server.folder), tmp_path / "log", FLAGS)  # type: ignore[attr-defined]
    children = own.children()
    assert children
    with openai.OpenAI(base_url=f"{own.url}/v1", api_key="none", max_retries=0) as client:
        assert chat(client, image_part(data_url(picture())), text_part("what")).choices
        folder = own.segments()
        assert list(folder.iterdir())
        stream = chat(
            client, text_part("go on"), stream=True, max_tokens=60, extra_body={"ignore_eos": True}
        )
        chunks = iter(stream)
        next(chunks)
        own.process.send_signal(signal.SIGTERM)
        rest = list(chunks)
        assert rest[-1].choices[0].finish_reason == "length"
    assert own.stop() == 0
    assert not folder.exists()
    _, alive = psutil.wait_procs(children, timeout=300)
    assert not alive
