"""Constraints become grammars; masks let through what the grammar allows and nothing else."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import numpy as np
import pytest

from sensorium.errors import ConfigError, InvalidRequestError
from sensorium.params import StructuredOutputs
from sensorium.text.grammar.grammar import (
    MAX_REGEX_CHARS,
    STARTING_SECONDS,
    Budget,
    GrammarMatcher,
    GrammarVocabulary,
    check_size,
    compile_grammar,
)
from sensorium.text.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "n": {"enum": [1, 22]}},
    "required": ["name", "n"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def vocabulary(chatml: Tokenizer) -> GrammarVocabulary:
    return GrammarVocabulary(chatml, chatml.max_token_id + 30)


def allowed(matcher: GrammarMatcher, vocab_size: int) -> list[int]:
    mask = np.full((vocab_size + 31) // 32, -1, dtype=np.int32)
    matcher.mask(mask)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert not bits[vocab_size:].any()
    return [int(i) for i in np.flatnonzero(bits)]


def generate(vocabulary: GrammarVocabulary, tokenizer: Tokenizer, grammar: str, seed: int) -> str:
    """Random tokens under the grammar; short ones are preferred late, so that it ends."""
    rng = random.Random(seed)
    matcher = vocabulary.matcher(grammar)
    out: list[int] = []
    for _ in range(300):
        choices = allowed(matcher, vocabulary.vocab_size)
        ends = [i for i in choices if i in tokenizer.eos_token_ids]
        token_id = rng.choice(ends or choices)
        assert matcher.accept(token_id)
        if token_id in tokenizer.eos_token_ids:
            assert set(allowed(matcher, vocabulary.vocab_size)) <= set(tokenizer.eos_token_ids)
            return tokenizer.decode(out)
        out.append(token_id)
    raise AssertionError("the grammar did not end")


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["chatml", "llama", "unigram_tokenizer"])
def test_schemas(kind: str, seed: int, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    vocabulary = GrammarVocabulary(tokenizer, tokenizer.max_token_id + 1)
    grammar = compile_grammar(StructuredOutputs(json=SCHEMA)).text
    value = json.loads(generate(vocabulary, tokenizer, grammar, seed))
    assert set(value) == {"name", "n"}
    assert value["n"] in (1, 22)
    assert len(value["name"]) <= 4


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        (StructuredOutputs(regex=r"[ab]{2}/\d"), r"[ab]{2}/\d"),
        (StructuredOutputs(regex=r"^(yes|no)$"), r"(yes|no)"),
        (StructuredOutputs(choice=('a "quoted"', "b\nc", "d\\e")), r'a "quoted"|b\nc|d\\e'),
        (StructuredOutputs(grammar='start: "x" /[0-9]/ "y"'), r"x[0-9]y"),
        (StructuredOutputs(grammar='root ::= "x" [0-9] "y"'), r"x[0-9]y"),
        (StructuredOutputs(json=json.dumps({"enum": ["u", "v"]})), r'"[uv]"'),
    ],
)
def test_other_constraints(
    vocabulary: GrammarVocabulary, chatml: Tokenizer, outputs: StructuredOutputs, pattern: str
) -> None:
    for seed in range(4):
        text = generate(vocabulary, chatml, compile_grammar(outputs).text, seed)
        assert re.fullmatch(pattern, text)


def test_json_object(vocabulary: GrammarVocabulary, chatml: Tokenizer) -> None:
    matcher = vocabulary.matcher(compile_grammar(StructuredOutputs(json_object=True)).text)
    first = {chatml.decode([i])[0] for i in allowed(matcher, vocabulary.vocab_size)}
    assert first == {"{"}


def test_blanks_are_bounded(vocabulary: GrammarVocabulary, chatml: Tokenizer) -> None:
    outputs = StructuredOutputs(json_object=True, whitespace="flexible")
    matcher = vocabulary.matcher(compile_grammar(outputs).text)
    (brace,) = chatml.encode("{")
    (blank,) = chatml.encode(" ")
    assert matcher.accept(brace)
    taken = 0
    while matcher.accept(blank):
        taken += 1
    assert 0 < taken <= 40


def test_tokens_that_are_not_allowed(vocabulary: GrammarVocabulary, chatml: Tokenizer) -> None:
    matcher = vocabulary.matcher(compile_grammar(StructuredOutputs(choice=("yes",))).text)
    assert matcher.error is None
    assert not matcher.is_accepting
    assert not matcher.accept(chatml.encode("n")[0])
    assert matcher.error
    assert allowed(matcher, vocabulary.vocab_size) == []


def test_masks_fit_tensors_and_smaller_models(chatml: Tokenizer) -> None:
    import torch

    grammar = compile_grammar(StructuredOutputs(regex="a+")).text
    size = chatml.token_id("<|im_end|>") + 1
    small = GrammarVocabulary(chatml, size)
    mask = torch.full(((size + 31) // 32,), -1, dtype=torch.int32)
    matcher = small.matcher(grammar)
    matcher.mask(mask)
    assert sum(bin(int(word) & 0xFFFFFFFF).count("1") for word in mask) == len(
        allowed(matcher, size)
    )


@pytest.mark.parametrize(
    ("outputs", "field"),
    [
        (StructuredOutputs(regex="("), "regex"),
        (StructuredOutputs(regex=r"(a)\1"), "regex"),
        (StructuredOutputs(regex="a" * (MAX_REGEX_CHARS + 1)), "regex"),
        (StructuredOutputs(json="{bad"), "json"),
        (StructuredOutputs(json="[1]"), "json"),
        (StructuredOutputs(json={"type": "zzz"}), "json"),
        (StructuredOutputs(json={"$ref": "http://x/y"}), "json"),
        (StructuredOutputs(json={"enum": ["x" * (1 << 19)]}), "json"),
        (StructuredOutputs(grammar="start: x"), "grammar"),
        (StructuredOutputs(grammar="root ::= ("), "grammar"),
        (StructuredOutputs(choice=tuple(map(str, range(10_000)))), "choice"),
    ],
)
def test_bad_constraints(outputs: StructuredOutputs, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        compile_grammar(outputs)
    assert caught.value.param == f"structured_outputs.{field}"
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    "outputs",
    [
        StructuredOutputs(regex="((a{1,100}){1,100}){1,100}"),
        StructuredOutputs(regex="(a|b|ab)*c(a|b){500}"),
        StructuredOutputs(json={"type": "string", "pattern": "(a{1,5000}){1,5000}"}),
    ],
)
def test_explosive_constraints_are_refused_or_run(
    vocabulary: GrammarVocabulary, outputs: StructuredOutputs
) -> None:
    try:
        matcher = vocabulary.matcher(compile_grammar(outputs).text)
    except InvalidRequestError:
        return
    for _ in range(3):
        choices = allowed(matcher, vocabulary.vocab_size)
        if matcher.error or not choices:
            return
        matcher.accept(choices[0])


def test_deep_schemas() -> None:
    deep: Any = {"type": "integer"}
    for _ in range(500):
        deep = {"type": "array", "items": deep}
    with pytest.raises(InvalidRequestError):
        compile_grammar(StructuredOutputs(json=deep))


def test_a_vocabulary_needs_an_end(chatml: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="end-of-sequence"):
        GrammarVocabulary(Tokenizer(chatml.backend), 100)


def test_a_grammar_that_costs_too_much_time_ends(
    vocabulary: GrammarVocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By processor time, so that a busy machine ends nobody.

    What was used is not given back all at once.
    """
    grammar = compile_grammar(StructuredOutputs(grammar="start: /[a-z ]+/")).text
    now = 0.0
    monkeypatch.setattr("sensorium.text.grammar.grammar.time.thread_time", lambda: now)
    matcher = vocabulary.matcher(grammar)
    for _ in range(300):
        assert matcher.accept(allowed(matcher, vocabulary.vocab_size)[0])
    assert matcher.error is None

    def slow(seconds: float) -> None:
        nonlocal now
        compute = matcher._matcher.compute_bitmask

        class Slow:
            def __getattr__(self, name: str) -> Any:
                return getattr(inner, name)

            def compute_bitmask(self) -> bytes:
                nonlocal now
                now += seconds
                return bytes(compute())

        inner = matcher._matcher
        matcher._matcher = Slow()

    slow(STARTING_SECONDS - 0.1)
    assert allowed(matcher, vocabulary.vocab_size)
    assert allowed(matcher, vocabulary.vocab_size), "the one that used it up"
    assert matcher.error == "it takes too long to follow"
    assert allowed(matcher, vocabulary.vocab_size) == []
    assert matcher.fresh().error is not None, "a sequence that starts again gets nothing back"
    assert matcher.fresh(Budget()).error is None


def test_sizes_are_checked_before_anything_is_made() -> None:
    ring: dict[str, Any] = {}
    ring["a"] = ring
    for outputs in (
        StructuredOutputs(json=ring),
        StructuredOutputs(json={"enum": [[]] * (1 << 19)}),
        StructuredOutputs(json={"a" * (1 << 19): 1}),
    ):
        with pytest.raises(InvalidRequestError, match="more than"):
            check_size(outputs)


def test_a_check_goes_as_far_as_the_first_mask(vocabulary: GrammarVocabulary) -> None:
    outputs = StructuredOutputs(regex="a+")
    assert vocabulary.check(outputs) == compile_grammar(outputs)
    with pytest.raises(InvalidRequestError) as caught:
        vocabulary.check(StructuredOutputs(regex=r"[^\x00-\U0010ffff]"))
    assert caught.value.param == "structured_outputs.regex"
