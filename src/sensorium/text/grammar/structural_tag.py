"""Grammars of structural tags: fixed text, JSON and free text in an order that a request gives.

The forms are those of vLLM and SGLang (xgrammar): the older one has ``structures`` and
``triggers``, the newer one a tree, ``format``. Each part becomes a rule of one Lark grammar.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from sensorium.config import suggestion
from sensorium.params import StructuredOutputs
from sensorium.text.grammar.json_grammar import expressed_schema
from sensorium.text.grammar.json_schema import SchemaError
from sensorium.text.grammar.library import JSON_IN_TAGS, Grammar, constraint_error, problem_of

MAX_PARTS = 4096
MAX_DEPTH = 32
MAX_CALLS = 1 << 16

_TEXT = r"/(.|\n)*/"


def tag_grammar(outputs: StructuredOutputs) -> Grammar:
    """Return the grammar of ``outputs.structural_tag``.

    Raises InvalidRequestError, with the field as ``param``, for what is no structural tag, too
    large or, when the caller wants that, cannot be expressed.
    """
    given = _parsed(outputs.structural_tag)
    writer = _Writer(outputs)
    if "format" in given:
        _check_keys(given, ("type", "format"), "")
        start = writer.expression(given["format"], ".format")
    else:
        start = writer.expression(_of_structures(given), "")
    head = JSON_IN_TAGS if writer.is_json_only else ""
    text = "\n".join([f"{head}%llguidance {{}}", f"start: {start}", *writer.rules, ""])
    if writer.grammars:
        first = {"name": "structural_tag", "lark_grammar": text}
        text = json.dumps({"grammars": [first, *writer.grammars]}, ensure_ascii=False)
    problem = problem_of(text)
    if problem is not None:
        _bad("", f"cannot be used: {problem}")
    return Grammar(text, tuple(sorted(writer.relaxed)), "structural_tag")


def _parsed(value: object) -> Mapping[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            _bad("", f"is not valid JSON: {error}")
    if not isinstance(value, Mapping) or value.get("type", "structural_tag") != "structural_tag":
        _bad("", "must be an object of type 'structural_tag'")
    return value


def _of_structures(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tree that the older form means. Its places stay those of the older form."""
    _check_keys(given, ("type", "structures", "triggers"), "")
    structures = given.get("structures")
    if not isinstance(structures, list) or not structures:
        _bad(".structures", "must be a non-empty list of objects with 'begin', 'schema' and 'end'")
    tags = []
    for i, structure in enumerate(structures):
        place = f".structures[{i}]"
        if not isinstance(structure, Mapping):
            _bad(place, "must be an object with 'begin', 'schema' and 'end'")
        _check_keys(structure, ("begin", "schema", "end"), place)
        content = {"type": "json_schema", "json_schema": structure.get("schema") or True}
        begin, end = structure.get("begin"), structure.get("end", "")
        tags.append({"type": "tag", "begin": begin, "content": content, "end": end})
    return {"type": "triggered_tags", "triggers": given.get("triggers"), "tags": tags}


