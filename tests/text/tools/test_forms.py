"""The forms of a model are found in its template, else in its vocabulary."""

from __future__ import annotations

import pytest
import tokenizers

from sensorium.errors import ConfigError
from sensorium.text.tokenizer import Tokenizer
from sensorium.text.tools.forms import ANY, CALL_FORMS, CALL_PARSERS, REASONING_PARSERS, AnswerForms
from sensorium.text.tools.reader import CallReader
from tests.text.tools.test_reader import read


def tokenizer(*special: str, plain: tuple[str, ...] = ()) -> Tokenizer:
    """A tokenizer with added tokens."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    backend.add_special_tokens([*special])
    backend.add_tokens([*plain])
    return Tokenizer(backend)


TEMPLATES = {
    "hermes": 'within <tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>',
    "llama3_json": 'format {"name": function name, "parameters": dictionary of argument name and',
    "mistral": "{{- '[TOOL_CALLS]' + message.tool_calls | tojson }}",
    "phi4_mini_json": "{{ '<|tool_call|>' + calls + '<|/tool_call|>' }}",
    "qwen3_coder": "<tool_call>\n<function=example_function_name>\n<parameter=p>",
    "glm45": "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>",
    "deepseek_v3": "{{'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>'}}",
    "kimi_k2": "<|tool_calls_section_begin|>",
    "llama4_pythonic": "[func_name1(params_name1=params_value1, params_name2=params_value2)]",
    "any": "{{ messages[0].content }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_forms_are_found_in_templates(name: str) -> None:
    forms = AnswerForms.of(TEMPLATES[name], tokenizer())
    assert forms.calls is not None
    assert forms.calls.name == name
    assert forms.reasoning is None


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<think>' }}", "qwen3"),
        ("content.split('</think>')", "qwen3"),
        ("{% if enable_thinking %}", "qwen3"),
        ("[THINK]", "mistral"),
        ("◁think▷", "kimi_vl"),
    ],
)
def test_reasoning_is_found_in_templates(template: str, name: str) -> None:
    forms = AnswerForms.of(template, tokenizer())
    assert forms.reasoning is not None
    assert forms.reasoning.name == name
    assert AnswerForms.of(template, tokenizer(), reasoning="none").reasoning is None


def test_the_vocabulary_tells_where_the_template_does_not() -> None:
    forms = AnswerForms.of("", tokenizer("<|python_tag|>"))
    assert forms.calls is not None
    assert forms.calls.name == "llama3_json"
    forms = AnswerForms.of("", tokenizer(plain=("<tool_call>",)))
    assert forms.calls is not None
    assert forms.calls.name == "hermes"


def test_special_tokens_of_the_forms_are_shown() -> None:
    known = tokenizer("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]", plain=("<tool_call>",))
    forms = AnswerForms.of("[TOOL_CALLS][THINK]", known)
    ids = {name: known.backend.token_to_id(name) for name in ("[TOOL_CALLS]", "[ARGS]", "[THINK]")}
    assert forms.spelled(with_calls=True) >= set(ids.values())
    assert ids["[TOOL_CALLS]"] not in forms.spelled(with_calls=False)
    assert ids["[THINK]"] in forms.spelled(with_calls=False)
    assert forms.end_id == known.backend.token_to_id("[/THINK]")
    assert AnswerForms.of("", known, calls="hermes").call_ids == {ids["[ARGS]"]}


def test_a_name_forces_its_form() -> None:
    text = '[TOOL_CALLS]f{"p": 1}'
    for name in CALL_PARSERS:
        forms = AnswerForms.of("", tokenizer(), calls=name)
        if forms.calls is None:
            assert name == "none"
            continue
        calls = read(CallReader(forms.calls.syntax, ["f"]), [text])[1]
        assert bool(calls) == (name in ("auto", "any", "mistral")), name
    for name in REASONING_PARSERS:
        forms = AnswerForms.of("", tokenizer(), reasoning=name)
        assert (forms.reasoning is None) == (name in ("auto", "none"))


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'hermes'"):
        AnswerForms.of("", tokenizer(), calls="hermse")


def test_names_are_unique() -> None:
    names = [name for form in (ANY, *CALL_FORMS) for name in form.names]
    assert len(names) == len(set(names))


def test_ids_of_calls_are_those_that_the_template_takes() -> None:
    forms = AnswerForms.of("[TOOL_CALLS]", tokenizer())
    assert forms.calls is not None
    reader = CallReader(forms.calls.syntax, ["f"])
    [begin, *_] = reader.feed('[TOOL_CALLS]f{"p": 1}')
    assert len(begin.id) == 9  # type: ignore[union-attr, arg-type]
    assert begin.id.isalnum()  # type: ignore[union-attr]
