"""POST /v1/completions: forms of prompts, echo, log probabilities, streams."""

from __future__ import annotations

import pytest

from sensorium.errors import PromptTooLongError
from tests.server.fake_frontend import TOKENIZER, Call, FakeFrontend, fail
from tests.server.harness import App

REPLY = "Hello, world!"
NUM_TOKENS = len(TOKENIZER.encode(REPLY))
HI = TOKENIZER.encode("Hi there")


async def test_an_answer_has_openais_shape() -> None:
    body = (await App().complete()).json()
    assert body["object"] == "text_completion"
    assert body["id"].startswith("cmpl-")
    nothing = dict.fromkeys(
        ("logprobs", "stop_reason", "prompt_logprobs", "prompt_token_ids", "token_ids")
    )
    assert body["choices"] == [{"index": 0, "text": REPLY, "finish_reason": "stop", **nothing}]
    assert body["usage"]["completion_tokens"] == NUM_TOKENS


async def test_sixteen_tokens_are_the_default() -> None:
    app = App(FakeFrontend(default_params={"max_tokens": 99}))
    await app.complete()
    assert app.frontend.calls[0].params.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "texts", "ids"),
    [
        ("Hi", ["Hi"], [None]),
        (["Hi", "Ho"], ["Hi", "Ho"], [None, None]),
        (HI, [None], [tuple(HI)]),
        ([HI, HI[:1]], [None, None], [tuple(HI), tuple(HI[:1])]),
        (["Hi", HI], ["Hi", None], [None, tuple(HI)]),
    ],
)
async def test_forms_of_prompts(prompt: object, texts: list[str], ids: list[object]) -> None:
    app = App()
    answer = await app.complete(prompt=prompt)
    prompts = [call.prompt for call in app.frontend.calls]
    assert [p.text for p in prompts] == texts
    assert [p.token_ids for p in prompts] == ids
    assert [c["index"] for c in answer.json()["choices"]] == list(range(len(texts)))


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (None, "prompt"), ([], "prompt"), (5, "prompt"), ({"a": 1}, "prompt"),
        (["Hi", 5], "prompt[1]"), ([[1, 2], []], "prompt[1]"), ([1, True], "prompt[0]"),
        ([[1, "x"]], "prompt[0]"), ([1.5], "prompt[0]"), ([-1], "prompt"), ([[1], [1, -2]], "prompt[1]"),
    ],
)  # fmt: skip
async def test_what_is_no_prompt_is_refused(prompt: object, param: str) -> None:
    answer = await App().complete(prompt=prompt)
    assert answer.status == 400
    assert answer.error["code"] == "invalid_request"
    assert answer.error["param"] == param


async def test_samples_of_several_prompts_are_numbered_in_order() -> None:
    body = (await App().complete(prompt=["a", "b"], n=2)).json()
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["completion_tokens"] == 4 * NUM_TOKENS


async def test_a_stream_of_several_prompts() -> None:
    answer = await App().complete(
        prompt=["a", "b"], n=2, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = answer.events()
    for index in range(4):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(c["text"] for c in mine) == REPLY
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["stop"]
    assert last["usage"]["completion_tokens"] == 4 * NUM_TOKENS


async def test_one_bad_prompt_among_several_ends_the_others() -> None:
    def refuse_second(call: Call) -> None:
        if call.prompt.param == "prompt[1]":
            raise PromptTooLongError("It is too long.", param=call.prompt.param)

    for stream in (False, True):
        app = App(FakeFrontend(before=refuse_second))
        answer = await app.complete(prompt=["a", "b", "c"], stream=stream)
        if stream and answer.status == 200:
            assert answer.events()[-1]["error"]["param"] == "prompt[1]"
        else:
            assert answer.status == 400
            assert answer.error["param"] == "prompt[1]"
        assert app.frontend.num_open == 0
        assert app.app.state.context.models.default.admission.num_waiting == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["Hi there", HI])
async def test_echo_puts_the_prompt_in_front(prompt: object, stream: bool) -> None:
    answer = await App().complete(prompt=prompt, echo=True, stream=stream)
    choices = [e["choices"][0] for e in answer.events()] if stream else answer.json()["choices"]
    text = "".join(choice["text"] for choice in choices)
    assert text == f"Hi there{REPLY}"


@pytest.mark.parametrize("stream", [False, True])
async def test_log_probabilities(stream: bool) -> None:
    answer = await App().complete(logprobs=1, stream=stream)
    if stream:
        parts = [e["choices"][0]["logprobs"] for e in answer.events()]
    else:
        parts = [answer.json()["choices"][0]["logprobs"]]
    tokens = [t for p in parts for t in p["tokens"]]
    offsets = [o for p in parts for o in p["text_offset"]]
    assert "".join(tokens) == REPLY
    assert offsets == [sum(map(len, tokens[:i])) for i in range(len(tokens))]
    assert [v for p in parts for v in p["token_logprobs"]] == [-2.0] * NUM_TOKENS
    top = [t for p in parts for t in p["top_logprobs"]]
    assert all(sorted(t.values(), reverse=True) == [-1.0, -2.0] for t in top)


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_with_log_probabilities_scores_the_prompt(stream: bool) -> None:
    app = App()
    answer = await app.complete(
        prompt="Hi there", echo=True, logprobs=1, max_tokens=0, stream=stream
    )
    if stream:
        choices = [e["choices"][0] for e in answer.events()]
        assert len(choices) == 1
    else:
        choices = answer.json()["choices"]
        assert answer.json()["usage"]["completion_tokens"] == 0
    [choice] = choices
    assert choice["text"] == "Hi there"
    assert choice["finish_reason"] == "length"
    assert "".join(choice["logprobs"]["tokens"]) == "Hi there"
    assert choice["logprobs"]["token_logprobs"] == [None] + [-2.0] * (len(HI) - 1)
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert app.frontend.calls[0].params.max_tokens == 1


async def test_no_tokens_without_echo_is_refused() -> None:
    assert (await App().complete(max_tokens=0)).error["param"] == "max_tokens"


async def test_prompt_log_probabilities() -> None:
    choice = (await App().complete(prompt="Hi there", prompt_logprobs=1)).json()["choices"][0]
    first, *others = choice["prompt_logprobs"]
    assert first is None
    assert len(others) == len(HI) - 1
    assert others[0][str(HI[1])] == {
        "logprob": -2.0, "rank": 2, "decoded_token": TOKENIZER.decode([HI[1]])
    }  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
async def test_token_ids_where_asked(stream: bool) -> None:
    answer = await App().complete(return_token_ids=True, stream=stream)
    choices = [e["choices"][0] for e in answer.events()] if stream else answer.json()["choices"]
    assert choices[0]["prompt_token_ids"] == TOKENIZER.encode("Hi")
    assert [i for c in choices for i in c["token_ids"]] == TOKENIZER.encode(REPLY)


async def test_what_is_not_possible_is_said() -> None:
    assert (await App().complete(best_of=3)).error["param"] == "best_of"
    assert (await App().complete(suffix="x")).error["param"] == "suffix"
    assert (await App().complete(best_of=2, n=2)).status == 200


async def test_an_error_of_the_frontend_keeps_its_place() -> None:
    app = App(FakeFrontend(before=fail(PromptTooLongError("Too long.", param="prompt"))))
    answer = await app.complete()
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
