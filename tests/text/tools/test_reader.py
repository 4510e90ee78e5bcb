"""Calls are read out of text in the forms of all families, however it is cut."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensorium.text.tools.deltas import ContentDelta, ToolCallDelta, ToolCallEnd
from sensorium.text.tools.forms import ANY, CALL_FORMS, CallForm
from sensorium.text.tools.reader import (
    CallListReader,
    CallReader,
    NamedCallReader,
    ToolCallReader,
)


def reader(
    tools: Iterable[str] | Mapping[str, Any] = (), form: CallForm = ANY, **options: Any
) -> CallReader:
    """A reader of all forms, unless one is given."""
    return CallReader(form.syntax, tools, **options)


def named(name: str) -> CallForm:
    """A form by its name."""
    return next(form for form in CALL_FORMS if name in form.names)


def read_raw(made: ToolCallReader, pieces: list[str]) -> tuple[str, list[tuple[str, str, bool]]]:
    """The content, and the calls as names and arguments, with whether these are complete."""
    deltas = [d for piece in pieces for d in made.feed(piece)] + made.flush()
    content = "".join(d.text for d in deltas if isinstance(d, ContentDelta))
    calls: dict[int, list[str]] = {}
    ended = [d.index for d in deltas if isinstance(d, ToolCallEnd)]
    for delta in deltas:
        if isinstance(delta, ToolCallDelta):
            if delta.name is not None:
                assert delta.index == len(calls)
                assert delta.id is not None
                assert len(delta.id) >= 9
            calls.setdefault(delta.index, [delta.name or ""]).append(delta.arguments)
    return content, [(c[0], "".join(c[1:]), index in ended) for index, c in calls.items()]


def read(made: ToolCallReader, pieces: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    """The content, and the complete calls as names with parsed arguments."""
    content, calls = read_raw(made, pieces)
    return content, [(name, json.loads(text)) for name, text, complete in calls if complete]


def cuts(text: str) -> st.SearchStrategy[list[str]]:
    """``text`` in pieces."""

    def split(places: list[int]) -> list[str]:
        borders = [0, *sorted(places), len(text)]
        return [text[a:b] for a, b in itertools.pairwise(borders)]

    return st.lists(st.integers(0, len(text)), max_size=12).map(split)


CALLS = (
    'Let me see.\n\n<tool_call>\n{"name": "f", "arguments": {"p": "<tool_call>é"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>\n'
)


@given(cuts(CALLS))
def test_calls_amid_text(pieces: list[str]) -> None:
    content, calls = read(reader(), pieces)
    assert content == "Let me see."
    assert calls == [("f", {"p": "<tool_call>é"}), ("g", {})]


LIST = '[{"name": "f", "parameters": {"p": [1, {"q": "]}\\""}]}}, {"name": "g", "parameters": {}}]'

TAG_INSIDE = (
    '<tool_call>{"name": "f", "arguments": {"p": "</tool_call>", "q": "}<tool_call>"}}</tool_call>'
)


@given(cuts(TAG_INSIDE))
def test_a_closing_tag_in_an_argument_is_an_argument(pieces: list[str]) -> None:
    arguments = {"p": "</tool_call>", "q": "}<tool_call>"}
    assert read(reader(["f"]), pieces) == ("", [("f", arguments)])
    assert read(reader(), pieces) == ("", [("f", arguments)])


FORMS = {
    "Llama 3": '<|python_tag|>{"name": "f", "parameters": {"p": "}"}}; {"name": "g", "parameters": '
    "{}}",
    "Llama 3, tag left out": '{"name": "f", "parameters": {"p": "}"}}; {"name": "g", "parameters": '
    "{}}",
    "Llama 3, as published": (
        '{"type": "function", "name": "f", "parameters": {"p": "}"}}\n'
        '{"type": "function", "function": {"name": "g"}}'
    ),
    "Mistral": '[TOOL_CALLS] [{"name": "f", "arguments": {"p": "}"}}, {"name": "g", "arguments": '
    "{}}]",
    "Mistral, tag left out": (
        '[{"name": "f", "arguments": {"p": "}"}}, {"name": "g", "arguments": {}, "id": "x"}]'
    ),
    "Mistral, newer": '[TOOL_CALLS]f{"p": "}"}[TOOL_CALLS]g{}',
    "Mistral, with arguments tag": '[TOOL_CALLS]f[ARGS]{"p": "}"}[TOOL_CALLS]g[ARGS]{}',
    "Mistral, newer, tags left out": 'f{"p": "}"}g{}',
    "Phi-4": '<|tool_call|>[{"name": "f", "arguments": {"p": "}"}}, {"name": "g", "arguments": {}}]'
    "<|/tool_call|>",
    "Phi, functools": (
        'functools[{"name": "f", "arguments": {"p": "}"}}, {"name": "g", "arguments": {}}]'
    ),
    "Mistral, with call ids": (
        '[TOOL_CALLS]f[CALL_ID]a1B2c3D4e[ARGS]{"p": "}"}[TOOL_CALLS]g[CALL_ID]123456789[ARGS]{}'
    ),
    "Qwen3-Coder": (
        "<tool_call>\n<function=f>\n<parameter=p>\n}\n</parameter>\n</function>\n</tool_call>\n"
        "<tool_call>\n<function=g>\n</function>\n</tool_call>"
    ),
    "Qwen3-Coder, outer tag left out": (
        "<function=f>\n<parameter=p>\n}\n</parameter>\n</function>\n</tool_call>\n"
        "<function=g></function>"
    ),
    "GLM-4.5": (
        "<tool_call>f\n<arg_key>p</arg_key>\n<arg_value>}</arg_value>\n</tool_call>\n"
        "<tool_call>g\n</tool_call>"
    ),
    "DeepSeek-V3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
        '{"p": "}"}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n'
        "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "DeepSeek-V3.1": (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"p": "}"}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "Kimi-K2": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
        '{"p": "}"}<|tool_call_end|><|tool_call_begin|>functions.g:1'
        "<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>"
    ),
    "InternLM": (
        '<|action_start|><|plugin|>{"name": "f", "parameters": {"p": "}"}}<|action_end|>\n'
        '<|action_start|><|plugin|>{"name": "g", "parameters": {}}<|action_end|>'
    ),
    "Hermes": (
        '<tool_call>\n{"name": "f", "arguments": {"p": "}"}}\n</tool_call>\n'
        '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_of_models(form: str) -> None:
    expected = ("", [("f", {"p": "}"}), ("g", {})])
    assert read(reader(["f", "g"]), [FORMS[form]]) == expected
    assert read(reader(["f", "g"]), list(FORMS[form])) == expected
    content, calls = read(reader(["f", "g"]), [FORMS[form], " Done."])
    assert (content.strip(), calls) == ("Done.", expected[1])


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Ada", "age": 36}',
        '{"name": "h", "parameters": {}}',
        '[{"name": "h", "arguments": {}}]',
        '{"city": "Bonn"}',
        "[1] says so, {and} more",
        "[[1, 2], [3]]",
        "feed the cat {x}",
        "f (x) is g",
        "f",
        "f{bad}",
        '{"name": "f", "parameters": {',
        '[{"name": "f"}, {"name": 3}]',
        "[TOOL_CALLS] f(x)",
        "[TOOL_CALLS]",
        "[TOOL_CALLS]f",
        "<|python_tag|>print(1)",
        "<tool_call>\n{bad}\n</tool_call>",
        "<tool_call>f{}</tool_call>",
        "{" * 300,
        "[" * 300,
        '{"name": "f", "age": 3}',
        '[{"name": "f"}]',
    ],
)
def test_text_that_looks_like_a_call_is_text(text: str) -> None:
    for pieces in ([text], list(text)):
        assert read(reader(["f", "g"]), pieces) == (text, [])
        assert read(reader(), pieces) == (text, [])


def test_a_tagged_call_needs_no_arguments() -> None:
    assert read(reader(), ['<tool_call>{"name": "f"}</tool_call>']) == ("", [("f", {})])


def test_other_json_need_not_wait_for_its_end() -> None:
    made = reader(["f"])
    out = [delta for piece in ('{"city', '": "Bo', "nn") for delta in made.feed(piece)]
    assert "".join(d.text for d in out if isinstance(d, ContentDelta)) == '{"city": "Bonn'


@pytest.mark.parametrize("end", [1, 10, len(LIST) // 2 - 30])
def test_half_a_forced_call_has_no_end_and_is_no_text(end: int) -> None:
    assert read(CallListReader(), [LIST[:end]]) == ("", [])
    assert read(CallListReader(), list(LIST[:end])) == ("", [])


@pytest.mark.parametrize(
    "arguments",
    [
        r'{"p": "\ud83d"}',  # half of a pair, which no UTF-8 can hold
        '{"p": 1e999}',
        '{"p": -0.10000000000000000000001}',
        f'{{"p": {"9" * 5000}}}',
        '{"p":1,\n "q" : [ ]}',
    ],
)
def test_arguments_are_the_text_that_was_written(arguments: str) -> None:
    """What Python reads of it cannot always be written again as JSON."""
    call = f'{{"name" : "f" , "arguments": {arguments} }}'
    forms: dict[str, ToolCallReader] = {
        f"<tool_call>{call}</tool_call>": reader(),
        call: reader(["f"]),
        f"[TOOL_CALLS]f{arguments}": reader(),
        f"[ {call}]": CallListReader(),
        f'<|python_tag|>{{"function": {call}}}': reader(),
    }
    for text, made in forms.items():
        assert read_raw(made, [text]) == ("", [("f", arguments, True)]), text


@pytest.mark.parametrize(
    "body",
    [
        r'{"name": "\ud83d", "arguments": {}}',
        r'{"name": "f", "arguments": "\ud83d"}',
        '{"name": "no tool has blanks", "arguments": {}}',
        '{"name": "f", "arguments": ' + "[" * 100_000 + "]" * 100_000 + "}",
    ],
)
def test_calls_that_nobody_could_answer_are_text(body: str) -> None:
    text = f"<tool_call>{body}</tool_call>"
    assert read(reader(), [text]) == (text, [])


@pytest.mark.parametrize("num_chars", range(1, len("</tool_call>")))
def test_a_closing_tag_that_is_cut_off_is_no_text(num_chars: int) -> None:
    text = '<tool_call>{"name": "f", "arguments": {}}' + "</tool_call>"[:num_chars]
    assert read(reader(), [text]) == ("", [("f", {})])


@given(cuts("a < b <tool_call>{bad}</tool_call> <tool_cal \n"))
def test_what_is_no_call_is_text(pieces: list[str]) -> None:
    content, calls = read(reader(), pieces)
    assert content == "a < b <tool_call>{bad}</tool_call> <tool_cal \n"
    assert calls == []


def test_unclosed_calls() -> None:
    whole = '<tool_call>{"name": "f", "arguments": {"p": 1}}'
    assert read(reader(), [whole]) == ("", [("f", {"p": 1})])
    assert read(reader(), [whole[:-1]]) == ("", [("f", {"p": 1})])
    assert read_raw(reader(), [whole[:-2]]) == ("", [("f", '{"p": 1', False)])
    assert read(reader(), [whole[:34]]) == (whole[:34], [])
    assert read(reader(), ["plain"]) == ("plain", [])
    assert read(reader(), []) == ("", [])


@pytest.mark.parametrize(
    "make",
    [
        reader,
        lambda: reader(["f"]),
        lambda: reader(["f", "A"], named("pythonic")),
        CallListReader,
        lambda: NamedCallReader("f"),
    ],
)
@pytest.mark.parametrize(
    "piece", ["<tool_call>", "<tool_call>{", "</tool_call>", "[", "[{", '"', "\\", "(a=1,", "A" * 9]
)
def test_what_repeats_without_end_is_read_to_its_end(make: Any, piece: str) -> None:
    """No expression backtracks over what a model writes, and nothing of it is evaluated.

    It is JSON or it is text.
    """
    content, calls = "", 0
    made = make()
    for delta in [d for _ in range(5000) for d in made.feed(piece)] + made.flush():
        content += delta.text if isinstance(delta, ContentDelta) else ""
        calls += isinstance(delta, ToolCallDelta)
    assert calls or content or isinstance(made, CallListReader)


@pytest.mark.parametrize("piece", ["<tool_call>", '<tool_call>{"name":"f"}</tool_call>', '{"a'])
def test_text_that_was_read_is_forgotten(piece: str) -> None:
    made, most = reader(["f"]), 0
    for _ in range(5000):
        made.feed(piece)
        most = max(most, made.num_kept)
    made.flush()
    assert most < 4096


@pytest.mark.parametrize(
    "body",
    [
        '__import__("os").abort()',
        '{"name": "f", "arguments": __import__("os").abort()}',
        "f(a=__import__('os').abort())",
        '{"name": __import__, "arguments": {}}',
    ],
)
def test_code_that_a_model_writes_is_text(body: str) -> None:
    text = f"<tool_call>{body}</tool_call>"
    assert read(reader(), [text]) == (text, [])
    assert read(CallListReader(), [f"[{body}]"]) == ("", [])


@given(cuts(LIST))
def test_lists_of_calls(pieces: list[str]) -> None:
    assert read(CallListReader(), pieces) == (
        "",
        [("f", {"p": [1, {"q": ']}"'}]}), ("g", {})],
    )


def test_other_readers() -> None:
    assert read(NamedCallReader("f"), ['{"p"', ": 1}"]) == ("", [("f", {"p": 1})])
    assert read(NamedCallReader("f"), []) == ("", [])
    assert read(CallListReader(), ["no list"]) == ("", [])


@pytest.mark.parametrize("form", FORMS)
def test_any_cut_gives_the_same_deltas(form: str) -> None:
    text = f"Well.\n{FORMS[form]}\nDone < [now]."
    expected = read_raw(reader(["f", "g"]), [text])

    @given(cuts(text))
    def check(pieces: list[str]) -> None:
        assert read_raw(reader(["f", "g"]), pieces) == expected

    check()


SCRAPS = (
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "functools"),
    *('{"name": "f", "arguments": {', '"p": 1', "}", "]", "[", '"', "\\", "f", "(", "p=", ")", ","),
    *("<function=f>", "<parameter=p>", "</parameter>", "</function>", "<arg_key>", "\n", " ", ";"),
    *(
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "```json",
        "<|tool_call|>",
    ),
    *("<|python_start|>", "<|python_end|>", "<tool", "_call>", "e", "é", "\ud7ff", "'"),
)


@given(st.lists(st.sampled_from(SCRAPS), max_size=24), st.data())
def test_hostile_text_is_the_same_however_it_is_cut(scraps: list[str], data: st.DataObject) -> None:
    text = "".join(scraps)
    pieces = data.draw(cuts(text))
    for form in (ANY, *CALL_FORMS):
        whole = read_raw(reader(["f"], form), [text])
        assert read_raw(reader(["f"], form), pieces) == whole
        if not whole[1]:
            assert whole[0] == text


def test_arguments_are_reported_as_they_come() -> None:
    made = reader(["f"])
    seen = []
    for piece in (
        '<tool_call>{"na',
        'me": "f", "arguments": {"p": "a',
        "b",
        'c"',
        "}}</tool_call>",
    ):
        deltas = made.feed(piece)
        seen.append("".join(d.arguments for d in deltas if isinstance(d, ToolCallDelta)))
    assert seen == ["", '{"p": "a', "b", 'c"', "}"]


PYTHON = '[f(p="a, b)", q=[1, {"r": (True, None)}], s=\'it\\\'s\', t=-1.5, u=false), g()]'


@pytest.mark.parametrize("around", ["{}", "<|python_start|>{}<|python_end|>"])
def test_calls_in_python(around: str) -> None:
    arguments = {"p": "a, b)", "q": [1, {"r": [True, None]}], "s": "it's", "t": -1.5, "u": False}
    text = around.format(PYTHON)
    for pieces in ([text], list(text)):
        found = read(reader(["f", "g"], named("pythonic")), pieces)
        assert found == ("", [("f", arguments), ("g", {})])


@pytest.mark.parametrize(
    "text", ["[f(1)]", "[h(p=1)]", "[f, g]", "f(p=1)", "[f(p)]", "[1, 2]", "[f(", "[f"]
)
def test_text_that_is_no_call_in_python(text: str) -> None:
    for pieces in ([text], list(text)):
        assert read(reader(["f", "g"], named("pythonic")), pieces) == (text, [])


@pytest.mark.parametrize(
    "value", ["__import__('os').abort()", "1e999", "{1, 2}", "b'x'", "f(1)", "(" * 500 + ")" * 500]
)
def test_what_is_no_literal_is_a_string(value: str) -> None:
    form = named("pythonic")
    assert read(reader(["f"], form), [f"[f(p={value})]"]) == ("", [("f", {"p": value})])


SCHEMA = {
    "properties": {"code": {"type": "string"}, "n": {"type": "integer"}, "x": {"type": "array"}}
}


def test_texts_between_tags_are_texts_where_the_schema_says_so() -> None:
    code = 'print("<parameter=p>", 1)\n</parameter> <x>'
    text = (
        f"<tool_call>\n<function=f>\n<parameter=code>\n{code}\n</parameter>\n<parameter=n>\n12\n"
        "</parameter>\n<parameter=x>\n[1, 2]\n</parameter>\n<parameter=y>\nTrue\n</parameter>\n"
        "</function>\n</tool_call>"
    )
    for pieces in ([text], list(text)):
        found = read(reader({"f": SCHEMA}, named("qwen3_coder")), pieces)
        assert found == ("", [("f", {"code": code, "n": 12, "x": [1, 2], "y": True})])
    number = text.replace(f"\n{code}\n", "7")
    [(_, arguments)] = read(reader({"f": SCHEMA}), [number])[1]
    assert arguments["code"] == "7"


def test_more_calls_than_may_be_made_are_left_out() -> None:
    assert read(reader(["f"], most=1), [CALLS]) == (
        "Let me see.",
        [("f", {"p": "<tool_call>é"})],
    )


def test_arguments_that_are_no_json_are_the_callers_to_refuse() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"p": NaN, "q": "]}"}}</tool_call>'
    expected = ("", [("f", '{"p": NaN, "q": "]}"}', True)])
    assert read_raw(reader(), [text]) == expected
    assert read_raw(reader(), list(text)) == expected


def test_no_tag_begins_another() -> None:
    for form in (ANY, *CALL_FORMS):
        tags = sorted(form.syntax.openers)
        assert not [(a, b) for a, b in itertools.pairwise(tags) if b.startswith(a)]
