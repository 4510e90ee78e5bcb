"""Grammars of structural tags: fixed text, JSON and free text in an order that a request gives.

The forms are those of vLLM and SGLang (xgrammar): the older one has ``structures`` and
``triggers``, the newer one a tree, ``format``. Each part becomes a rule of one Lark grammar.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from sensorium.config import suggestion
from sensorium.errors import located
from sensorium.params import StructuredOutputs
from sensorium.text.grammar.json_grammar import expressed_schema
from sensorium.text.grammar.json_schema import SchemaError
from sensorium.text.grammar.library import JSON_IN_TAGS, Grammar, constraint_error, problem_of

MAX_PARTS = 4096
MAX_DEPTH = 32
MAX_CALLS = 1 << 16

_TEXT = r"/(.|\n)*/"
_TO_ESCAPE = re.compile(r"\\.|[/\n\r]", re.DOTALL)
"""An escaped character of a regular expression, or one that may not stand between slashes."""


def tag_grammar(outputs: StructuredOutputs, special: Mapping[str, int] | None = None) -> Grammar:
    """Return the grammar of ``outputs.structural_tag``.

    ``special``: ids of special tokens by their spelling, which no text matches: where fixed text
    spells one it is that token, and free text may have others. Raises InvalidRequestError, with the
    field as ``param``, for what is no structural tag, too large or, when the caller wants that,
    cannot be expressed.
    """
    given = _parsed(outputs.structural_tag)
    writer = _Writer(outputs, special or {})
    if "format" in given:
        _check_keys(given, ("type", "format"), "")
        start = writer.expression(given["format"], ".format")
    else:
        with located(rename=_place_in_structures):
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


def _place_in_structures(place: str) -> str:
    """Return the place in the older form of a place in the tree that it means."""
    place = place.replace("structural_tag.tags[", "structural_tag.structures[")
    return place.replace(".content.json_schema", ".schema")


class _Writer:
    """Writer of the rules.

    Attributes:
        rules: Lines of the grammar.
        grammars: Grammars that the rules refer to.
        relaxed: Keywords of schemas that are not enforced.
        is_json_only: There is no free text outside of JSON.
    """

    def __init__(self, outputs: StructuredOutputs, special: Mapping[str, int]) -> None:
        self.rules: list[str] = []
        self.grammars: list[dict[str, str]] = []
        self.relaxed: set[str] = set()
        self.is_json_only = True
        self._outputs = outputs
        self._num_parts = 0
        self._special = special
        longest_first = sorted(special, key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

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

    def literal(self, text: str) -> str:
        """Return the expression for fixed text, and the special tokens that it spells."""
        pieces = [piece for piece in self._split.split(text) if piece]
        return " ".join(map(self._piece, pieces)) or '""'

    def _piece(self, piece: str) -> str:
        token_id = self._special.get(piece)
        return json.dumps(piece, ensure_ascii=False) if token_id is None else f"<[{token_id}]>"

    def free_text(self, without: Sequence[str] = ()) -> str:
        """Return the expression for free text, with all special tokens but ``without``."""
        self.is_json_only = False
        text = self.rule(_TEXT)
        ids = sorted(i for spelling, i in self._special.items() if spelling not in without)
        others = ",".join(map(str, ids))
        return self.rule(f"{text} (<[{others}]> {text})*") if ids else text

    def text_up_to(self, ends: Sequence[str]) -> str:
        """Return the expression for free text that goes on to the first of ``ends``."""
        tokens = [end for end in ends if end in self._special]
        texts = [end for end in ends if end not in self._special]
        ways = []
        if tokens:
            last = " | ".join(map(self._piece, tokens))
            ways.append(f"{self.free_text(tokens)} ({last})")
        if texts:
            self.is_json_only = False
            lazy = self.rule(_lazy_pattern("|".join(map(_pattern_of, texts))), "[lazy]")
            ids = ",".join(str(i) for t, i in sorted(self._special.items()) if t not in tokens)
            before = f"({self.rule(_TEXT)} <[{ids}]>)* " if ids else ""
            ways.append(f"{before}{lazy}")
        return self.rule(" | ".join(ways))

    def const_string(self, node: Mapping[str, Any], place: str, depth: int) -> str:
        """Return fixed text."""
        return self.literal(_string(node, "value", place))

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
        inside = _TO_ESCAPE.sub(_within_slashes, pattern)
        return self.rule(f"/{inside}/")

    def grammar(self, node: Mapping[str, Any], place: str, depth: int) -> str:
        """Return text of a Lark grammar."""
        self.is_json_only = False
        name = f"g{len(self.grammars)}"
        self.grammars.append({"name": name, "lark_grammar": _string(node, "grammar", place)})
        return f"@{name}"

    def any_text(self, node: Mapping[str, Any], place: str, depth: int) -> str:
        """Return free text."""
        return self.free_text()

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
        before = self.literal(begin.removeprefix(begun))
        content = node.get("content")
        if isinstance(content, Mapping) and content.get("type") == "any_text" and all(ends):
            return f"{before} {self.text_up_to(ends)}"
        inner = self.expression(content, f"{place}.content", depth + 1)
        after = " | ".join(map(self.literal, ends))
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
            later.append(f"{self.text_up_to([found])} {body}")
            first.append(f"{self.literal(found)} {body}")
        text = self.free_text(triggers)
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
            more = f" ({self.literal(separator)} {any_of}){repeats}"
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


def _pattern_of(text: str) -> str:
    """Return a regular expression, within slashes, of a fixed text."""
    special = set("\\/.^$|?*+()[]{}#&-~\n\r\t")
    names = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return "".join(names.get(c, "\\" + c) if c in special else c for c in text)


def _within_slashes(found: re.Match[str]) -> str:
    """Return a match of ``_TO_ESCAPE`` as it is written between slashes."""
    names = {"/": "\\/", "\n": "\\n", "\r": "\\r"}
    return names.get(found[0][-1], found[0])


def _lazy_pattern(end: str) -> str:
    return rf"/(.|\n)*({end})/"


def _bad(place: str, what: str) -> NoReturn:
    raise constraint_error(f"structural_tag{place}", what.removesuffix("."))
