"""Answers of many values are written in another thread."""

from __future__ import annotations

import json
import threading
from typing import Any

import pytest

from sensorium.outputs import CompletionOutput, Logprob, RequestOutput
from sensorium.server.openai.generation import num_values
from sensorium.server.payload import MANY_VALUES, json_response
from tests.server.fake_frontend import FakeFrontend
from tests.server.harness import App


@pytest.mark.parametrize("num", [0, MANY_VALUES - 1, MANY_VALUES, 10**6])
async def test_who_writes_an_answer(num: int) -> None:
    threads = list[int]()

    def make() -> dict[str, Any]:
        threads.append(threading.get_ident())
        return {"a": [1, "b"]}

    answer = await json_response(make, num)
    assert json.loads(bytes(answer.body)) == {"a": [1, "b"]}
    assert (threads == [threading.get_ident()]) == (num < MANY_VALUES)


async def test_errors_of_an_answer_are_raised() -> None:
    def make() -> Any:
        raise LookupError("no such thing")

    for num in (0, MANY_VALUES):
        with pytest.raises(LookupError, match="no such thing"):
            await json_response(make, num)


def output(num_samples: int, num_tokens: int, num_top: int, num_prompt: int) -> RequestOutput:
    """An output with log probabilities."""
    entry = {i: Logprob(-1.0, i + 1, "a") for i in range(num_top)}
    samples = [CompletionOutput(i, "", []) for i in range(num_samples)]
    for sample in samples:
        sample.logprobs = [entry] * num_tokens
    found = RequestOutput("r", None, [1] * num_prompt, samples, finished=True)
    found.prompt_logprobs = [None, *[entry] * (num_prompt - 1)]
    return found


def test_the_values_of_an_answer_are_its_choices_and_log_probabilities() -> None:
    assert num_values([output(2, 3, 5, 4)]) == 2 + 2 * 3 * 5 + 3 * 5
    assert num_values([output(1, 0, 5, 1), output(3, 1, 1, 2)]) == 1 + (3 + 3 + 1)
    plain = output(2, 3, 5, 4)
    plain.prompt_logprobs = None
    for sample in plain.outputs:
        sample.logprobs = None
    assert num_values([plain]) == 2


@pytest.mark.parametrize("length", [3, 2 * MANY_VALUES])
async def test_answers_are_the_same_whoever_writes_them(length: int) -> None:
    app = App(FakeFrontend(reply="a" * length, max_model_len=10 * length))
    chat = (await app.chat(logprobs=True, top_logprobs=1)).json()["choices"][0]
    assert chat["message"]["content"] == "a" * length
    assert "".join(e["token"] for e in chat["logprobs"]["content"]) == "a" * length
    completion = (await app.complete(logprobs=1, max_tokens=length)).json()["choices"][0]
    assert "".join(completion["logprobs"]["tokens"]) == "a" * length
    answer = await app.post("/tokenize", {"prompt": "a" * length, "return_token_strs": True})
    assert "".join(answer.json()["token_strs"]) == "a" * length
