"""Scores and ranks over a front end without an engine: forms, pairs, order, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sensorium.engine.prompts.types import ChatPrompt, RawPrompt
from sensorium.models.embedder import Embedder
from sensorium.outputs import PoolingRequestOutput
from sensorium.params import PoolingParams
from tests.server.fake_frontend import TOKENIZER, FakeFrontend
from tests.server.harness import App

PIXEL = "data:image/png;base64,AAAA"
IMAGE_PART = {"type": "image_url", "image_url": {"url": PIXEL}}


class Angles(FakeFrontend):
    """Embeddings of length 1 in the plane; a text of n tokens stands at n tenths of a radian."""

    async def embed(self, prompt: Any, params: Any, **options: Any) -> Any:
        output = await super().embed(prompt, params, **options)
        angle = len(output.prompt_token_ids) / 10
        vector = np.array([np.cos(angle), np.sin(angle)], np.float32)
        return PoolingRequestOutput(
            output.request_id,
            vector,
            output.prompt_token_ids,
            num_item_tokens=output.num_item_tokens,
        )


def scoring_app(**options: Any) -> App:
    return App(Angles(embedder=Embedder(64), **options))


def tokens(text: str) -> int:
    return len(TOKENIZER.encode(text))


def cosine(one: str, other: str) -> float:
    return float(np.cos((tokens(one) - tokens(other)) / 10))


TEXTS = ["a", "a a a a", "a a"]


@pytest.mark.parametrize("path", ["/v1/score", "/score"])
@pytest.mark.parametrize(("left", "right"), [("text_1", "text_2"), ("queries", "documents"), ("data_1", "data_2"), ("queries", "items")])  # fmt: skip
async def test_one_with_many(path: str, left: str, right: str) -> None:
    app = scoring_app()
    answer = await app.post(path, {left: "a", right: TEXTS, "model": "demo"})
    body = answer.json()
    assert answer.status == 200
    assert [entry["index"] for entry in body["data"]] == [0, 1, 2]
    assert [entry["score"] for entry in body["data"]] == pytest.approx(
        [cosine("a", text) for text in TEXTS]
    )
    assert body["usage"]["prompt_tokens"] == tokens("a") + sum(map(tokens, TEXTS))
    assert all(call.params == PoolingParams(normalize=True) for call in app.frontend.calls)
    assert all(isinstance(call.prompt, RawPrompt) for call in app.frontend.calls)


async def test_pairs() -> None:
    answer = await scoring_app().post("/v1/score", {"text_1": TEXTS, "text_2": TEXTS[::-1]})
    scores = [entry["score"] for entry in answer.json()["data"]]
    assert scores == pytest.approx([cosine(a, b) for a, b in zip(TEXTS, TEXTS[::-1], strict=True)])


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
async def test_ranks(path: str) -> None:
    app = scoring_app()
    answer = await app.post(path, {"query": "a a a", "documents": ["a", "a a a", "a a a a"]})
    results = answer.json()["results"]
    assert results[0] == {"index": 1, "relevance_score": pytest.approx(1.0), "document": {"text": "a a a"}}  # fmt: skip
    values = [result["relevance_score"] for result in results]
    assert values == sorted(values, reverse=True)
    few = await app.post(
        path, {"query": "a", "documents": TEXTS, "top_n": 2, "return_documents": False}
    )
    assert [set(result) for result in few.json()["results"]] == [{"index", "relevance_score"}] * 2
    all_of_them = await app.post(path, {"query": "a", "documents": TEXTS, "top_n": 0})
    assert len(all_of_them.json()["results"]) == 3


async def test_images_and_messages() -> None:
    app = scoring_app()
    body = {
        "query": {"text": "a"},
        "documents": [
            {"image": PIXEL},
            {"content": [IMAGE_PART, {"type": "text", "text": "a"}]},
            {"text": "a a"},
        ],
    }
    answer = await app.post("/v1/rerank", body)
    assert answer.status == 200, answer.body
    kinds = [type(call.prompt) for call in app.frontend.calls]
    assert sorted(kinds, key=str) == [ChatPrompt, ChatPrompt, RawPrompt, RawPrompt]
    by_index = {result["index"]: result["document"] for result in answer.json()["results"]}
    assert by_index == dict(enumerate(body["documents"]))
    assert answer.json()["usage"]["prompt_tokens_details"]["image_tokens"] == 8


async def test_the_parts_of_one_content_are_entries_as_in_vllm() -> None:
    body = {"text_1": "a", "text_2": {"content": [IMAGE_PART, {"type": "text", "text": "a"}]}}
    answer = await scoring_app().post("/v1/score", body)
    assert len(answer.json()["data"]) == 2


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/score", {"text_1": "a"}, "text_2"),
        ("/v1/score", {"text_1": "a", "queries": "b", "text_2": "c"}, "queries"),
        ("/v1/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ("/v1/score", {"text_1": [], "text_2": "a"}, "text_1"),
        ("/v1/score", {"text_1": "a", "text_2": [1]}, "text_2[0]"),
        ("/v1/score", {"text_1": "a", "text_2": [{"text": 1}]}, "text_2[0].text"),
        ("/v1/score", {"text_1": "a", "text_2": [{"text": "a", "image": "b"}]}, "text_2[0]"),
        ("/v1/score", {"text_1": "a", "text_2": [{"content": [{"type": "x"}]}]}, "text_2[0].content[0].type"),
        ("/v1/score", {"text_1": "a", "text_2": {"content": [{"type": "x"}]}}, "text_2.content[0].type"),
        ("/v1/score", {"text_1": "a", "text_2": {"image": 5}}, "text_2.image"),
        ("/v1/rerank", {"query": "a", "documents": []}, "documents"),
        ("/v1/rerank", {"query": ["a", "b"], "documents": ["a"]}, "query"),
        ("/v1/rerank", {"documents": ["a"]}, "query"),
        ("/v1/rerank", {"query": "a", "documents": ["a"] * 65}, "documents"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "top_n": -1}, "top_n"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "dimensions": 3}, "dimensions"),
        ("/v1/rerank", {"query": "a", "documents": ["a"], "model": "other"}, "model"),
    ],
)  # fmt: skip
async def test_refusals(path: str, body: dict[str, Any], param: str) -> None:
    answer = await scoring_app().post(path, body)
    assert answer.status in (400, 404), answer.body
    assert answer.error["param"] == param


async def test_models_that_generate_are_refused() -> None:
    answer = await App().post("/v1/score", {"text_1": "a", "text_2": "b"})
    assert answer.status == 400
    assert "--runner pooling" in answer.error["message"]
