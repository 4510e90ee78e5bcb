"""vLLM's fields of requests.

Guided decoding works, neutral values pass, unavailable fields say why.
"""

from __future__ import annotations

from typing import Any

import pytest

from sensorium.compat.fields import FIELD_RULES
from sensorium.compat.rule import Effect
from sensorium.errors import InvalidRequestError
from sensorium.models.embedder import Embedder
from sensorium.params import StructuredOutputs
from sensorium.server.openai.protocol import ChatBody, CompletionBody
from tests.server.fake_frontend import FakeFrontend
from tests.server.harness import USER, App

CHAT = "/v1/chat/completions"
PATHS: dict[str, dict[str, Any]] = {CHAT: {"messages": USER}, "/v1/completions": {"prompt": "a"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}

GUIDED: list[tuple[dict[str, Any], StructuredOutputs | None]] = [
    ({"guided_json": SCHEMA}, StructuredOutputs(json=SCHEMA)),
    ({"guided_json": '{"type": "object"}'}, StructuredOutputs(json='{"type": "object"}')),
    ({"guided_regex": "a+"}, StructuredOutputs(regex="a+")),
    ({"guided_choice": ["yes", "no"]}, StructuredOutputs(choice=("yes", "no"))),
    ({"guided_grammar": 'start: "a"'}, StructuredOutputs(grammar='start: "a"')),
    ({"guided_json_object": True}, StructuredOutputs(json_object=True)),
    ({"guided_json_object": False}, None),
    ({"guided_choice": None, "guided_regex": "b"}, StructuredOutputs(regex="b")),
    (
        {"guided_json": SCHEMA, "guided_decoding_backend": "xgrammar", "guided_whitespace_pattern": " ?"},
        StructuredOutputs(json=SCHEMA, whitespace_pattern=" ?"),
    ),
    ({"guided_whitespace_pattern": " "}, None),
    (
        {"structured_outputs": {"json": None, "regex": "a", "structural_tag": None, "json_object": None}},
        StructuredOutputs(regex="a"),
    ),
    ({"structural_tag": '{"a": 1}'}, StructuredOutputs(structural_tag='{"a": 1}')),
    ({"structured_outputs": {"json": None, "regex": None}}, None),
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("fields", "expected"), GUIDED, ids=lambda v: str(v)[:40])
async def test_guided_decoding(
    path: str, fields: dict[str, Any], expected: StructuredOutputs | None
) -> None:
    app = App()
    answer = await app.post(path, {**PATHS[path], **fields})
    assert answer.status == 200, answer.body
    assert app.frontend.calls[0].params.structured_outputs == expected


NEUTRAL: dict[str, Any] = {
    "use_beam_search": False, "length_penalty": 1.0, "early_stopping": False, "include_reasoning": False,
    "truncate_prompt_tokens": None, "kv_transfer_params": None, "vllm_xargs": {}, "logits_processors": [],
    "return_tokens_as_token_ids": False, "repetition_detection": None, "stream_interval": 5, "session_id": "x",
    "watermarking": None, "mm_payload": "tensors", "routed_experts_prompt_start": 0, "prompt_embeds": None,
    "top_k": 0, "min_p": 0.0, "bad_words": [], "allowed_token_ids": None, "stop": [], "logit_bias": {},
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
async def test_neutral_values_pass(path: str) -> None:
    app = App()
    assert (await app.post(path, {**PATHS[path], **NEUTRAL})).status == 200
    plain = App()
    await plain.post(path, PATHS[path])
    assert app.frontend.calls[0].params == plain.frontend.calls[0].params


@pytest.mark.parametrize(("path", "body"), [(CHAT, ChatBody), ("/v1/completions", CompletionBody)])
async def test_null_passes_for_every_field(path: str, body: type[Any]) -> None:
    needed = {"messages", "prompt", *PATHS[path]}
    fields = {name for name in (*body.model_fields, *FIELD_RULES) if name not in needed}
    elsewhere = {n for n in FIELD_RULES if n not in body.model_fields and _means_other(n, body)}
    answer = await App().post(path, {**PATHS[path], **dict.fromkeys(fields - elsewhere)})
    assert answer.status == 200, answer.body


def _means_other(name: str, body: type[Any]) -> bool:
    to = FIELD_RULES[name].to.partition(".")[0]
    return bool(to) and to not in body.model_fields


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"use_beam_search": True}, "use_beam_search", "beam search does not exist here"),
        ({"length_penalty": 1.5}, "length_penalty", "beam search"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "shorten the prompt"),
        ({"echo": True}, "echo", "only the answer is returned"),
        ({"structural_tag": 5}, "structural_tag", "structural_tag must be a structural tag"),
        ({"guided_regex": 5}, "guided_regex", "guided_regex must be a non-empty string"),
        ({"guided_choice": []}, "guided_choice", "guided_choice must be"),
        ({"guided_json": [1]}, "guided_json", "guided_json must be a JSON schema"),
        ({"use_activation": True}, "use_activation", "Unknown field 'use_activation'"),
        ({"guided_jsn": {}}, "guided_jsn", "Unknown field"),
    ],
)  # fmt: skip
async def test_what_cannot_be_had_names_the_clients_field(
    fields: dict[str, Any], param: str, words: str
) -> None:
    answer = await App().post(CHAT, {"messages": USER, **fields})
    assert answer.status == 400
    assert answer.error["param"] == param
    assert words in answer.error["message"]
    assert "structured_outputs" not in answer.error["message"] or "structured" in param


