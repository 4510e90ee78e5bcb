"""``/v1/embeddings`` over a front end without an engine.

Forms of input and output, refusals, the openai client.
"""

from __future__ import annotations

import asyncio
import base64
import struct
from typing import Any

import numpy as np
import openai
import pytest

from sensorium.engine.prompts.types import ChatPrompt, RawPrompt
from sensorium.errors import PromptTooLongError
from sensorium.models.embedder import Embedder
from sensorium.params import PoolingParams
from sensorium.server.openai.pooling import BATCH_SIZE
from sensorium.server.payload import encode
from tests.server.fake_frontend import TOKENIZER, FakeFrontend, fail, hang
from tests.server.harness import USER, App, running, until

PATH = "/v1/embeddings"
HI = TOKENIZER.encode("Hi")


def embedding_app(**options: Any) -> App:
    config = options.pop("config", {})
    embedder = options.pop("embedder", Embedder(64, matryoshka=True))
    return App(FakeFrontend(embedder=embedder, **options), **config)


async def test_a_text() -> None:
    app = embedding_app(num_cached_tokens=1)
    answer = await app.post(PATH, {"input": "Hi", "model": "demo", "user": "me"})
    body = answer.json()
    assert answer.status == 200
    assert body["object"] == "list"
    assert body["model"] == "demo"
    assert body["id"].startswith("embd-")
    vector = [len(HI), sum(HI), 0.25, 0.25]
    assert body["data"] == [{"object": "embedding", "index": 0, "embedding": vector}]
    assert body["usage"] == {
        "prompt_tokens": len(HI),
        "total_tokens": len(HI),
        "prompt_tokens_details": {"cached_tokens": 1, "image_tokens": 0},
    }
    [call] = app.frontend.calls
    assert isinstance(call.prompt, RawPrompt)
    assert call.params == PoolingParams()
    assert call.ended


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        (["Hi", "Hi Hi"], [HI, TOKENIZER.encode("Hi Hi")]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
        (["Hi", [7]], [HI, [7]]),
    ],
)
async def test_lists(given: list[Any], ids: list[list[int]]) -> None:
    app = embedding_app()
    body = (await app.post(PATH, {"input": given})).json()
    assert [entry["index"] for entry in body["data"]] == list(range(len(ids)))
    assert [entry["embedding"][:2] for entry in body["data"]] == [[len(i), sum(i)] for i in ids]
    assert body["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert len({call.request_id for call in app.frontend.calls}) == len(ids)


async def test_base64_is_little_endian_float32() -> None:
    body = {"input": "Hi", "encoding_format": "base64", "dimensions": 6}
    answer = await embedding_app().post(PATH, body)
    data = base64.b64decode(answer.json()["data"][0]["embedding"])
    assert struct.unpack("<6f", data) == (len(HI), sum(HI), 0.25, 0.25, 0.25, 0.25)


async def test_messages_as_in_chat() -> None:
    app = embedding_app()
    url = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    content = [url, {"type": "text", "text": "What is shown?"}]
    body = {
        "messages": [{"role": "user", "content": content}],
        "mm_processor_kwargs": {"max_pixels": 784},
        "add_special_tokens": True,
        "priority": 3,
    }
    answer = (await app.post(PATH, body)).json()
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == 4
    [call] = app.frontend.calls
    assert isinstance(call.prompt, ChatPrompt)
    assert call.prompt.media.mm_processor_kwargs == {"max_pixels": 784}
    assert call.prompt.add_special_tokens is True
    assert call.prompt.add_generation_prompt is False
    assert call.priority == 3
    for given, adds, continues in (
        ({"add_generation_prompt": True}, True, False),
        ({"continue_final_message": True}, False, True),
    ):
        await app.post(PATH, {"messages": USER, **given})
        prompt = app.frontend.calls[-1].prompt
        assert isinstance(prompt, ChatPrompt)
        assert (prompt.add_generation_prompt, prompt.continue_final_message) == (adds, continues)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "input", "Give either input or messages."),
        ({"input": "Hi", "messages": USER}, "messages", "Give either"),
        ({"input": []}, "input", "input must be a text"),
        ({"input": ["Hi", 5.5]}, "input[1]", r"input[1] must be a text"),
        ({"input": [[-1]]}, "input[0]", "count from 0"),
        ({"input": "Hi", "dimensions": 0}, "dimensions", "between 1 and"),
        ({"input": "Hi", "dimensions": 65}, "dimensions", "embeddings have 64"),
        ({"input": "Hi", "dimensions": "8"}, "dimensions", "must be an integer"),
        ({"input": "Hi", "encoding_format": "hex"}, "encoding_format", "'float' or 'base64'"),
        ({"input": "Hi", "normalise": True}, "normalise", "Did you mean 'normalize'"),
        ({"input": "Hi", "model": "other"}, "model", "is not served here"),
        ({"input": ["Hi"] * 65}, "input", "input has 65 entries"),
    ],
)  # fmt: skip
async def test_refusals(body: dict[str, Any], param: str, message: str) -> None:
    app = embedding_app()
    answer = await app.post(PATH, body)
    assert answer.status in (400, 404)
    assert answer.error["param"] == param
    assert message in answer.error["message"]
    assert not app.frontend.calls


