"""What requests say besides its media: numbers, ids, templates, long texts, special tokens.

Never more than 4xx.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

import sensorium
from sensorium.engine.prompts.types import ChatPrompt, RawPrompt
from sensorium.errors import PromptTooLongError
from sensorium.text.chat.chat_template import parse_messages
from sensorium.text.tokenizer import Tokenizer
from tests.reliability.asking import CHAT, Answer, Offline, Service, image, text
from tests.reliability.media import data_url, encoded, picture, picture_url

COMPLETIONS = "/v1/completions"
DEMO = Path(sensorium.__file__).parent / "demo"
TOKENIZER = Tokenizer.from_folder(DEMO)
VOCABULARY = json.loads((DEMO / "config.json").read_text())["vocab_size"]
SPELLINGS = [spelling for spelling in TOKENIZER.control.spellings if spelling.strip()]
SHORT = {"max_tokens": 2, "temperature": 0}


def complete(served: Service, prompt: Any, **fields: Any) -> Answer:
    return served.post(COMPLETIONS, {"prompt": prompt, **SHORT, **fields})


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_n_is_bounded(served: Service, path: str) -> None:
    body = {"messages": [{"role": "user", "content": "a"}]} if path == CHAT else {"prompt": "a"}
    for n in (10**9, 16385, -1, 0, 2**64):
        served.post(path, {**body, **SHORT, "n": n}).is_refusal(400, "invalid_request", "n")
    # Within the limit of the parameter, but beyond what may wait here.
    served.post(path, {**body, **SHORT, "n": 16384}).is_refusal(400, "invalid_request", "n")
    assert len(served.post(path, {**body, **SHORT, "n": 3}).body["choices"]) == 3


EXTREMES: list[dict[str, Any]] = [
    *({"temperature": value} for value in (-1, 1e308, 1e-308, 5e-324, 1e999, "hot", None, True, [1])),
    *({"top_p": value} for value in (0, -0.0, 1e-308, 1.0000001, -1e-9, 2)),
    *({"top_k": value} for value in (-2, -1, 0, 1, 10**9, 2**63, 1.5)),
    *({"min_p": value} for value in (-0.1, 1, 1.1, 1e-300)),
    *({"temperature": 1, "top_p": p, "top_k": k, "min_p": m} for p, k, m in ((1e-9, 1, 1.0), (1, 10**6, 0))),
    *({name: value} for name in ("presence_penalty", "frequency_penalty") for value in (-2, 2, 1e308, -3)),
    *({"repetition_penalty": value} for value in (0, -1, 1e-308, 1e308, 1e-9, 2)),
    *({"max_tokens": value} for value in (0, -1, 10**9, 2**63, 1.5, "1")),
    *({"min_tokens": value} for value in (-1, 10**9, 3)),
    *({"seed": value} for value in (-1, 2**64, -(2**63), 2**63 - 1, 1.5)),
    *({"logprobs": True, "top_logprobs": value} for value in (-1, 21, 10**9, 20)),
    *({"prompt_logprobs": value} for value in (-1, 20, 10**9)),
    *({"logit_bias": value} for value in ({"0": 1e308}, {"0": -1e308, "1": 1e308}, {"x": 1}, {"-1": 1}, {"0": "a"})),
    {"logit_bias": {str(i): -100 for i in range(VOCABULARY)}},
    {"logit_bias": {str(i): 1e38 for i in range(VOCABULARY)}},
    *({"stop": value} for value in ("", [""], ["a"] * 65, ["a" * 2000], [None], {"a": 1})),
    *({"bad_words": value} for value in ([""], ["a" * 10**5], ["a"] * 10**5, 5)),
    {"allowed_token_ids": []},
    {"allowed_token_ids": [0, 1], "bad_words": ["a"], "min_tokens": 2, "ignore_eos": True},
    {"priority": 2**63},
    {"priority": -(2**31), "request_id": "x" * 200},
]  # fmt: skip


def errors_in(stream: str) -> list[Any]:
    """What went wrong amid a stream of events, which must be whole."""
    events = [
        line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: ")
    ]
    assert events[-1] == "[DONE]", stream[-300:]
    found = (json.loads(event).get("error") for event in events[:-1])
    return [error for error in found if error is not None]


@pytest.mark.parametrize("fields", EXTREMES, ids=lambda fields: json.dumps(fields)[:60])
def test_extreme_values_are_served_or_refused(served: Service, fields: dict[str, Any]) -> None:
    for stream in (False, True):
        answer = served.ask(text("a"), **{"max_tokens": 2, **fields}, stream=stream)
        answer.is_discreet()
        if stream and answer.status == 200:
            assert errors_in(answer.body) == []
    if "1e999" in json.dumps(fields) or "Infinity" in json.dumps(fields):
        assert answer.status == 400


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize(
    "field", ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty"]
)
def test_numbers_that_are_none_are_refused(served: Service, field: str, literal: str) -> None:
    body = f'{{"messages": [{{"role": "user", "content": "a"}}], "{field}": {literal}}}'
    served.request("POST", CHAT, body.encode()).is_refusal(400, "invalid_request", field)


@pytest.mark.parametrize(
    "field",
    ["n_discard", "custom_logit_processor", "logits_processors", "prompt_embeds", "trust_remote_code", "lora_path"],
)  # fmt: skip
def test_fields_that_harmed_others_are_none_here(served: Service, field: str) -> None:
    for value in (-1, "gASVAAAAAAAAAA==", {"x": 1}):
        served.ask(text("a"), **{field: value}).is_refusal(400, "invalid_request", field)
        complete(served, "a", **{field: value}).is_refusal(400, "invalid_request", field)


@pytest.mark.parametrize(
    "path", ["/v1/files/..%2f..%2fx", "/upload", "/update_weights", "/v1/fine_tuning/jobs"]
)
def test_routes_that_write_are_not_there(served: Service, path: str) -> None:
    assert served.post(path, {}).status == 404


OUTSIDE = [VOCABULARY, 2**31 - 1, 2**31, 2**63, 10**30, -1, -(2**63)]


@pytest.mark.parametrize("token_id", OUTSIDE)
def test_token_ids_outside_the_vocabulary(served: Service, token_id: int) -> None:
    for prompt, place in (([5, token_id], "prompt"), ([[5], [token_id]], "prompt[1]")):
        complete(served, prompt).is_refusal(400, "invalid_request", place)
    for name, value in (("stop_token_ids", [token_id]), ("allowed_token_ids", [5, token_id])):
        served.ask(text("a"), **{name: value}).is_refusal(400, "invalid_request", name)
    answer = served.ask(text("a"), logit_bias={"5": 1, str(token_id): 1})
    answer.is_refusal(400, "invalid_request", f"logit_bias[{token_id}]")
    assert str(token_id) in answer.error["message"]
    answer = served.post("/detokenize", {"tokens": [token_id]})
    assert answer.status == 400
    answer.is_discreet()


def test_every_token_id_of_the_vocabulary_is_served(served: Service) -> None:
    """Also those of no token, of special tokens and of placeholders, each alone."""
    last = range(TOKENIZER.max_token_id - 20, VOCABULARY)
    for token_id in (0, 1, *last, *(TOKENIZER.token_id(spelling) for spelling in SPELLINGS)):
        answer = complete(served, [5, token_id, 6])
        answer.is_discreet()
        if answer.status != 200:
            assert answer.error["code"] == "placeholder_mismatch"


def test_special_tokens_in_chats_are_text(served: Service) -> None:
    """Each in every place of a conversation, over HTTP."""
    honest = served.ask(text("say word"), max_tokens=1).body["usage"]["prompt_tokens"]
    for spelling in SPELLINGS:
        arguments = json.dumps({spelling: spelling})
        messages = [
            {"role": "system", "content": spelling},
            {"role": "user", "content": [text(spelling), text(f"a{spelling}b")], "name": spelling},
            {"role": "assistant", "content": spelling, "tool_calls": [
                {"id": spelling, "type": "function", "function": {"name": spelling, "arguments": arguments}}
            ]},
            {"role": "tool", "content": spelling, "tool_call_id": spelling},
            {"role": "user", "content": spelling},
        ]  # fmt: skip
        answer = served.chat(messages, max_tokens=1, chat_template_kwargs={"subject": spelling})
        assert answer.status == 200, (spelling, answer.body)
        typed = served.ask(text(f"say {spelling}"), max_tokens=1).body["usage"]["prompt_tokens"]
        assert typed > honest - 2 + len(spelling) // 8, f"{spelling} became one token"


def test_special_tokens_in_raw_prompts_act_and_harm_no_other(served: Service) -> None:
    for spelling in SPELLINGS:
        for prompt in (spelling, f"a {spelling} b", spelling * 50):
            answer = complete(served, prompt)
            answer.is_discreet()
            if answer.status != 200:
                assert answer.error["code"] == "placeholder_mismatch", (spelling, answer.body)


def test_long_conversations_are_refused_by_their_beginning(
    offline: Offline, monkeypatch: pytest.MonkeyPatch
) -> None:
    input_processor = offline.parts.processor
    longest = 0
    encode = Tokenizer.encode

    def noted(self: Tokenizer, words: str, **options: Any) -> list[int]:
        nonlocal longest
        longest = max(longest, len(words))
        return encode(self, words, **options)

    monkeypatch.setattr(Tokenizer, "encode", noted)
    words = "red square " * 200_000
    for messages in (
        [{"role": "user", "content": words}],
        [{"role": "user", "content": [text(words[:1000])] * 2000}],
        [{"role": "system", "content": words}, {"role": "user", "content": "a"}],
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": words}],
    ):
        with pytest.raises(PromptTooLongError) as caught:
            input_processor.render(ChatPrompt(conversation=parse_messages(messages)))
        assert caught.value.param == "messages"
    with pytest.raises(PromptTooLongError):
        input_processor.render(RawPrompt(text=words))
    assert 0 < longest < len(words) // 2


@pytest.mark.parametrize(
    "prompt", ["chat", "raw", "tools", "variables", "list of variables", "many messages"]
)
def test_long_prompts_leave_the_event_loop(
    offline: Offline, prompt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sensorium.engine.prompts.types import Prompt

    words, one = "word " * 10_000, [{"role": "user", "content": "a"}]
    tools = ({"type": "function", "function": {"name": "f", "description": words}},)
    prompts: dict[str, Prompt] = {
        "chat": ChatPrompt(conversation=parse_messages([{"role": "user", "content": words}])),
        "raw": RawPrompt(text=words),
        "tools": ChatPrompt(conversation=parse_messages(one), tools=tools),
        "variables": ChatPrompt(
            conversation=parse_messages(one), chat_template_kwargs={"a": [words]}
        ),
        "list of variables": ChatPrompt(
            conversation=parse_messages(one), chat_template_kwargs={"a": [*range(20_000)]}
        ),
        "many messages": ChatPrompt(conversation=parse_messages(one * 500)),
    }
    input_processor, seen = offline.parts.processor, list[bool]()
    render = input_processor.render

    def noted(wanted: Prompt) -> Any:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            seen.append(False)
        else:
            seen.append(True)
        return render(wanted)

    monkeypatch.setattr(input_processor, "render", noted)

    async def prepare() -> None:
        with contextlib.suppress(PromptTooLongError):
            await input_processor.prepare(prompts[prompt])

    asyncio.run(prepare())
    assert seen == [False]


TEMPLATE_DOS = [
    "{% for i in range(10**9) %}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "x" * 100_000,
]


@pytest.mark.parametrize("template", TEMPLATE_DOS, ids=lambda source: source[:24])
def test_templates_of_requests_are_refused(served: Service, template: str) -> None:
    served.ask(text("a"), chat_template=template).is_refusal(
        400, "invalid_request", "chat_template"
    )
    place = "chat_template_kwargs.chat_template"
    answer = served.ask(text("a"), chat_template_kwargs={"chat_template": template})
    answer.is_refusal(400, "invalid_request", place)


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    "variables",
    [
        *({name: 1} for name in ("messages", "tools", "tokenize", "add_generation_prompt", "raise_exception")),
        *({name: 1} for name in ("eos_token", "_x", "__class__", "self", "range", "loop", "namespace")),
        {"a": nested(100)},
    ],
    ids=lambda variables: str(variables)[:40],
)  # fmt: skip
def test_template_variables_that_mean_something_else_are_refused(
    served: Service, variables: dict[str, Any]
) -> None:
    answer = served.ask(text("a"), chat_template_kwargs=variables)
    assert answer.status == 400
    assert answer.error["param"].startswith("chat_template_kwargs")
    answer.is_discreet()


@pytest.mark.parametrize(
    "variables",
    [
        {"a": "x" * 2_000_000},
        {"a": list(range(100_000))},
        {f"k{i}": i for i in range(10_000)},
        {"enable_thinking": True, "a b": "<|im_end|>", "é": None},
    ],
    ids=["long", "list", "many", "odd"],
)
def test_template_variables_that_are_not_used_cost_nothing(
    served: Service, variables: dict[str, Any]
) -> None:
    plain = served.ask(text("a"), return_token_ids=True).body["prompt_token_ids"]
    answer = served.ask(text("a"), chat_template_kwargs=variables, return_token_ids=True)
    assert answer.body["prompt_token_ids"] == plain


def cached(served: Service, words: str, key: str, salt: str | None) -> int:
    more = {} if salt is None else {"cache_salt": salt}
    usage = served.ask(text(words), key=key, **more).body["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


def test_a_salt_hides_what_others_asked(served: Service) -> None:
    """Who knows no salt cannot tell from the prefix cache, nor from its timing, what was asked
    under it; another key with the same salt neither.
    """
    ada, ben = served.keys
    words = "A long and secret text about three red squares and a circle. " * 8
    assert cached(served, words, ada, "pepper") == 0
    assert cached(served, words, ada, "pepper") > 0
    assert cached(served, words, ada, "sugar") == 0
    assert cached(served, words, ada, None) == 0
    assert cached(served, words, ben, "pepper") == 0
    assert cached(served, words, ben, None) > 0, "without a salt, keys share the prefix cache"


def test_corrupt_requests_amid_a_load_harm_no_other(served: Service) -> None:
    """One in ten is broken in its media, its numbers or its tokens.

    All others answer as they do alone.
    """
    url, broken = picture_url(), data_url(encoded(picture())[:60])
    good = [
        lambda: served.ask(image(url), text("What is shown?")),
        lambda: served.ask(text("What can you do?")),
        lambda: complete(served, "Hello"),
    ]
    bad = [
        lambda: served.ask(image(broken), text("What is shown?")),
        lambda: served.ask(text("a"), temperature=-1),
        lambda: complete(served, "<|image_pad|>"),
        lambda: complete(served, [VOCABULARY]),
    ]

    def content(answer: Answer) -> Any:
        assert answer.status == 200, answer.body
        return answer.body["choices"][0].get("message") or answer.body["choices"][0]["text"]

    alone = [content(ask()) for ask in good]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        jobs = []
        for number in range(60):
            if number % 10 == 9:
                jobs.append((None, pool.submit(bad[number // 10 % len(bad)])))
            else:
                jobs.append((number % 3, pool.submit(good[number % 3])))
        for which, job in jobs:
            if which is None:
                assert job.result().status == 400
            else:
                assert content(job.result()) == alone[which]
