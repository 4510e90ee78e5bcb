"""Reasoning, content and calls are split, however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensorium.text.tools.deltas import ContentDelta, ReasoningDelta, ToolCallDelta
from sensorium.text.tools.forms import ANY, REASONING_FORMS
from sensorium.text.tools.reader import CallReader
from sensorium.text.tools.splitter import AnswerSplitter, opens_reasoning
from tests.text.tools.test_reader import cuts

THINK = next(form for form in REASONING_FORMS if "qwen3" in form.names)
R1 = next(form for form in REASONING_FORMS if "deepseek_r1" in form.names)
MISTRAL = next(form for form in REASONING_FORMS if "mistral" in form.names)


def split(splitter: AnswerSplitter, pieces: list[str]) -> tuple[str, str, list[str]]:
    """Reasoning, content, and the names of calls."""
    deltas = [d for piece in pieces for d in splitter.feed(piece)] + splitter.flush()
    return (
        "".join(d.text for d in deltas if isinstance(d, ReasoningDelta)),
        "".join(d.text for d in deltas if isinstance(d, ContentDelta)),
        [d.name for d in deltas if isinstance(d, ToolCallDelta) and d.name],
    )


WHOLE = (
    '<think>\nA <tool_call>{"name": "f"} or </thin\n\n</think>\n\nSo: <think>\n'
    '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
)


@given(cuts(WHOLE))
def test_reasoning_then_content_then_calls(pieces: list[str]) -> None:
    expected = ('A <tool_call>{"name": "f"} or </thin', "So: <think>", ["f"])
    assert split(AnswerSplitter(CallReader(ANY.syntax, ["f"]), THINK), pieces) == expected
    opened = "".join(pieces).removeprefix("<think>")
    made = AnswerSplitter(CallReader(ANY.syntax, ["f"]), THINK, opened=True)
    assert split(made, [opened]) == expected


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>\n\n</think>\n\nHi", "", "Hi"),
        ("\n <think>a</think>b", "a", "b"),
        ("Hi <think>a</think>", "", "Hi <think>a</think>"),
        ("<think>cut off", "cut off", ""),
        ("<think>cut off </thi", "cut off </thi", ""),
        ("<thi", "", "<thi"),
        ("<", "", "<"),
        ("", "", ""),
        ("  ", "", "  "),
        ("<think>a</think>", "a", ""),
        ("<think>a</think>b</think>c", "a", "b</think>c"),
    ],
)
def test_where_reasoning_stands(text: str, reasoning: str, content: str) -> None:
    for pieces in ([text], list(text)):
        assert split(AnswerSplitter(None, THINK), pieces) == (reasoning, content, [])
    assert split(AnswerSplitter(), [text]) == ("", text, [])


def test_the_tags_of_mistral() -> None:
    assert split(AnswerSplitter(None, MISTRAL), list("[THINK]a[/THINK]b")) == ("a", "b", [])


@given(st.lists(st.sampled_from(["<think>", "</think>", "</", "<", "a", " ", "\n"])), st.data())
def test_any_cut_gives_the_same(scraps: list[str], data: st.DataObject) -> None:
    text = "".join(scraps)
    for opened in (False, True):
        whole = split(AnswerSplitter(None, THINK, opened=opened), [text])
        assert split(AnswerSplitter(None, THINK, opened=opened), data.draw(cuts(text))) == whole


def test_reasoning_is_reported_as_it_comes() -> None:
    splitter = AnswerSplitter(None, THINK)
    seen = [splitter.feed(piece) for piece in ("<think>\n", "one", " two", "</think>", "\nx")]
    assert seen == [
        [],
        [ReasoningDelta("one")],
        [ReasoningDelta(" two")],
        [],
        [ContentDelta("x")],
    ]


def test_prompts_that_open_reasoning() -> None:
    assert opens_reasoning("<|im_start|>assistant\n<think>\n", THINK)
    assert not opens_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n", THINK)
    assert not opens_reasoning("<|im_start|>assistant\n", THINK)
    assert not opens_reasoning(None, THINK)
    assert opens_reasoning("<|Assistant|>", R1)
    assert not opens_reasoning("<|Assistant|></think>", R1)