async def test_dimensions_of_a_model_that_was_not_trained_for_it() -> None:
    app = embedding_app(embedder=Embedder(64))
    answer = await app.post(PATH, {"input": "Hi", "dimensions": 8})
    assert (answer.status, answer.error["param"]) == (400, "dimensions")
    assert "is_matryoshka" in answer.error["message"]
    assert (await app.post(PATH, {"input": "Hi", "dimensions": 64})).status == 200


async def test_each_kind_of_server_says_what_it_is_not() -> None:
    app = embedding_app()
    for answer in (await app.chat(), await app.complete(), await app.chat(stream=True)):
        assert answer.status == 400
        assert "returns embeddings here" in answer.error["message"]
    generating = App()
    answer = await generating.post(PATH, {"input": "Hi"})
    assert answer.status == 400
    assert "--runner pooling" in answer.error["message"]
    assert (await app.get("/v1/models")).json()["data"][0]["id"] == "demo"
    facts = (await app.get("/playground/facts")).json()
    assert facts["runner"] == "pooling"


async def test_the_first_error_ends_all() -> None:
    def second_fails(call: Any) -> Any:
        if call.prompt.text == "bad":
            raise PromptTooLongError("too long", param="input[1]")
        return hang(call)

    app = embedding_app(before=second_fails)
    answer = await app.post(PATH, {"input": ["good", "bad", "good"]})
    assert (answer.status, answer.error["param"]) == (400, "input[1]")
    assert app.frontend.num_open == 0
    assert app.app.state.context.models.default.admission.num_waiting == 0
    app = embedding_app(before=fail(RuntimeError("inside")))
    answer = await app.post(PATH, {"input": "Hi"})
    assert answer.status == 500
    assert "inside" not in answer.error["message"]


async def test_a_client_that_goes_away_frees_its_work() -> None:
    frontend = FakeFrontend(embedder=Embedder(64), before=hang)
    async with running(frontend) as server:
        _, writer = await server.send(PATH, {"input": ["Hi", "Ho"]})
        await until(lambda: frontend.num_open == 2)
        writer.close()
        await until(lambda: frontend.num_open == 0)
        admission = server.app.state.context.models.default.admission
        await until(lambda: admission.num_waiting == 0)


async def test_the_openai_client() -> None:
    async with running(FakeFrontend(embedder=Embedder(64, matryoshka=True))) as server:
        client = openai.AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)
        answer = await client.embeddings.create(model="demo", input=["Hi", "Hi Hi"], dimensions=3)
        np.testing.assert_array_equal(answer.data[0].embedding, [len(HI), sum(HI), 0.25])
        plain = await client.embeddings.create(model="demo", input="Hi", encoding_format="float")
        assert plain.data[0].embedding == [len(HI), sum(HI), 0.25, 0.25]
        assert plain.usage.prompt_tokens == len(HI)
        with pytest.raises(openai.BadRequestError, match="embeddings have 64"):
            await client.embeddings.create(model="demo", input="Hi", dimensions=100)
        await client.close()


async def test_others_have_their_turns_while_an_answer_is_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between two turns of the event loop, no more than a few vectors are written."""
    written = since = most = 0

    def counted(value: Any) -> bytes:
        nonlocal written, since, most
        if "embedding" in value:
            written, since = written + 1, since + 1
            most = max(most, since)
        return encode(value)

    async def other() -> None:
        nonlocal since
        while True:
            since = 0
            await asyncio.sleep(0)

    monkeypatch.setattr("sensorium.server.routes.embeddings.encode", counted)
    task = asyncio.create_task(other())
    body = (await embedding_app().post(PATH, {"input": ["Hi"] * 60})).json()
    task.cancel()
    assert [entry["index"] for entry in body["data"]] == list(range(60))
    assert written == 60
    assert most <= BATCH_SIZE


async def test_the_description_of_the_api() -> None:
    described = (await embedding_app().get("/openapi.json")).json()
    schema = described["paths"][PATH]["post"]["requestBody"]["content"]["application/json"]
    assert schema == {"schema": {"$ref": "#/components/schemas/EmbeddingBody"}}
