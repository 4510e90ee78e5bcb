"""Schemas, regular expressions and grammars that never end, explode or are none.

400, and nobody else waits.
"""

from __future__ import annotations

import concurrent.futures
import re
from typing import Any

import pytest

from tests.reliability.asking import Answer, Service, text

EXCLUDING = [
    {"type": "object", "properties": {"a": {"type": "string", "pattern": f".*{i}.*"}}}
    for i in range(200)
]
"""Patterns that must all hold: whether any text fulfils them takes for ever to find out."""

ENDLESS: dict[str, Any] = {"json": {"allOf": EXCLUDING}}


def tools(parameters: Any) -> dict[str, Any]:
    function = {"name": "f", "parameters": parameters}
    return {"tools": [{"type": "function", "function": function}], "tool_choice": "required"}


def ask(served: Service, constraint: dict[str, Any], **more: Any) -> Answer:
    return asked(served, structured_outputs=constraint, **more)


def asked(served: Service, **fields: Any) -> Answer:
    """Ask again while the answer says so: on a very busy machine a constraint is ended by the clock
    before it has had its processor time.
    """
    while True:
        answer = served.ask(text("a"), **{"max_tokens": 4, **fields})
        if answer.status != 503:
            return answer


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


HOSTILE: dict[str, dict[str, Any]] = {
    "regex of nested repetitions": {"regex": "((a{0,1000}){0,1000}){0,1000}"},
    "regex that backtracks elsewhere": {"regex": "(a+)+$"},
    "regex of many states": {"regex": "(a|b|ab)*c(a|b){5000}"},
    "regex with a reference": {"regex": r"(a)\1"},
    "regex that is none": {"regex": "["},
    "regex that is long": {"regex": "a" * 20_000},
    "regex that nothing fulfils": {"regex": r"[^\x00-\U0010ffff]"},
    "schema of an unknown type": {"json": {"type": "zzz"}},
    "schema that refers to a host": {"json": {"$ref": "http://media.example/schema.json"}},
    "schema that refers to a file": {"json": {"$ref": "file:///nowhere/schema.json"}},
    "schema that refers to itself": {"json": {"$ref": "#"}},
    "schema that refers in a ring": {
        "json": {
            "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
            "$ref": "#/$defs/a",
        }
    },
    "schema that is deep": {"json": nested(150)},
    "schema that is long": {"json": {"enum": ["x" * 300_000]}},
    "schema of many properties": {
        "json": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(8000)}}
    },
    "schema with a hostile pattern": {"json": {"type": "string", "pattern": "(a{1,5000}){1,5000}"}},
    "schema with a pattern that is none": {"json": {"type": "string", "pattern": "("}},
    "schema of odd numbers": {"json": {"type": "number", "minimum": 1e-300, "multipleOf": 1e-7}},
    "schema of empty bounds": {"json": {"type": "integer", "minimum": 5, "maximum": 1}},
    "schema of a huge minimum": {"json": {"type": "array", "minItems": 10**18, "items": {}}},
    "schema that is a text": {"json": "{"},
    "grammar that is none": {"grammar": "start: x"},
    "grammar that is ambiguous": {"grammar": 'start: s\ns: s s s | /./ | s s |\n'},
    "grammar of empty rules": {"grammar": "start: a\na: b\nb: a |\n"},
    "grammar in the other notation": {"grammar": "root ::= (" * 2000},
    "choices without number": {"choice": [str(i) for i in range(10_000)]},
    "choices that are long": {"choice": ["x" * 300_000]},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_constraints_are_served_or_refused(served: Service, name: str) -> None:
    answer = ask(served, HOSTILE[name])
    answer.is_discreet()
    if answer.status != 200:
        param = answer.error["param"] or ""
        assert param.startswith("structured_outputs") or "answer" in answer.error["message"]


@pytest.mark.parametrize("parameters", ["schema with a hostile pattern", "schema that is deep"])
def test_hostile_tools_are_served_or_refused(served: Service, parameters: str) -> None:
    answer = asked(served, **tools(HOSTILE[parameters]["json"]))
    answer.is_discreet()
    if answer.status != 200:
        assert answer.error["param"].startswith("tools")


@pytest.mark.parametrize("kind", ["structured_outputs", "response_format", "tools"])
def test_a_schema_that_never_compiles_is_refused(served: Service, kind: str) -> None:
    schema = {"allOf": [*EXCLUDING, {"title": kind}]}  # not the one that is known already
    fields: dict[str, dict[str, Any]] = {
        "structured_outputs": {"structured_outputs": {"json": schema}},
        "response_format": {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": schema},
            }
        },
        "tools": tools(schema),
    }
    answer = asked(served, **fields[kind])
    assert answer.status == 400
    assert answer.error["param"].startswith(kind)
    assert "simplify" in answer.error["message"]
    answer.is_discreet()


def test_a_schema_that_never_compiles_stalls_no_other_request(served: Service) -> None:
    """While schemas are being compiled that take all the time they may, others are answered.

    With a constraint of their own, with a picture, with plain text.
    """
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        slow = [
            pool.submit(ask, served, {"json": {"allOf": [*EXCLUDING, {"title": str(number)}]}})
            for number in range(4)
        ]
        num_answered = 0
        while not all(job.done() for job in slow):
            assert served.ask(text("What can you do?")).status == 200
            answer = ask(served, {"regex": f"[a-c]{{2}}{num_answered}"}, max_tokens=8)
            assert re.fullmatch(f"[a-c]{{2}}{num_answered}", answer.text)
            num_answered += 1
        assert num_answered >= 1, "others were answered only when the slow ones had been refused"
        assert [job.result().status for job in slow] == [400] * 4


def test_what_is_wrong_with_a_constraint_is_said(served: Service) -> None:
    answer = ask(served, {"regex": "a("})
    answer.is_refusal(400, "invalid_request", "structured_outputs.regex")
    assert "unclosed group" in answer.error["message"]
