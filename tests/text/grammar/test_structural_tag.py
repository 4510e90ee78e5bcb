"""Structural tags let through what they describe, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from sensorium.errors import InvalidRequestError
from sensorium.params import StructuredOutputs
from sensorium.text.grammar.grammar import GrammarVocabulary, compile_grammar
from sensorium.text.tokenizer import Tokenizer

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
JSON = {"type": "json_schema", "json_schema": SCHEMA}
TAG = {"type": "tag", "begin": '<call>{"name": "f", "a": ', "content": JSON, "end": "}</call>"}
CALL = '<call>{"name": "f", "a": {"a": 1}}</call>'
OLDER = {
    "structures": [{"begin": "<function=f>", "schema": SCHEMA, "end": "</function>"}],
    "triggers": ["<function="],
}


@pytest.fixture(scope="module")
def vocabulary(chatml: Tokenizer) -> GrammarVocabulary:
    return GrammarVocabulary(chatml, chatml.max_token_id + 1)


def tag(form: dict[str, Any]) -> dict[str, Any]:
    return {"type": "structural_tag", "format": form}


def triggered(**options: Any) -> dict[str, Any]:
    return tag({"type": "triggered_tags", "triggers": ["<call>"], "tags": [TAG], **options})


def separated(**options: Any) -> dict[str, Any]:
    return tag({"type": "tags_with_separator", "tags": [TAG], "separator": "\n", **options})


THINKS = tag(
    {
        "type": "sequence",
        "elements": [
            {"type": "tag", "begin": "<think>", "content": {"type": "any_text"}, "end": "</think>"},
            JSON,
        ],
    }
)
EITHER = tag(
    {
        "type": "or",
        "elements": [
            {"type": "const_string", "value": "no"},
            {"type": "regex", "pattern": "a/b\n[0-9]+"},
            {"type": "grammar", "grammar": 'start: "x" "y"'},
            {"type": "tag", "begin": "", "content": JSON, "end": [".", "!"]},
        ],
    }
)
# Escaped slashes, one that is not, one within brackets, line ends of both kinds, and a backslash before a slash.
ESCAPED = tag({"type": "regex", "pattern": "https:\\/\\/a[/]b\n\\\n\\\\/"})
FITS: list[tuple[dict[str, Any], list[str], list[str]]] = [
    (OLDER, ["", "hi", 'hi <function=f>{"a": 1}</function> bye'], ['<function=g>{"a": 1}</function>']),
    (triggered(), ["", "hi", CALL, f"hi {CALL}", CALL + CALL, f"{CALL} bye"], ["<call>no"]),
    (triggered(at_least_one=True), [CALL, CALL + CALL, f"{CALL} bye"], ["", "hi", f"hi {CALL}"]),
    (triggered(stop_after_first=True), ["", "hi", CALL, f"hi {CALL}"], [CALL + CALL, f"{CALL} bye"]),
    (triggered(at_least_one=True, stop_after_first=True), [CALL], ["", "hi", CALL + CALL]),
    (separated(), ["", CALL, f"{CALL}\n{CALL}"], ["hi", CALL + CALL]),
    (separated(at_least_one=True, at_most=2), [CALL, f"{CALL}\n{CALL}"], ["", "\n".join([CALL] * 3)]),
    (separated(stop_after_first=True), ["", CALL], [f"{CALL}\n{CALL}"]),
    (THINKS, ['<think>{"a": 1} hm </thin</think>{"a": 2}'], ['{"a": 2}', "<think>hm</think>"]),
    (ESCAPED, ["https://a/b\n\n\\/"], ["https:\\/\\/a/b\n\n\\/", "https://a/b\n\n/"]),
    (EITHER, ["no", "a/b\n12", "xy", '{"a": 1}!', '{"a": 1}.'], ["a/b", "x", '{"a": 1}', "nope"]),
]  # fmt: skip


@pytest.mark.parametrize(("form", "good", "bad"), FITS)
def test_what_fits(
    form: dict[str, Any],
    good: list[str],
    bad: list[str],
    vocabulary: GrammarVocabulary,
    chatml: Tokenizer,
) -> None:
    grammar = compile_grammar(StructuredOutputs(structural_tag=form))
    for text in (*good, *bad):
        matcher = vocabulary.matcher(grammar.text)
        accepted = all(matcher.accept(i) for i in chatml.encode(text))
        assert (accepted and matcher.is_accepting) == (text in good), text


def test_a_special_token_stands_among_texts(
    vocabulary: GrammarVocabulary, chatml: Tokenizer
) -> None:
    token_id = chatml.backend.token_to_id("<|vision_start|>")
    form = {"type": "sequence", "elements": [{"type": "token", "token": token_id}, JSON]}
    grammar = compile_grammar(StructuredOutputs(structural_tag=tag(form)))
    matcher = vocabulary.matcher(grammar.text)
    assert all(matcher.accept(i) for i in (token_id, *chatml.encode('{"a": 1}')))
    assert matcher.is_accepting


def test_what_is_not_enforced_is_said() -> None:
    schema = {**SCHEMA, "not": {"required": ["b"]}}
    form = tag({"type": "json_schema", "json_schema": schema})
    grammar = compile_grammar(StructuredOutputs(structural_tag=form))
    assert grammar.warnings == ("structured_outputs.structural_tag: not enforced: not",)
    with pytest.raises(InvalidRequestError, match="cannot be enforced: not"):
        compile_grammar(StructuredOutputs(structural_tag=form, unsupported="refuse"))


def nested(depth: int) -> dict[str, Any]:
    form: dict[str, Any] = {"type": "any_text"}
    for _ in range(depth):
        form = {"type": "or", "elements": [form]}
    return form


@pytest.mark.parametrize(
    ("form", "place"),
    [
        ("{", ""),
        ("[]", ""),
        ({"type": "other"}, ""),
        ({}, ".structures"),
        ({"structures": [], "triggers": []}, ".structures"),
        ({"structures": [{"begin": "a", "schema": SCHEMA, "end": ""}], "triggers": ["b"]}, ".structures[0].begin"),
        ({"structures": [{"begin": "a", "schema": {"type": "z"}, "end": ""}], "triggers": ["a"]}, ".structures[0].schema"),
        ({"structures": [{"begin": "a", "x": 1}], "triggers": ["a"]}, ".structures[0]"),
        ({"structures": [{"begin": "a", "end": ""}]}, ".triggers"),
        (tag({"type": "tags"}), ".format.type"),
        (tag({"type": "tag", "begin": "a", "end": "b"}), ".format.content"),
        (tag({"type": "tag", "begin": 1, "content": JSON, "end": "b"}), ".format.begin"),
        (tag({"type": "tag", "begin": "a", "content": JSON, "end": []}), ".format.end"),
        (tag({"type": "const_string", "value": ""}), ".format.value"),
        (tag({"type": "const_string", "value": "a", "text": "b"}), ".format"),
        (tag({"type": "regex", "pattern": "("}), ""),
        (tag({"type": "grammar", "grammar": "foo"}), ""),
        (tag({"type": "token", "token": -1}), ".format.token"),
        (tag({"type": "sequence", "elements": []}), ".format.elements"),
        (tag({"type": "sequence", "elements": [JSON, 5]}), ".format.elements[1]"),
        (tag({"type": "json_schema", "json_schema": {"type": "zzz"}}), ".format.json_schema"),
        (separated(at_most=0), ".format.at_most"),
        (tag(nested(40)), ".format" + ".elements[0]" * 33),
        (tag({"type": "or", "elements": [{"type": "any_text"}] * 5000}), ".format.elements[4095]"),
    ],
)  # fmt: skip
def test_what_is_none_is_refused_with_its_place(form: Any, place: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        compile_grammar(StructuredOutputs(structural_tag=form))
    assert caught.value.param == f"structured_outputs.structural_tag{place}"


def test_a_large_one_is_refused_before_it_is_read() -> None:
    with pytest.raises(InvalidRequestError, match="characters"):
        compile_grammar(StructuredOutputs(structural_tag=tag({"type": "const_string", "value": "a" * (1 << 19)})))  # fmt: skip