async def test_an_error_of_the_grammar_names_the_clients_field() -> None:
    def fail(call: object) -> None:
        raise InvalidRequestError("structured_outputs.json is no "
                                  "schema.", param="structured_outputs.json")  # fmt: skip

    answer = await App(FakeFrontend(before=fail)).post(
        CHAT, {"messages": USER, "guided_json": {"type": "x"}}
    )
    assert (answer.error["param"], answer.error["message"]) == (
        "guided_json",
        "guided_json is no schema.",
    )


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"guided_json": {}, "structured_outputs": {"whitespace": "x"}}, "structured_outputs.whitespace",
         "structured_outputs.whitespace must be one of"),
        ({"documents": [], "chat_template_kwargs": 3}, "chat_template_kwargs", "chat_template_kwargs must be"),
        ({"documents": [], "chat_template_kwargs": None}, None, ""),
    ],
)  # fmt: skip
async def test_what_the_client_says_in_our_words_is_named_in_them(
    fields: dict[str, Any], param: str | None, words: str
) -> None:
    answer = await App().post(CHAT, {"messages": USER, **fields})
    if param is None:
        assert answer.status == 200
        return
    assert answer.error["param"] == param
    assert answer.error["message"].startswith(words)


async def test_a_hint_at_an_option_is_not_renamed() -> None:
    def fail(call: object) -> None:
        name = "structured_outputs.json"
        raise InvalidRequestError(f"{name} is none, or set "
                                  "structured_outputs.unsupported.", param=name)  # fmt: skip

    answer = await App(FakeFrontend(before=fail)).post(CHAT, {"messages": USER, "guided_json": {}})
    expected = "guided_json is none, or set structured_outputs.unsupported."
    assert answer.error["message"] == expected


async def test_documents_reach_the_template() -> None:
    app = App()
    documents = [{"title": "t", "text": "x"}]
    body = {"messages": USER, "documents": documents, "chat_template_kwargs": {"b": 1}}
    assert (await app.post(CHAT, body)).status == 200
    prompt: Any = app.frontend.calls[0].prompt
    assert prompt.chat_template_kwargs == {"documents": documents, "b": 1}
    unknown = await app.post("/v1/completions", {"prompt": "a", "documents": documents})
    assert unknown.error["message"].startswith("Unknown field 'documents'")


async def test_defaults_of_the_templates_variables() -> None:
    app = App(default_chat_template_kwargs={"enable_thinking": False, "a": 1})
    await app.post(CHAT, {"messages": USER})
    await app.post(CHAT, {"messages": USER, "chat_template_kwargs": {"enable_thinking": True}})
    prompts: list[Any] = [call.prompt for call in app.frontend.calls]
    assert [p.chat_template_kwargs for p in prompts] == [{}, {"enable_thinking": True}]
    assert [p.default_template_kwargs for p in prompts] == [{"enable_thinking": False, "a": 1}] * 2


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("forced", [False, True])
async def test_usage_of_every_stream(path: str, forced: bool) -> None:
    app = App(enable_force_include_usage=forced)
    events = (await app.post(path, {**PATHS[path], "stream": True})).events()
    assert [bool(event.get("usage")) for event in events] == [forced] * len(events)
    assert bool(events[-1]["choices"]) is not forced


async def test_fields_of_embeddings() -> None:
    app = App(FakeFrontend(embedder=Embedder(8)))
    body = {"input": "a", "use_activation": False, "embed_dtype": "float32", "endianness": "native"}
    assert (await app.post("/v1/embeddings", body)).status == 200
    assert app.frontend.calls[0].params.normalize is False
    refused = await app.post("/v1/embeddings", {"input": "a", "embed_dtype": "float16"})
    assert refused.error["param"] == "embed_dtype"


def test_each_rule_says_why() -> None:
    for rule in FIELD_RULES.values():
        assert rule.why
        assert (rule.convert is not None) == (rule.effect is Effect.SAME) == bool(rule.to)
