"""What clients mean by their schemas is what a grammar lets through, and what it cannot express
is said.
"""

from __future__ import annotations

import contextlib
import json
from typing import Any

import numpy as np
import pytest

from sensorium.errors import InvalidRequestError
from sensorium.params import StructuredOutputs
from sensorium.text.grammar.grammar import GrammarVocabulary, compile_grammar
from sensorium.text.grammar.json_patterns import plain_pattern
from sensorium.text.grammar.json_text import MAX_NUMBER_CHARS
from sensorium.text.tokenizer import Tokenizer

TEXT = {"type": "string"}


@pytest.fixture(scope="module")
def vocabulary(chatml: Tokenizer) -> GrammarVocabulary:
    return GrammarVocabulary(chatml, chatml.max_token_id + 30)


class Taster:
    """Tries texts on the grammar of a schema."""

    def __init__(self, vocabulary: GrammarVocabulary, tokenizer: Tokenizer) -> None:
        self.vocabulary = vocabulary
        self.tokenizer = tokenizer

    def takes(self, schema: Any, text: str, **options: Any) -> bool:
        grammar = compile_grammar(StructuredOutputs(json=schema, **options))
        matcher = self.vocabulary.matcher(grammar.text)
        return all(map(matcher.accept, self.tokenizer.encode(text))) and matcher.is_accepting


@pytest.fixture(scope="module")
def tastes(vocabulary: GrammarVocabulary, chatml: Tokenizer) -> Taster:
    return Taster(vocabulary, chatml)


def relaxed(schema: Any) -> tuple[str, ...]:
    return compile_grammar(StructuredOutputs(json=schema)).relaxed


NAMED = {"type": "object", "properties": {"a": TEXT}, "required": ["a"]}


@pytest.mark.parametrize(
    ("schema", "text", "is_taken"),
    [
        (NAMED, '{"a":"x"}', True),
        (NAMED, '{"a":"x","b":1}', False),
        ({**NAMED, "additionalProperties": True}, '{"a":"x","b":1}', True),
        ({**NAMED, "additionalProperties": {"type": "integer"}}, '{"a":"x","b":1}', True),
        ({**NAMED, "unevaluatedProperties": False}, '{"a":"x","b":1}', False),
        ({**NAMED, "unevaluatedProperties": True}, '{"a":"x","b":1}', True),
        ({"type": "object"}, '{"b":1}', True),
        ({"type": "object", "properties": {}}, '{"b":1}', False),
        ({"type": "array", "items": NAMED}, '[{"a":"x","b":1}]', False),
        ({"anyOf": [NAMED, {"type": "null"}]}, '{"a":"x","b":1}', False),
        ({"$ref": "#/$defs/N", "$defs": {"N": NAMED}}, '{"a":"x","b":1}', False),
        # What is required is listed by that.
        ({**NAMED, "required": ["a", "b"]}, '{"a":"x","b":[]}', True),
        # Who lists properties means an object.
        ({"properties": {"a": TEXT}}, '"x"', False),
        ({"items": TEXT}, '"x"', False),
    ],
)
def test_objects_that_list_properties_are_closed(
    tastes: Taster, schema: Any, text: str, is_taken: bool
) -> None:
    assert tastes.takes(schema, text) is is_taken


POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
COLOUR = {"type": "object", "properties": {"c": TEXT}, "required": ["c"]}
BOTH = '{"x":1,"c":"red"}'


@pytest.mark.parametrize(
    "schema",
    [
        {"allOf": [POINT, COLOUR]},
        {**POINT, "allOf": [COLOUR]},
        {**POINT, "$ref": "#/$defs/C", "$defs": {"C": COLOUR}},
        {
            "allOf": [{"$ref": "#/$defs/P"}, {"$ref": "#/$defs/C"}],
            "$defs": {"P": POINT, "C": COLOUR},
        },
        {**POINT, "anyOf": [COLOUR, {"properties": {"d": TEXT}, "required": ["d"]}]},
        {
            "allOf": [{"$ref": "#/$defs/Q"}, COLOUR],
            "$defs": {"P": POINT, "Q": {"$ref": "#/$defs/P"}},
        },
    ],
)
def test_what_schemas_of_one_value_list_is_closed_together(tastes: Taster, schema: Any) -> None:
    assert tastes.takes(schema, BOTH)
    assert not tastes.takes(schema, '{"x":1,"c":2}')
    assert not tastes.takes(schema, '{"x":1,"c":"red","q":1}')
    assert relaxed(schema) == ()


