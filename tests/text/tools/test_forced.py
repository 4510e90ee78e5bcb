"""Demanded calls are written in the form of the family, and read again as they were meant."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken

from sensorium.params import StructuredOutputs
from sensorium.text.grammar.grammar import GrammarVocabulary, compile_grammar
from sensorium.text.grammar.library import is_json
from sensorium.text.tokenizer import Tokenizer
from sensorium.text.tools.choice import ToolChoice, parse_tools
from sensorium.text.tools.forced import MAX_CALLS, forced_call
from sensorium.text.tools.forms import AnswerForms
from sensorium.text.tools.reader import CallReader, CallsOnly
from tests.text.conftest import byte_level
from tests.text.tools.test_reader import read

SPECIAL = (
    *("[TOOL_CALLS]", "[ARGS]", "<|tool_call|>", "<|/tool_call|>", "<|python_tag|>"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>"),
    *("<｜tool▁call▁end｜>", "<｜tool▁sep｜>"),
)
TEMPLATES = {
    "hermes": "<tool_call>",
    "llama3_json": "<|python_tag|>",
    "mistral": "[TOOL_CALLS][ARGS]",
    "mistral, spaced": "[TOOL_CALLS] [",
    "mistral, older": "[TOOL_CALLS]",
    "phi4_mini_json": "<|tool_call|><|/tool_call|>",
    "phi, functools": "functools[",
    "deepseek_v3": "<｜tool▁calls▁begin｜>```json",
    "deepseek_v31": "<｜tool▁calls▁begin｜>",
}
SCHEMA = {
    "type": "object",
    "properties": {"p": {"enum": [1, 22]}, "q": {"enum": ["a}]", "}"]}},
    "required": ["p", "q"],
}
TOOLS = parse_tools(
    [
        {"function": {"name": "f", "parameters": SCHEMA}},
        {"function": {"name": "g", "parameters": {"type": "object", "properties": {}}}},
    ]
)


@pytest.fixture(scope="module", params=[False, True], ids=["texts", "special tokens"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    backend = byte_level()
    if request.param:
        backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return Tokenizer(backend, special_tokens={"eos_token": "<|im_end|>"})


def written(tokenizer: Tokenizer, constraint: dict[str, Any], seed: int) -> str:
    """Random text under a constraint, with special tokens."""
    vocabulary = GrammarVocabulary(tokenizer, tokenizer.max_token_id + 1)
    grammar = vocabulary.check(StructuredOutputs(**constraint))
    matcher, rng = vocabulary.matcher(grammar.text), random.Random(seed)
    ids: list[int] = []
    mask = np.zeros((vocabulary.vocab_size + 31) // 32, np.int32)
    for _ in range(2000):
        matcher.mask(mask)
        bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
        choices = [int(i) for i in np.flatnonzero(bits)]
        ends = [i for i in choices if i in tokenizer.eos_token_ids]
        others = [i for i in choices if i not in ends]
        token_id = rng.choice(ends if ends and (not others or rng.random() < 0.5) else others)
        assert matcher.accept(token_id)
        if token_id in tokenizer.eos_token_ids:
            return tokenizer.decode(ids, skip_special_tokens=False)
        ids.append(token_id)
    raise AssertionError("the calls do not end")


def forms_of(name: str, tokenizer: Tokenizer) -> AnswerForms:
    chosen = name.partition(",")[0].replace("deepseek_v31", "deepseek_v3")
    calls = "phi4_mini_json" if chosen == "phi" else chosen
    return AnswerForms.of(TEMPLATES[name], tokenizer, calls=calls)


@pytest.mark.parametrize("name", TEMPLATES)
def test_required_calls_have_the_form_of_the_family(name: str, tokenizer: Tokenizer) -> None:
    forms = forms_of(name, tokenizer)
    forced = forced_call(ToolChoice("required"), TOOLS, forms=forms)
    assert forced is not None
    assert not forced.as_json
    assert forms.calls is not None
    num_calls = set()
    for seed in range(12):
        text = written(tokenizer, forced.constraint, seed)
        reader = CallsOnly(CallReader(forms.calls.syntax, ["f", "g"]))
        _, calls = read(reader, list(text))
        _, amid_text = read(CallReader(forms.calls.syntax, ["f", "g"]), [text])
        assert calls == amid_text
        assert 1 <= len(calls) <= MAX_CALLS
        num_calls.add(len(calls))
        for called, arguments in calls:
            if called == "f":
                assert arguments["p"] in (1, 22)
                assert arguments["q"] in ("a}]", "}")
    assert len(num_calls) > 1
    assert is_json(compile_grammar(StructuredOutputs(**forced.constraint)).text)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_named_call_is_one_of_that_tool(name: str, tokenizer: Tokenizer) -> None:
    forms = forms_of(name, tokenizer)
    forced = forced_call(ToolChoice("named", "g"), TOOLS, forms=forms)
    assert forced is not None
    assert forced.param == "tools[1].function.parameters"
    assert forms.calls is not None
    text = written(tokenizer, forced.constraint, 1)
    assert read(CallReader(forms.calls.syntax, ["g"]), [text]) == ("", [("g", {})])


def test_one_call_where_there_may_be_no_other(tokenizer: Tokenizer) -> None:
    forms = forms_of("hermes", tokenizer)
    forced = forced_call(ToolChoice("required"), TOOLS, parallel=False, forms=forms)
    assert forced is not None
    for seed in range(8):
        assert written(tokenizer, forced.constraint, seed).count("<tool_call>") == 1


def test_only_allowed_tools_are_called(tokenizer: Tokenizer) -> None:
    choice = ToolChoice("required", allowed=frozenset("g"))
    for forms in (None, forms_of("hermes", tokenizer)):
        forced = forced_call(choice, TOOLS, forms=forms)
        assert forced is not None
        assert forced.indices == (1,)
        assert '"p"' not in json.dumps(forced.constraint)


def test_forms_without_a_spelling_are_forced_as_json(tokenizer: Tokenizer) -> None:
    for name in ("pythonic", "qwen3_coder", "any", "kimi_k2"):
        forms = AnswerForms.of("", tokenizer, calls=name)
        forced = forced_call(ToolChoice("required"), TOOLS, forms=forms)
        assert forced is not None
        assert forced.as_json


def test_strict_tools_follow_their_schemas_amid_free_text(tokenizer: Tokenizer) -> None:
    strict = parse_tools([{"function": {"name": "f", "parameters": SCHEMA, "strict": True}}])
    forms = forms_of("hermes", tokenizer)
    assert forced_call(ToolChoice("auto"), TOOLS, forms=forms) is None
    assert forced_call(ToolChoice("auto"), strict, forms=AnswerForms()) is None
    forced = forced_call(ToolChoice("auto"), strict, forms=forms)
    assert forced is not None
    assert not forced.demands
    vocabulary = GrammarVocabulary(tokenizer, tokenizer.max_token_id + 1)
    grammar = vocabulary.check(StructuredOutputs(**forced.constraint))
    assert not is_json(grammar.text)
    call = '<tool_call>\n{"name": "f", "arguments": {"p": 1, "q": "}"}}\n</tool_call>'
    for text, fits in (
        ("Hello.", True),
        (f"Well. {call}", True),
        (f"{call}\n{call}", True),
        (call.replace("22", "3").replace(": 1", ": 3"), False),
        (call.replace('"f"', '"h"'), False),
    ):
        matcher = vocabulary.matcher(grammar.text)
        accepted = all(matcher.accept(i) for i in tokenizer.encode(text))
        assert (accepted and matcher.is_accepting) == fits, text