class _Writer:
    """Writer of the rules.

    Attributes:
        rules: Lines of the grammar.
        grammars: Grammars that the rules refer to.
        relaxed: Keywords of schemas that are not enforced.
        is_json_only: There is no free text outside of JSON.
    """

    def __init__(self, outputs: StructuredOutputs) -> None:
        self.rules: list[str] = []
        self.grammars: list[dict[str, str]] = []
        self.relaxed: set[str] = set()
        self.is_json_only = True
        self._outputs = outputs
        self._num_parts = 0

    def expression(self, node: Any, place: str, depth: int = 0) -> str:
        """Return the expression for a part, and write the rules that it needs."""
        self._num_parts += 1
        if self._num_parts > MAX_PARTS or depth > MAX_DEPTH:
            _bad(place, f"has more than {MAX_PARTS} parts, or is nested deeper than {MAX_DEPTH}")
        if not isinstance(node, Mapping):
            _bad(place, f"must be an object with a 'type', got {type(node).__name__}")
        kind = node.get("type")
        found = _KINDS.get(kind) if isinstance(kind, str) else None
        if found is None:
            near = suggestion(str(kind)[:80], list(_KINDS))
            known = ", ".join(_KINDS)
            _bad(f"{place}.type", f"must be one of {known}, got {kind!r:.80}.{near}")
        keys, write = found
        _check_keys(node, ("type", *keys), place)
        return write(self, node, place, depth)

    def rule(self, body: str, options: str = "") -> str:
        """Write a rule and return its name."""
        name = f"r{len(self.rules)}"
        self.rules.append(f"{name}{options}: {body}")
        return name

    def const_string(self, node: Mapping[str, Any], place: str, depth: int) -> str:
        """Return fixed text."""
        return _literal(_string(node, "value", place))

    def token(self, node: Mapping[str, Any], place: str, depth: int) -> str:
        """Return a token by its id, which may be special."""
        token_id = node.get("token")
        if type(token_id) is not int or token_id < 0:
            _bad(f"{place}.token", f"must be a token id, got {token_id!r:.80}")
        return f"<[{token_id}]>"

    def json_schema(self, node: Mapping[str, Any], place: str, depth: int) -> str:
        """Return JSON of a schema."""
        schema = node.get("json_schema")
        place = f"{place}.json_schema"
        if schema is True:
            schema = {}
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError) as error:
                _bad(place, f"is not valid JSON: {error}")
        if not isinstance(schema, Mapping):
            _bad(place, "must be a JSON schema (an object), or true")
        try:
            inline, relaxed = expressed_schema(schema, self._outputs)
        except SchemaError as error:
            _bad(place, str(error))
        self.relaxed.update(relaxed)
        return self.rule(f"%json {json.dumps(inline, ensure_ascii=False)}")

    def regex(self, node: Mapping[str, Any], place: str, depth: int) -> str:
        """Return text of a regular expression."""
        self.is_json_only = False
        pattern = _string(node, "pattern", place)
        inside = pattern.replace("/", "\\/").replace("\n", "\\n").replace("\r", "\\r")
        return self.rule(f"/{inside}/")

    def grammar(self, node: Mapping[str, Any], place: str, depth: int) -> str:
        """Return text of a Lark grammar."""
        self.is_json_only = False
        name = f"g{len(self.grammars)}"
        self.grammars.append({"name": name, "lark_grammar": _string(node, "grammar", place)})
        return f"@{name}"

    def any_text(self, node: Mapping[str, Any], place: str, depth: int) -> str:
        """Return free text."""
        self.is_json_only = False
        return self.rule(_TEXT)

    def sequence(self, node: Mapping[str, Any], place: str, depth: int) -> str:
        """Return one part after the other."""
        return " ".join(self._elements(node, "elements", place, depth))

    def either(self, node: Mapping[str, Any], place: str, depth: int) -> str:
        """Return one of several parts."""
        return f"({' | '.join(self._elements(node, 'elements', place, depth))})"

    def tag(self, node: Mapping[str, Any], place: str, depth: int, begun: str = "") -> str:
        """Return a part between two texts. ``begun``: the beginning that is written already."""
        begin = _string(node, "begin", place, may_be_empty=True)
        ends = node.get("end", "")
        ends = [ends] if isinstance(ends, str) else ends
        if not isinstance(ends, list) or not ends or not all(isinstance(e, str) for e in ends):
            _bad(f"{place}.end", "must be a text or a non-empty list of texts")
        before = _literal(begin.removeprefix(begun))
        content = node.get("content")
        if isinstance(content, Mapping) and content.get("type") == "any_text" and all(ends):
            self.is_json_only = False
            either = "|".join(map(_pattern_of, ends))
            return f"{before} {self.rule(_lazy_pattern(either), '[lazy]')}"
        inner = self.expression(content, f"{place}.content", depth + 1)
        after = " | ".join(_literal(end) for end in ends)
        return self.rule(f"{before} {inner} ({after})")

    def triggered_tags(self, node: Mapping[str, Any], place: str, depth: int) -> str:
        """Return free text in which a trigger begins a tag."""
        self.is_json_only = False
        triggers, tags = node.get("triggers"), node.get("tags")
        if not isinstance(triggers, list) or not triggers:
            _bad(f"{place}.triggers", "must be a non-empty list of texts")
        for i, trigger in enumerate(triggers):
            if not isinstance(trigger, str) or not trigger:
                _bad(f"{place}.triggers[{i}]", "must be a non-empty text")
        first, later = [], []
        for i, tag in enumerate(_list(tags, f"{place}.tags")):
            at = f"{place}.tags[{i}]"
            if not isinstance(tag, Mapping):
                _bad(at, "must be an object of type 'tag'")
            _check_keys(tag, ("type", "begin", "content", "end"), at)
            begin = _string(tag, "begin", at)
            found = next((t for t in triggers if begin.startswith(t)), None)
            if found is None:
                _bad(f"{at}.begin", f"must begin with one of the triggers, got {begin!r:.80}")
            body = self.rule(self.tag(tag, at, depth + 1, begun=found))
            head = self.rule(_lazy_pattern(_pattern_of(found)), "[lazy]")
            later.append(f"{head} {body}")
            first.append(f"{_literal(found)} {body}")
        text = self.rule(_TEXT)
        any_of, begun = " | ".join(later), " | ".join(first)
        if node.get("stop_after_first"):
            return f"({begun})" if node.get("at_least_one") else f"({any_of} | {text})"
        if node.get("at_least_one"):
            return f"({begun}) ({any_of})* {text}"
        return f"({any_of})* {text}"

    def tags_with_separator(self, node: Mapping[str, Any], place: str, depth: int) -> str:
        """Return tags, one after the other, with a text between them."""
        separator = _string(node, "separator", place, may_be_empty=True)
        most = node.get("at_most", MAX_CALLS)
        if type(most) is not int or not 1 <= most <= MAX_CALLS:
            _bad(f"{place}.at_most", f"must be an integer from 1 to {MAX_CALLS}")
        any_of = self.rule(" | ".join(self._elements(node, "tags", place, depth)))
        if node.get("stop_after_first") or most == 1:
            more = ""
        else:
            repeats = "*" if most == MAX_CALLS else f"{{0,{most - 1}}}"
            more = f" ({_literal(separator)} {any_of}){repeats}"
        return self.rule(f"{any_of}{more}") + ("" if node.get("at_least_one") else "?")

    def _elements(self, node: Mapping[str, Any], key: str, place: str, depth: int) -> list[str]:
        elements = _list(node.get(key), f"{place}.{key}")
        return [
            self.expression(e, f"{place}.{key}[{i}]", depth + 1) for i, e in enumerate(elements)
        ]


