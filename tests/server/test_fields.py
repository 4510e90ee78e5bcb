"""Fields of answers that clients written for vLLM read.

There, and null where there is nothing to say.
"""

from __future__ import annotations

from typing import Any

import pytest

from sensorium.models.embedder import Embedder
from tests.server.fake_frontend import TOKENIZER, FakeFrontend
from tests.server.harness import App

REPLY = TOKENIZER.encode("Hello, world!")
ALL_ALONG = {"include_usage": True, "continuous_usage_stats": True}


@pytest.mark.parametrize("route", ["chat", "complete"])
async def test_usage_all_along_needs_usage_at_all(route: str) -> None:
    answer = await getattr(App(), route)(
        stream=True, stream_options={"continuous_usage_stats": True}
    )
    assert not any("usage" in event for event in answer.events())
    answer = await getattr(App(), route)(stream=True, stream_options=ALL_ALONG)
    assert all(event["usage"] for event in answer.events())


async def test_the_chunk_of_the_role_counts_no_tokens() -> None:
    first, second, *_, last = (await App().chat(stream=True, stream_options=ALL_ALONG)).events()
    assert first["choices"][0]["delta"]["role"] == "assistant"
    num_prompt = first["usage"]["prompt_tokens"]
    assert (first["usage"]["completion_tokens"], first["usage"]["total_tokens"]) == (0, num_prompt)
    assert second["usage"]["completion_tokens"] == 1
    assert last["usage"]["completion_tokens"] == len(REPLY)


async def test_usage_grows_with_each_chunk_that_has_a_choice() -> None:
    """vLLM's clients rely on it.

    Without usage all along the end has a chunk of its own, as with OpenAI.
    """
    for max_tokens in (3, None):
        fields = {} if max_tokens is None else {"max_tokens": max_tokens}
        answer = await App().chat(stream=True, stream_options=ALL_ALONG, **fields)
        *chunks, last = answer.events()
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == list(range(len(counts)))
        assert last["usage"]["completion_tokens"] == counts[-1]
        assert [bool(c["choices"][0]["finish_reason"]) for c in chunks] == [False] * (
            len(counts) - 1
        ) + [True]


async def test_usage_never_falls_within_a_stream_of_several_samples() -> None:
    events = (await App().chat(n=3, stream=True, stream_options=ALL_ALONG)).events()
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == 3 * len(REPLY)


async def test_chat_has_null_members_of_prompts_and_tokens() -> None:
    answer = (await App().chat()).json()
    assert (answer["prompt_logprobs"], answer["prompt_token_ids"]) == (None, None)
    assert answer["choices"][0]["token_ids"] is None
    answer = (await App().chat(prompt_logprobs=0, return_token_ids=True)).json()
    assert answer["prompt_logprobs"][0] is None
    assert answer["prompt_token_ids"] == TOKENIZER.encode("Hi")
    assert answer["choices"][0]["token_ids"] == REPLY


async def test_completions_have_null_members_of_prompts_and_tokens() -> None:
    names = ("prompt_logprobs", "prompt_token_ids", "token_ids")
    [choice] = (await App().complete()).json()["choices"]
    assert [choice[name] for name in names] == [None] * 3
    [choice] = (await App().complete(prompt_logprobs=0, return_token_ids=True)).json()["choices"]
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_token_ids"] == TOKENIZER.encode("Hi")
    assert choice["token_ids"] == REPLY


@pytest.mark.parametrize("stream", [False, True])
async def test_no_log_probabilities_but_those_of_the_tokens(stream: bool) -> None:
    """``logprobs: 0`` of completions: the alternatives are the tokens themselves."""
    answer = await App().complete(logprobs=0, stream=stream)
    events: list[Any] = answer.events() if stream else [answer.json()]
    found = [event["choices"][0]["logprobs"] for event in events]
    tokens = [token for one in found for token in one["tokens"]]
    assert "".join(tokens) == "Hello, world!"
    top = [entry for one in found for entry in one["top_logprobs"]]
    assert top == [{token: -2.0} for token in tokens]


async def test_embeddings_say_when_they_were_made() -> None:
    app = App(FakeFrontend(embedder=Embedder(64)))
    answer = (await app.post("/v1/embeddings", {"input": "a"})).json()
    assert isinstance(answer["created"], int)
    assert answer["created"] > 1_700_000_000