def test_alternatives_do_not_lend_each_other_properties(tastes: Taster) -> None:
    assert tastes.takes({"anyOf": [POINT, COLOUR]}, '{"c":"red"}')
    assert not tastes.takes({"anyOf": [POINT, COLOUR]}, BOTH)


@pytest.mark.parametrize(
    ("text", "whitespaces"),
    [
        ('{"a":"x","b":[1,2]}', {"none", "compact", "flexible"}),
        ('{"a": "x", "b": [1, 2]}', {"compact", "flexible"}),
        ('{"a":  "x", "b": [1, 2]}', {"flexible"}),
        ('{"a": "x",\n"b": [1, 2]}', {"flexible"}),
        ('{ "a": "x", "b": [1, 2]}', {"flexible"}),
        ('{"a": "x" , "b": [1, 2]}', {"flexible"}),
        ('{"a": "x", "b": [1, 2] }', {"flexible"}),
        ('{"a":' + 41 * " " + '"x", "b": [1, 2]}', set()),
    ],
)
def test_json_is_compact_unless_more_is_wanted(
    tastes: Taster, text: str, whitespaces: set[str]
) -> None:
    schema = {"type": "object", "properties": {"a": TEXT, "b": {"type": "array"}}}
    for whitespace in ("none", "compact", "flexible"):
        taken = tastes.takes(schema, text, whitespace=whitespace)
        assert taken is (whitespace in whitespaces), whitespace
    assert tastes.takes(schema, text, disable_any_whitespace=True) is ("none" in whitespaces)
    assert tastes.takes(schema, '{"a":\t"x"}', whitespace_pattern=r"\t")


