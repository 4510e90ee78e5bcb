"""Tools are checked, and calls are read out of text however it is cut."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensorium.errors import InvalidRequestError
from sensorium.params import StructuredOutputs
from sensorium.text.grammar.grammar import compile_grammar
from sensorium.text.tool_calls import (
    CallListReader,
    ContentDelta,
    NamedCallReader,
    ToolCallDelta,
    ToolCallParser,
    ToolCallReader,
)
from sensorium.text.tools import (
    MAX_CALLS,
    ToolChoice,
    forced_call,
    parse_tool_choice,
    parse_tools,
    reader_for,
)

POINT = {
    "type": "object",
    "properties": {"p": {"$ref": "#/$defs/P"}},
    "$defs": {"P": {"type": "integer"}},
}
TOOLS = parse_tools(
    [
        {"type": "function", "function": {"name": "f", "parameters": POINT}},
        {"function": {"name": "g", "description": "no parameters"}},
    ]
)


def read(reader: ToolCallReader, pieces: list[str]) -> tuple[str, list[tuple[str, Any]]]:
    """The content, and the calls as names with parsed arguments."""
    deltas = [d for piece in pieces for d in reader.feed(piece)] + reader.flush()
    content = "".join(d.text for d in deltas if isinstance(d, ContentDelta))
    calls: dict[int, list[str]] = {}
    for delta in deltas:
        if isinstance(delta, ToolCallDelta):
            if delta.name is not None:
                assert delta.index == len(calls)
                assert delta.id is not None
                assert delta.id.startswith("call_")
            calls.setdefault(delta.index, [delta.name or ""]).append(delta.arguments)
    return content, [(c[0], json.loads("".join(c[1:]))) for c in calls.values()]


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
    content, calls = read(ToolCallParser(), pieces)
    assert content == "Let me see."
    assert calls == [("f", {"p": "<tool_call>é"}), ("g", {})]


LIST = '[{"name": "f", "parameters": {"p": [1, {"q": "]}\\""}]}}, {"name": "g", "parameters": {}}]'

TAG_INSIDE = (
    '<tool_call>{"name": "f", "arguments": {"p": "</tool_call>", "q": "}<tool_call>"}}</tool_call>'
)


@given(cuts(TAG_INSIDE))
def test_a_closing_tag_in_an_argument_is_an_argument(pieces: list[str]) -> None:
    arguments = {"p": "</tool_call>", "q": "}<tool_call>"}
    assert read(ToolCallParser(["f"]), pieces) == ("", [("f", arguments)])
    assert read(ToolCallParser(), pieces) == ("", [("f", arguments)])


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
    "Hermes": (
        '<tool_call>\n{"name": "f", "arguments": {"p": "}"}}\n</tool_call>\n'
        '<tool_call>{"name": "g", "arguments": {}}</tool_call>'
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_forms_of_models(form: str) -> None:
    expected = ("", [("f", {"p": "}"}), ("g", {})])
    assert read(ToolCallParser(["f", "g"]), [FORMS[form]]) == expected
    assert read(ToolCallParser(["f", "g"]), list(FORMS[form])) == expected
    content, calls = read(ToolCallParser(["f", "g"]), [FORMS[form], " Done."])
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
        assert read(ToolCallParser(["f", "g"]), pieces) == (text, [])
        assert read(ToolCallParser(), pieces) == (text, [])


def test_a_tagged_call_needs_no_arguments() -> None:
    assert read(ToolCallParser(), ['<tool_call>{"name": "f"}</tool_call>']) == ("", [("f", {})])


def test_other_json_need_not_wait_for_its_end() -> None:
    reader = ToolCallParser(["f"])
    out = [delta for piece in ('{"city', '": "Bo', "nn") for delta in reader.feed(piece)]
    assert "".join(d.text for d in out if isinstance(d, ContentDelta)) == '{"city": "Bonn'


@pytest.mark.parametrize("end", [1, 10, len(LIST) // 2 - 30])
def test_half_a_forced_call_is_none_and_no_text(end: int) -> None:
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
        f"<tool_call>{call}</tool_call>": ToolCallParser(),
        call: ToolCallParser(["f"]),
        f"[TOOL_CALLS]f{arguments}": ToolCallParser(),
        f"[ {call}]": CallListReader(),
        f'<|python_tag|>{{"function": {call}}}': ToolCallParser(),
    }
    for text, reader in forms.items():
        found = [*reader.feed(text), *reader.flush()]
        assert [d.arguments for d in found if isinstance(d, ToolCallDelta)] == [arguments], text
        assert len(found) == 1


@pytest.mark.parametrize(
    "body",
    [
        r'{"name": "\ud83d", "arguments": {}}',
        r'{"name": "f", "arguments": "\ud83d"}',
        '{"name": "f", "arguments": {"p": NaN}}',
        '{"name": "no tool has blanks", "arguments": {}}',
        '{"name": "f", "arguments": ' + "[" * 100_000 + "]" * 100_000 + "}",
    ],
)
def test_calls_that_nobody_could_answer_are_text(body: str) -> None:
    text = f"<tool_call>{body}</tool_call>"
    assert read(ToolCallParser(), [text]) == (text, [])


@pytest.mark.parametrize("num_chars", range(1, len("</tool_call>")))
def test_a_closing_tag_that_is_cut_off_is_no_text(num_chars: int) -> None:
    text = '<tool_call>{"name": "f", "arguments": {}}' + "</tool_call>"[:num_chars]
    assert read(ToolCallParser(), [text]) == ("", [("f", {})])


def test_tools_may_define_different_things_by_one_name() -> None:
    def tool(name: str, kind: str) -> dict[str, Any]:
        parameters = {**POINT, "$defs": {"P": {"type": kind}}}
        return {"function": {"name": name, "parameters": parameters}}

    call = forced_call(
        ToolChoice("required"), parse_tools([tool("f", "string"), tool("g", "null")])
    )
    assert call is not None
    text = json.dumps(call.schema)
    places = [f"#/items/anyOf/{i}/properties/parameters/$defs/P" for i in range(2)]
    assert all(place in text for place in places)
    assert compile_grammar(StructuredOutputs(json=call.schema)).relaxed == ()


def test_arguments_are_an_object_and_calls_are_bounded() -> None:
    tools = parse_tools([{"function": {"name": "f", "parameters": {"description": "any"}}}])
    named, required = (forced_call(ToolChoice(mode, "f"), tools) for mode in ("named", "required"))
    assert named is not None
    assert named.schema["type"] == "object"
    assert required is not None
    assert required.schema["maxItems"] == MAX_CALLS
    assert required.param == "tools[0].function.parameters"


@given(cuts("a < b <tool_call>{bad}</tool_call> <tool_cal \n"))
def test_what_is_no_call_is_text(pieces: list[str]) -> None:
    content, calls = read(ToolCallParser(), pieces)
    assert content == "a < b <tool_call>{bad}</tool_call> <tool_cal \n"
    assert calls == []


def test_unclosed_calls() -> None:
    whole = '<tool_call>{"name": "f", "arguments": {"p": 1}}'
    assert read(ToolCallParser(), [whole]) == ("", [("f", {"p": 1})])
    assert read(ToolCallParser(), [whole[:-1]]) == (whole[:-1], [])
    assert read(ToolCallParser(), ["plain"]) == ("plain", [])
    assert read(ToolCallParser(), []) == ("", [])


@pytest.mark.parametrize("reader", [ToolCallParser, CallListReader, lambda: NamedCallReader("f")])
@pytest.mark.parametrize(
    "piece", ["<tool_call>", "<tool_call>{", "</tool_call>", "[", "[{", '"', "\\", "(a=1,", "A" * 9]
)
def test_what_repeats_without_end_is_read_to_its_end(reader: Any, piece: str) -> None:
    """No expression backtracks over what a model writes, and nothing of it is evaluated.

    It is JSON or it is text.
    """
    content, calls = "", 0
    made = reader()
    for delta in [d for _ in range(5000) for d in made.feed(piece)] + made.flush():
        content += delta.text if isinstance(delta, ContentDelta) else ""
        calls += isinstance(delta, ToolCallDelta)
    assert calls or content or isinstance(made, CallListReader)


@pytest.mark.parametrize("piece", ["<tool_call>", '<tool_call>{"name":"f"}</tool_call>'])
def test_a_long_answer_is_read_in_pieces(piece: str) -> None:
    """Each tag copies what is left to read.

    Of a whole answer at once that took a minute for 100,000 tokens.
    """
    left: list[int] = []

    class Noting(ToolCallParser):
        def _read(self, text: str, *, is_last: bool) -> list[Any]:
            left.append(len(self._buffer) + len(text))
            return super()._read(text, is_last=is_last)

    read(Noting(), [piece * 5000])
    assert max(left) < 4096


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
    assert read(ToolCallParser(), [text]) == (text, [])
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
    assert isinstance(reader_for(ToolChoice("auto")), ToolCallParser)
    assert isinstance(reader_for(ToolChoice("named", "f")), NamedCallReader)
    assert isinstance(reader_for(ToolChoice("required")), CallListReader)


def test_choices() -> None:
    assert parse_tool_choice(None, TOOLS).mode == "auto"
    assert parse_tool_choice(None, []).mode == "none"
    assert parse_tool_choice("auto", []).mode == "none"
    named = parse_tool_choice({"type": "function", "function": {"name": "g"}}, TOOLS)
    assert named == ToolChoice("named", "g")
    for bad in ("sometimes", {"function": {"name": "h"}}, {}, 3):
        with pytest.raises(InvalidRequestError):
            parse_tool_choice(bad, TOOLS)
    with pytest.raises(InvalidRequestError, match="no tools"):
        parse_tool_choice("required", [])


def test_forced_calls_compile() -> None:
    assert forced_call(ToolChoice("auto"), TOOLS) is None
    required = forced_call(ToolChoice("required"), TOOLS, parallel=False)
    assert required is not None
    assert required.schema["maxItems"] == 1
    assert required.param == "tools"
    named = forced_call(ToolChoice("named", "f"), TOOLS)
    assert named is not None
    assert named.schema == POINT
    assert named.param == "tools[0].function.parameters"
    for call in (required, named, forced_call(ToolChoice("named", "g"), TOOLS)):
        assert call is not None
        assert compile_grammar(StructuredOutputs(json=call.schema)).relaxed == ()


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ({}, "tools"),
        ([1], "tools[0]"),
        ([{"type": "retrieval", "function": {"name": "f"}}], "tools[0].type"),
        ([{"function": {"name": "a b"}}], "tools[0].function.name"),
        ([{"function": {"name": "f", "parameters": []}}], "tools[0].function.parameters"),
        ([{"function": {"name": "f"}}] * 2, "tools[1].function.name"),
        ([{"function": {"name": "f", "x": object()}}], "tools[0].function"),
        ([{"function": {"name": f"f{i}"}} for i in range(300)], "tools"),
    ],
)
def test_bad_tools(tools: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        parse_tools(tools)
    assert caught.value.param == param
    assert parse_tools(None) == []
