"""Templates are tried when they are compiled, and whoever made a mistake is told so."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from sensorium.errors import ChatTemplateError, InvalidRequestError
from sensorium.text.chat.chat_template import ChatTemplate, parse_messages
from sensorium.text.chat.template_files import compile_template
from sensorium.text.tokenizer import Tokenizer

USER = [{"role": "user", "content": "Hi"}]

CALLS_OR_CONTENT = (
    "{% for message in messages %}"
    "{% if message.role == 'tool_calls' or message.tool_calls is defined %}"
    "{% if message.tool_calls is defined %}{% set tool_calls = message.tool_calls %}"
    "{% else %}{% set tool_calls = message.content %}{% endif %}"
    "{% for call in tool_calls %}[CALL {{ call.function.name }}]{% endfor %}"
    "{% elif message.role == 'user' %}{{ '[INST]' + message['content'] + '[/INST]' }}"
    "{% else %}{{ raise_exception('only users and their tools, please') }}{% endif %}{% endfor %}"
)
"""As templates of Mistral's tools do it: what is looped over is either the calls or the content."""

LOOPS_OVER_RESULTS = (
    "{% for message in messages %}{% if message.role == 'tool' %}"
    "{% for part in message.content %}{{ part.text }}{% endfor %}"
    "{% else %}{{ message.role ~ ':' + message.content }}{% endif %}{% endfor %}"
)
HIDDEN_LOOP = (
    "{% for message in messages %}{% set fields = dict(message) %}"
    "{% for part in fields.values() | list | last %}{{ part.text }}{% endfor %}{% endfor %}"
)
BROKEN = "{% for message in messages %}{{ message.content + 1 }}{% endfor %}"


def rendered(template: ChatTemplate, messages: Sequence[Mapping[str, Any]], **more: Any) -> str:
    conversation = parse_messages(messages)
    return template.render(conversation, placeholder_text=lambda *_: "<image>", **more).text


def chat(source: str, tokenizer: Tokenizer, **options: Any) -> ChatTemplate:
    return ChatTemplate({"default": source}, tokenizer, **options)


def test_calls_are_no_alias_of_content(chatml: Tokenizer) -> None:
    template = chat(CALLS_OR_CONTENT, chatml)
    assert template.content_format == "string"
    assert rendered(template, USER) == "[INST]Hi[/INST]"
    call = {"id": "123456789", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    called = [*USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert rendered(template, called) == "[INST]Hi[/INST][CALL f]"


@pytest.mark.parametrize(
    ("source", "content_format", "text"),
    [(LOOPS_OVER_RESULTS, "string", "user:Hi"), (HIDDEN_LOOP, "openai", "Hi")],
)
def test_the_form_that_works_is_taken(
    chatml: Tokenizer, source: str, content_format: str, text: str
) -> None:
    template = chat(source, chatml)
    assert template.content_format == content_format
    assert rendered(template, USER) == text


def test_trying_knows_the_special_tokens(chatml: Tokenizer) -> None:
    source = "{{ eos_token + messages[0].content }}"
    assert chat(source, chatml).content_format == "string"
    assert rendered(chat(source, chatml), USER) == f"{chatml.special_tokens['eos_token']}Hi"


def test_a_list_written_as_text_does_not_count_as_rendered() -> None:
    assert compile_template("{{ messages[0].content | string }}").content_format == "string"
    assert compile_template("{{ messages[0].content | tojson }}").content_format == "string"


def test_a_failing_template_is_not_the_clients_fault(
    chatml: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        template = chat(BROKEN, chatml)
    assert "fails on a plain user message (TypeError" in caplog.text
    with pytest.raises(
        ChatTemplateError, match=r"TypeError.*well formed.*--chat-template"
    ) as caught:
        rendered(template, USER)
    assert (caught.value.status, caught.value.code) == (422, "chat_template_failed")
    assert caught.value.type == "model_error"


def test_a_template_for_tools_need_not_render_without(
    chatml: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        sources = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools | length }}"}
        template = ChatTemplate(sources, chatml)
    assert not caplog.records
    assert rendered(template, USER, tools=[{"type": "function", "function": {"name": "f"}}]) == "1"


def test_failing_on_some_conversations_only_is_not_the_clients_fault_either(
    chatml: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        template = chat("{{ messages[0].content }}{{ messages[1].extra.more }}", chatml)
    with pytest.raises(ChatTemplateError, match="UndefinedError"):
        rendered(template, [*USER, *USER])


def test_what_came_with_the_request_is_the_clients(chatml: Tokenizer) -> None:
    template = chat("{{ messages[0].content + (1 // one) | string }}", chatml)
    with pytest.raises(InvalidRequestError, match="ZeroDivisionError") as caught:
        rendered(template, USER, chat_template_kwargs={"one": 0})
    assert caught.value.param == "chat_template_kwargs"
    trusting = chat(BROKEN, chatml, trust_request_chat_template=True)
    with pytest.raises(InvalidRequestError, match="TypeError") as caught:
        rendered(trusting, USER, chat_template="{{ messages[0].content + 2 }}")
    assert caught.value.param == "chat_template"


def test_what_the_operator_gave_is_not_the_clients(chatml: Tokenizer) -> None:
    template = chat("{{ messages[0].content + (1 // one) | string }}", chatml)
    with pytest.raises(ChatTemplateError, match="ZeroDivisionError"):
        rendered(template, USER, default_kwargs={"one": 0})
    assert (
        rendered(template, USER, default_kwargs={"one": 0}, chat_template_kwargs={"one": 1})
        == "Hi1"
    )


NARRATOR = [{"role": "narrator", "content": " Once upon <|im_start|>a time "}]


def test_custom_roles_are_the_templates_matter(chatml: Tokenizer) -> None:
    takes_all = "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}{% endfor %}"
    assert rendered(chat(takes_all, chatml), NARRATOR) == "narrator: Once upon <|im_start|>a time"


def test_custom_roles_that_a_template_refuses(chatml: Tokenizer) -> None:
    with pytest.raises(InvalidRequestError, match=r"only users.*messages\[0\].role is 'narrator'"):
        rendered(chat(CALLS_OR_CONTENT, chatml), NARRATOR)


def test_custom_roles_that_a_template_leaves_out(chatml: Tokenizer) -> None:
    leaves_out = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(InvalidRequestError, match=r"leaves out.*Did you mean 'user'") as caught:
        rendered(chat(leaves_out, chatml), [*USER, {"role": "usr", "content": "there"}])
    assert caught.value.param == "messages[1].role"


def test_custom_roles_never_become_control_tokens(chatml: Tokenizer) -> None:
    source = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    template = chat(source, chatml)
    start = chatml.token_id("<|im_start|>")
    prompt = template.render(
        parse_messages([{"role": "im_start", "content": "x"}]), placeholder_text=lambda *_: ""
    )
    assert prompt.text == "<|im_start|>x"
    assert start not in prompt.token_ids