@pytest.mark.parametrize("begin", ["1", "-0.", "0.25", "1e", "[1, 2"])
@pytest.mark.parametrize("schema", [{}, {"type": ["number", "array"]}])
def test_numbers_end(
    vocabulary: GrammarVocabulary, chatml: Tokenizer, begin: str, schema: Any
) -> None:
    """Digits are offered only as long as a number may become; in strings they are not counted."""
    matcher = vocabulary.matcher(compile_grammar(StructuredOutputs(json=schema)).text)
    for token_id in chatml.encode(begin):
        assert matcher.accept(token_id)
    (digit,) = chatml.encode("7")
    words = np.zeros(vocabulary.vocab_size // 32 + 1, np.int32)
    num_digits = 0
    while True:
        matcher.mask(words)
        if not words[digit // 32] >> (digit % 32) & 1:
            break
        assert matcher.accept(digit)
        num_digits += 1
        assert num_digits <= MAX_NUMBER_CHARS
    assert num_digits >= MAX_NUMBER_CHARS - len(begin)
    assert words.any()


def test_long_numbers_that_are_wanted_and_digits_in_strings_are_let_through(
    tastes: Taster, vocabulary: GrammarVocabulary, chatml: Tokenizer
) -> None:
    for schema, text in (
        ({"const": 10**40}, str(10**40)),
        (TEXT, '"' + "7" * 60 + '"'),
        ({"type": "number"}, "-1.7976931348623157e+308"),
        ({"type": "integer"}, str(2**64)),
    ):
        matcher = vocabulary.matcher(compile_grammar(StructuredOutputs(json=schema)).text)
        words = np.zeros(vocabulary.vocab_size // 32 + 1, np.int32)
        for token_id in chatml.encode(text):
            matcher.mask(words)
            assert words[token_id // 32] >> (token_id % 32) & 1, (schema, text)
            assert matcher.accept(token_id)
        assert matcher.is_accepting


@pytest.mark.parametrize(
    ("schema", "keywords"),
    [
        ({"type": "array", "items": TEXT, "uniqueItems": True}, ("uniqueItems",)),
        ({"type": "array", "items": TEXT, "uniqueItems": False}, ()),
        ({"type": "array", "items": TEXT, "uniqueItems": True, "maxItems": 1}, ()),
        ({"type": "object", "propertyNames": TEXT, "additionalProperties": TEXT}, ()),
        ({"type": "object", "propertyNames": {"enum": ["a"]}, "additionalProperties": TEXT}, ()),
        ({"type": "object", "propertyNames": {"pattern": "^a"}}, ()),
        ({"type": "object", "propertyNames": {"not": {"const": "a"}}}, ("propertyNames",)),
        ({"not": {"type": "string"}}, ("not",)),
        ({**NAMED, "if": {"required": ["b"]}, "then": {"properties": {"b": TEXT}}}, ("if",)),
        ({**NAMED, "dependentRequired": {"a": ["b"]}}, ("dependentRequired",)),
        ({**NAMED, "dependentSchemas": {"a": NAMED}}, ("dependentSchemas",)),
        ({"type": "array", "contains": TEXT, "minContains": 2}, ("contains",)),
        ({"type": "object", "properties": {"a": TEXT, "b": TEXT}, "minProperties": 2},
         ("minProperties",)),
        ({"oneOf": [POINT, COLOUR]}, ("oneOf",)),
        ({"oneOf": [TEXT, {"type": "integer"}]}, ()),
        ({"oneOf": [{"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}],
          "$defs": {n: {"type": "object", "properties": {"k": {"const": n}}, "required": ["k"]}
                    for n in "AB"}}, ()),
        ({"type": "string", "pattern": "^(?!x)[a-z]+$"}, ("pattern",)),
        ({"type": "string", "pattern": r"^(a)\1$"}, ("pattern",)),
        ({"type": "string", "pattern": r"^(?<y>\d{4})-\k<y>$"}, ("pattern",)),
        ({"type": "object", "patternProperties": {"^(?!x)a": TEXT}}, ("patternProperties",)),
        ({"type": "object", "patternProperties": {r"^(a)\1$": TEXT}}, ("patternProperties",)),
        ({"type": "object", "patternProperties": {"^a": TEXT, "^ab": TEXT}}, ("patternProperties",)),
        ({"type": "integer", "minimum": -(10**30)}, ("minimum",)),
        ({"$dynamicRef": "#a", "$dynamicAnchor": "a"}, ("$dynamicRef",)),
        ({"type": "array", "items": {"not": TEXT, "uniqueItems": True}}, ("not", "uniqueItems")),
    ],
)  # fmt: skip
def test_what_a_grammar_cannot_express_is_left_out_and_said(
    schema: Any, keywords: tuple[str, ...]
) -> None:
    assert relaxed(schema) == keywords
    outputs = StructuredOutputs(json=schema, unsupported="refuse")
    if not keywords:
        assert compile_grammar(outputs).relaxed == ()
        return
    with pytest.raises(InvalidRequestError, match=keywords[0].replace("$", r"\$")) as caught:
        compile_grammar(outputs)
    assert caught.value.param == "structured_outputs.json"


@pytest.mark.parametrize(
    "kind",
    "binary path password cuid2 emoji jwt base64 base64url uuid4 int32 idn-email color ulid "
    "x".split(),
)
def test_unknown_formats_are_annotations(tastes: Taster, kind: str) -> None:
    schema = {"type": "string", "format": kind}
    assert tastes.takes(schema, '"anything"')
    assert compile_grammar(StructuredOutputs(json=schema, unsupported="refuse")).relaxed == ()


@pytest.mark.parametrize(
    ("kind", "good"),
    [
        ("date", "2026-11-29"),
        ("date-time", "2026-11-29T12:00:00Z"),
        ("uuid", "123e4567-e89b-12d3-a456-426614174000"),
        ("ipv4", "1.2.3.4"),
        ("email", "a@b.example"),
        ("uri", "https://a.example/b"),
    ],
)
def test_known_formats_are_enforced(tastes: Taster, kind: str, good: str) -> None:
    assert tastes.takes({"type": "string", "format": kind}, json.dumps(good))
    assert not tastes.takes({"type": "string", "format": kind}, '"anything else"')


def test_formats_end(tastes: Taster) -> None:
    """A pattern that the client gives beside a format counts as well."""
    for kind, good, endless in (
        ("email", "a" * 64 + "@b.example", "a" * 65 + "@b.example"),
        ("uri", "https://a.example/" + "b" * 300, "a" * 17 + ":b"),
        ("date-time", "2026-11-29T12:00:00.123456+01:00", f"2026-11-29T12:00:00.{'1' * 40}Z"),
        ("duration", "P1Y2M3DT4H5M6S", f"P{'1' * 40}Y"),
    ):
        schema = {"type": "string", "format": kind}
        assert tastes.takes(schema, json.dumps(good))
        assert not tastes.takes(schema, json.dumps(endless))
        assert tastes.takes({**schema, "pattern": f"^{good[0]}"}, json.dumps(good))
        assert relaxed(schema) == ()
    other = {"type": "string", "format": "email", "pattern": "^x"}
    assert not tastes.takes(other, '"a@b.example"')


def test_names_of_properties_become_properties(tastes: Taster) -> None:
    schema = {
        "type": "object",
        "propertyNames": {"$ref": "#/$defs/K"},
        "additionalProperties": {"type": "integer"},
        "$defs": {"K": {"enum": ["a", "b"]}},
    }
    assert tastes.takes(schema, '{"b":1}')
    assert not tastes.takes(schema, '{"c":1}')
    assert not tastes.takes(schema, '{"b":"x"}')
    schema = {"type": "object", "propertyNames": {"minLength": 2}, "additionalProperties": TEXT}
    assert tastes.takes(schema, '{"ab":"x"}')
    assert not tastes.takes(schema, '{"a":"x"}')


def test_sets_of_few_values_have_few_items(tastes: Taster) -> None:
    schema = {"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True}
    assert tastes.takes(schema, '["a","b"]')
    assert not tastes.takes(schema, '["a","b","a"]')


def test_patterns_lose_their_assertions_alone(tastes: Taster) -> None:
    email = r"^(?!\.)(?!.*\.\.)([a-z.]*)[a-z]@([a-z]+\.)+[a-z]{2,}$"
    assert plain_pattern(email) == r"^([a-z.]*)[a-z]@([a-z]+\.)+[a-z]{2,}$"
    assert plain_pattern(r"^a\b[(?=x)]$") == r"^a[(?=x)]$"
    assert plain_pattern(r"\(?=a") == r"\(?=a"
    assert not tastes.takes({"type": "string", "pattern": email}, '"nobody"')
    with pytest.raises(InvalidRequestError, match="unclosed group"):
        compile_grammar(StructuredOutputs(json={"type": "string", "pattern": "(a"}))


def test_properties_that_only_a_condition_lists_may_come(tastes: Taster) -> None:
    schema = {
        **NAMED,
        "if": {"properties": {"a": {"const": "x"}}},
        "then": {"properties": {"b": {"type": "integer"}}},
    }
    assert tastes.takes(schema, '{"a":"x","b":1}')
    assert not tastes.takes(schema, '{"a":"x","b":"y"}')


def test_names_that_are_keywords_are_names(tastes: Taster) -> None:
    words = ("format", "not", "uniqueItems", "properties", "$ref", "enum")
    schema = {
        "type": "object",
        "properties": dict.fromkeys(words, TEXT),
        "required": list(words),
    }
    assert relaxed(schema) == ()
    assert tastes.takes(schema, json.dumps(dict.fromkeys(words, "x")))
    assert tastes.takes({"const": {"format": "zzz"}}, '{"format":"zzz"}')


@pytest.mark.parametrize(
    "schema",
    [
        {"$defs": {"T": {**NAMED, "allOf": [{"$ref": "#/$defs/T"}]}}, "$ref": "#/$defs/T"},
        {"properties": 3},
        {"propertyNames": {"$ref": "#"}},
        {"required": "a", "properties": {"a": TEXT}},
        {"allOf": 1, "anyOf": {}, "oneOf": None},
        {"pattern": 3, "format": [], "items": [1]},
        {"patternProperties": [1]},
        {"propertyNames": {"format": {}}},
        {"not": {}, "type": "object"},
        {"properties": {"a": {"not": {}}}},
        {"$defs": None, "definitions": {"x": NAMED}, "allOf": [{"$ref": "#/definitions/x"}, NAMED]},
        '{"propertyNames": {"minLength": 1e999}}',
        '{"type": "array", "uniqueItems": true, "maxItems": NaN, "items": {"enum": [1]}}',
        r'{"const": "\ud800"}',
    ],
)
def test_odd_schemas_are_refused_or_used(schema: Any) -> None:
    with contextlib.suppress(InvalidRequestError):
        assert compile_grammar(StructuredOutputs(json=schema)).text


def test_a_pattern_of_gaps_that_is_none_is_not_blamed_on_the_schema() -> None:
    with pytest.raises(InvalidRequestError, match="unclosed group") as caught:
        compile_grammar(StructuredOutputs(json=NAMED, whitespace_pattern="("))
    assert caught.value.param == "structured_outputs.whitespace_pattern"


def test_a_schema_that_nothing_fulfils_is_told_so() -> None:
    with pytest.raises(InvalidRequestError, match="allows no value at all"):
        compile_grammar(StructuredOutputs(json={"not": {}}))


def test_numbers_and_texts_that_are_no_json_are_named() -> None:
    for schema in ('{"minimum": 1e999}', '{"minimum": NaN}', r'{"const": "\ud800"}'):
        with pytest.raises(
            InvalidRequestError, match=r"structured_outputs\.json is not valid JSON"
        ):
            compile_grammar(StructuredOutputs(json=schema))


def test_names_whose_pattern_cannot_be_expressed_may_be_any_that_it_allows(tastes: Taster) -> None:
    schema = {"type": "object", "patternProperties": {"^(?!x)a": {"type": "integer"}}}
    assert tastes.takes(schema, '{"ab":1}')
    assert not tastes.takes(schema, '{"b":1}')
    assert not tastes.takes(schema, '{"ab":"x"}')
    schema = {"type": "object", "patternProperties": {r"^(a)\1$": {"type": "integer"}}}
    assert tastes.takes(schema, '{"aa":1}')


def test_the_tool_at_fault_is_found() -> None:
    calls = [
        {"type": "object", "properties": {"name": {"const": n}, "parameters": parameters}}
        for n, parameters in (("f", NAMED), ("g", {"type": "zzz"}))
    ]
    schema = {"type": "array", "items": {"anyOf": calls}}
    with pytest.raises(InvalidRequestError) as caught:
        compile_grammar(StructuredOutputs(json=schema))
    assert caught.value.param == "structured_outputs.json.items.anyOf[1]"
    assert "zzz" in caught.value.message


@pytest.mark.parametrize(
    ("begin", "sign"),
    [
        ('{"a":"x', '"'),
        ('{"a":"x\\', None),
        ('{"a":"x"', "}"),
        ('{"a":"x","b":[', "]"),
        ('{"a":"x","b":[1', "]"),
        ('{"a":"x","b":[1],"c":12', "}"),
        ('{"a":"x","b":[1],', None),
        ('{"a":"x","b":[1]}', None),
    ],
)
def test_who_wants_to_end_closes_what_is_open(
    vocabulary: GrammarVocabulary, chatml: Tokenizer, begin: str, sign: str | None
) -> None:
    schema = {
        "type": "object",
        "properties": {
            "a": TEXT,
            "b": {"type": "array", "items": {"type": "integer"}},
            "c": {"type": "number"},
        },
        "required": ["a"],
    }
    matcher = vocabulary.matcher(compile_grammar(StructuredOutputs(json=schema)).text)
    assert all(map(matcher.accept, chatml.encode(begin)))
    words = np.zeros(vocabulary.vocab_size // 32 + 1, np.int32)
    matcher.mask(words)
    token_id = matcher.closing_token(words)
    assert (None if token_id is None else chatml.decode([token_id])) == sign
    other = vocabulary.matcher(compile_grammar(StructuredOutputs(regex='"+')).text)
    assert other.closing_token(words) is None