_Write = Callable[[_Writer, Mapping[str, Any], str, int], str]
_KINDS: dict[str, tuple[tuple[str, ...], _Write]] = {
    "const_string": (("value",), _Writer.const_string),
    "json_schema": (("json_schema",), _Writer.json_schema),
    "regex": (("pattern",), _Writer.regex),
    "grammar": (("grammar",), _Writer.grammar),
    "any_text": ((), _Writer.any_text),
    "sequence": (("elements",), _Writer.sequence),
    "or": (("elements",), _Writer.either),
    "tag": (("begin", "content", "end"), _Writer.tag),
    "triggered_tags": (
        ("triggers", "tags", "at_least_one", "stop_after_first"),
        _Writer.triggered_tags,
    ),
    "tags_with_separator": (
        ("tags", "separator", "at_least_one", "stop_after_first", "at_most"),
        _Writer.tags_with_separator,
    ),
    "token": (("token",), _Writer.token),
}


def _check_keys(node: Mapping[str, Any], known: Sequence[str], place: str) -> None:
    for key in node:
        if key not in known:
            near = suggestion(str(key)[:80], list(known))
            _bad(
                place, f"has the unknown key {str(key)[:80]!r}; known are {', '.join(known)}.{near}"
            )


def _list(value: object, place: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        _bad(place, "must be a non-empty list")
    return value


def _string(node: Mapping[str, Any], key: str, place: str, *, may_be_empty: bool = False) -> str:
    value = node.get(key)
    if not isinstance(value, str) or not (value or may_be_empty):
        _bad(f"{place}.{key}", "must be a text" if may_be_empty else "must be a non-empty text")
    return value


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else '""'


def _pattern_of(text: str) -> str:
    """Return a regular expression, within slashes, of a fixed text."""
    special = set("\\/.^$|?*+()[]{}#&-~\n\r\t")
    names = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return "".join(names.get(c, "\\" + c) if c in special else c for c in text)


def _lazy_pattern(end: str) -> str:
    return rf"/(.|\n)*({end})/"


def _bad(place: str, what: str) -> NoReturn:
    raise constraint_error(f"structural_tag{place}", what.removesuffix("."))
