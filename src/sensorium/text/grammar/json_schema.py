"""JSON schemas as clients send them become schemas that the grammar library takes.

Objects that list their properties are closed unless they say otherwise. What the library cannot
express is said in another way where that means the same, else left out and reported, so that the
caller can be told. Formats without a grammar are annotations, as JSON Schema has it. Runs where the
compiler runs: within limits of time and memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sensorium.text.grammar.json_patterns import pattern_of_lengths, plain_pattern

MAX_DEPTH = 120
"""Schemas within schemas; the library's JSON reader ends at 128."""

FORMATS = frozenset(
    "date-time time date duration email hostname ipv4 ipv6 uuid uri unknown".split()
)
"""Formats that the library has a grammar for."""

BOUNDS_OF_FORMATS = {
    "date-time": r"^[\s\S]{1,40}$",
    "time": r"^[\s\S]{1,24}$",
    "duration": r"^[\s\S]{1,40}$",
    "email": r"^[^@]{1,64}@([^.@]{1,63}\.){1,8}[^.@]{2,24}$",
    "uri": r"^[A-Za-z][A-Za-z0-9+.-]{0,15}:",
}
"""Patterns that bound what a weak model would write without end before it comes to the part that
a format needs."""

UNSUPPORTED = {
    "contains": "contains",
    "minContains": "contains",
    "maxContains": "contains",
    "dependentRequired": "dependentRequired",
    "dependentSchemas": "dependentSchemas",
    "dependencies": "dependencies",
    "if": "if",
    "then": "if",
    "else": "if",
    "unevaluatedItems": "unevaluatedItems",
    "$dynamicRef": "$dynamicRef",
    "$recursiveRef": "$recursiveRef",
}
"""Keywords that cannot be expressed, each with the name under which that is reported."""

_HARMLESS = ("$dynamicAnchor", "$recursiveAnchor", "$vocabulary")
_LISTS = ("allOf", "anyOf", "oneOf")
_OPEN = ("additionalProperties", "unevaluatedProperties")
_OBJECT_WORDS = ("properties", "required", "patternProperties", *_OPEN)
_APPLICATORS = ("$ref", "$dynamicRef", "if", "not", "const", "enum", *_LISTS)

Names = frozenset[str]
_NONE: Names = frozenset()


class SchemaError(ValueError):
    """A schema that is none; the text continues "…schema "."""


@dataclass(frozen=True, slots=True)
class Adapted:
    """A schema for the library.

    ``relaxed``: keywords of the caller's schema that it does not enforce, sorted.
    """

    schema: dict[str, Any]
    relaxed: tuple[str, ...]


def adapt(schema: Mapping[str, Any], *, without: Names = _NONE) -> Adapted:
    """Rewrite a schema so that the grammar library takes it.

    ``without``: further keywords to leave out, and to report. Raises SchemaError for one that is
    nested too deeply or that nothing fulfils.
    """
    adapter = _Adapter(schema, without)
    adapted = adapter.root()
    return Adapted(adapted, tuple(sorted(adapter.relaxed)))


@dataclass(slots=True)
class _Adapter:
    """Rewrites one schema.

    ``beside`` in its methods: names of properties that schemas of the same value list, or None for
    the only schema of a value.
    """

    source: Mapping[str, Any]
    without: Names
    relaxed: set[str] = field(default_factory=set)
    variants: dict[tuple[str, Names], str] = field(default_factory=dict)
    added: dict[str, Any] = field(default_factory=dict)

    def root(self) -> dict[str, Any]:
        """The whole schema."""
        adapted = self.schema(self.source, None, 0)
        if not isinstance(adapted, dict):
            raise SchemaError("allows no value at all: its 'not' excludes everything")
        if self.added:
            adapted["$defs"] = {**_members(adapted.get("$defs")), **self.added}
        return adapted

    def schema(self, schema: Any, beside: Names | None, depth: int) -> Any:
        """A schema or a part of one."""
        if depth > MAX_DEPTH:
            raise SchemaError(f"is nested more than {MAX_DEPTH} schemas deep")
        if not isinstance(schema, Mapping):
            return schema
        out = self._kept(schema)
        if out is None:
            return False
        self._object_words(schema, out)
        self._one_of(out)
        around = (beside or _NONE) | self._names(schema, 0)
        for word, value in list(out.items()):
            out[word] = self._below(word, value, schema, around, depth + 1)
        self._infer_type(schema, out, beside)
        self._close(schema, out, around)
        self._unique_items(schema, out)
        return out

    def _kept(self, schema: Mapping[str, Any]) -> dict[str, Any] | None:
        """The keywords that can be expressed; None for a schema that nothing fulfils."""
        if schema.get("not") in ({}, True) and "not" in schema:
            return None
        out: dict[str, Any] = {}
        for word, value in schema.items():
            if word in UNSUPPORTED or word in self.without:
                self.relaxed.add(UNSUPPORTED.get(word, word))
            elif word == "not":
                if value is not False:
                    self.relaxed.add("not")
            elif word == "format":
                if isinstance(value, str) and value in FORMATS:
                    out |= _bounded_format(value, schema)
            elif word == "pattern" and isinstance(value, str):
                self._pattern(value, out)
            elif word == "patternProperties" and isinstance(value, Mapping):
                out[word] = {self._name_pattern(name): below for name, below in value.items()}
            elif word not in _HARMLESS:
                out[word] = value
        return out

    def _pattern(self, pattern: str, out: dict[str, Any]) -> None:
        plain = plain_pattern(pattern)
        if plain != pattern:
            self.relaxed.add("pattern")
        if plain is not None:
            out["pattern"] = plain

    def _name_pattern(self, pattern: str) -> str:
        """A pattern of names that can be expressed.

        It matches all names when nothing is left of it.
        """
        plain = plain_pattern(pattern)
        if plain != pattern:
            self.relaxed.add("patternProperties")
        return plain or ""

    def _below(
        self, word: str, value: Any, schema: Mapping[str, Any], around: Names, depth: int
    ) -> Any:
        """The value of a keyword, with the schemas in it rewritten."""
        if word in ("properties", "patternProperties", "$defs", "definitions"):
            return _mapped(value, lambda below: self.schema(below, None, depth))
        if word in ("items", "additionalItems", "additionalProperties", "prefixItems"):
            if isinstance(value, list):
                return [self.schema(below, None, depth) for below in value]
            return self.schema(value, None, depth)
        if word == "allOf" and isinstance(value, list):
            return [self.schema(part, around, depth) for part in value]
        if word in ("anyOf", "oneOf") and isinstance(value, list):
            # What other alternatives list is not this one's.
            own = around - self._names({word: value}, 0)
            own |= self._names({k: v for k, v in schema.items() if k != word}, 0)
            return [self.schema(part, own, depth) for part in value]
        if word == "$ref" and isinstance(value, str):
            return self._reference(value, around - self._names({"$ref": value}, 0), depth)
        return value

    def _reference(self, reference: str, beside: Names, depth: int) -> str:
        """Return a reference, or one to a variant where others list properties of the value."""
        target = self._target(reference)
        if not beside or not isinstance(target, Mapping) or not self._names(target, 0):
            return reference
        key = (reference, beside)
        if key not in self.variants:
            name = self.variants[key] = f"variant {len(self.variants)}"
            self.added[name] = True  # until it is known: it may refer to itself
            self.added[name] = self.schema(target, beside, depth)
        return f"#/$defs/{self.variants[key]}".replace(" ", "%20")

    def _target(self, reference: Any) -> Any:
        """Return the target of a reference within this schema; None for others."""
        if not isinstance(reference, str) or not reference.startswith("#"):
            return None
        found: Any = self.source
        for step in reference[1:].split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            found = found.get(step) if isinstance(found, Mapping) else None
        return found

    def _names(self, schema: Any, depth: int, seen: frozenset[str] = frozenset()) -> Names:
        """Return the properties that a schema lists for a value, also through other schemas."""
        if not isinstance(schema, Mapping) or depth > MAX_DEPTH:
            return _NONE
        names = set(_members(schema.get("properties")))
        for word in _LISTS:
            for part in _items(schema.get(word)):
                names |= self._names(part, depth + 1, seen)
        for word in ("if", "then", "else"):
            names |= self._names(schema.get(word), depth + 1, seen)
        for part in _members(schema.get("dependentSchemas")).values():
            names |= self._names(part, depth + 1, seen)
        reference = schema.get("$ref")
        if isinstance(reference, str) and reference not in seen:
            names |= self._names(self._target(reference), depth + 1, seen | {reference})
        return frozenset(names)

    def _close(self, schema: Mapping[str, Any], out: dict[str, Any], around: Names) -> None:
        """Admit only listed properties, unless the schema says something about others."""
        if "unevaluatedProperties" in out:
            value = out.pop("unevaluatedProperties")
            out.setdefault(
                "additionalProperties", False if value is False else self.schema(value, None, 0)
            )
            if value is not False:
                return
        elif "additionalProperties" in out or not (
            isinstance(schema.get("properties"), Mapping) or "patternProperties" in schema
        ):
            return
        own = dict(_members(out.get("properties")))
        others = self._conditional(schema)
        required = [n for n in _items(schema.get("required")) if isinstance(n, str)]
        for name in (*sorted(around), *required):
            own.setdefault(name, others.get(name, True))
        out["properties"] = own
        out["additionalProperties"] = False

    def _conditional(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        """Properties that only ``then`` and ``else`` list, as either has them."""
        found: dict[str, list[Any]] = {}
        for word in ("then", "else"):
            part = schema.get(word)
            listed = _members(part.get("properties")) if isinstance(part, Mapping) else {}
            for name, value in listed.items():
                found.setdefault(name, []).append(self.schema(value, None, 1))
        return {n: v[0] if len(v) == 1 else {"anyOf": v} for n, v in found.items()}

    def _object_words(self, schema: Mapping[str, Any], out: dict[str, Any]) -> None:
        """Express ``propertyNames`` by properties or patterns, where that is possible."""
        rule = out.pop("propertyNames", None)
        if rule is None or rule is True:
            return
        for _ in range(MAX_DEPTH):
            if not isinstance(rule, Mapping) or not isinstance(rule.get("$ref"), str):
                break
            rule = self._target(rule["$ref"])
        says = (
            {}
            if not isinstance(rule, Mapping)
            else {k: v for k, v in rule.items() if k in _OF_NAMES}
        )
        if isinstance(rule, Mapping) and not says:
            return
        value = schema.get("additionalProperties", True)
        lists = [word for word in ("properties", "patternProperties") if _members(schema.get(word))]
        names = says.get("enum", [says["const"]] if "const" in says else None)
        if lists or (rule is not False and not says):
            self.relaxed.add("propertyNames")
        elif isinstance(names, list):
            out["properties"] = {name: value for name in names if isinstance(name, str)}
            out["additionalProperties"] = False
        elif rule is False:
            out["additionalProperties"] = False
        else:
            self._patterned(says, value, out)

    def _patterned(self, says: Mapping[str, Any], value: Any, out: dict[str, Any]) -> None:
        """Names that follow a pattern or have so many characters."""
        pattern = says.get("pattern")
        if pattern is None:
            pattern = pattern_of_lengths(says.get("minLength"), says.get("maxLength"))
        plain = plain_pattern(pattern) if isinstance(pattern, str) else None
        told = set(says) - ({"pattern"} if "pattern" in says else {"minLength", "maxLength"})
        if (
            plain != pattern
            or plain is None
            or told - {"format"}
            or str(says.get("format")) in FORMATS
        ):
            self.relaxed.add("propertyNames")
        if plain is not None and "patternProperties" not in self.without:
            out["patternProperties"] = {plain: value}
            out["additionalProperties"] = False

    def _one_of(self, out: dict[str, Any]) -> None:
        """``oneOf`` is ``anyOf`` where no value can fulfil two of its schemas.

        Elsewhere it is reported.
        """
        parts = out.get("oneOf")
        if not isinstance(parts, list):
            return
        if not ("discriminator" in out or self._exclude_another(parts)):
            self.relaxed.add("oneOf")
        if "anyOf" not in out:
            items = [("anyOf" if word == "oneOf" else word, value) for word, value in out.items()]
            out.clear()
            out.update(items)

    def _exclude_another(self, parts: list[Any]) -> bool:
        """Return whether the schemas are of types, constants or tags that differ."""
        targets = [self._resolved(part) for part in parts]
        if len(targets) < 2:
            return True
        tags: list[dict[str, set[str]]] = [_tags(target) for target in targets]
        shared = set.intersection(*(set(tag) for tag in tags))
        return any(_disjoint([tag[name] for tag in tags]) for name in shared)

    def _resolved(self, schema: Any) -> Any:
        for _ in range(MAX_DEPTH):
            if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
                break
            schema = self._target(schema["$ref"])
        return schema

    def _infer_type(
        self, schema: Mapping[str, Any], out: dict[str, Any], beside: Names | None
    ) -> None:
        """A schema that speaks of properties means objects, one that speaks of items lists."""
        if beside is not None or "type" in schema or any(word in schema for word in _APPLICATORS):
            return
        if any(word in schema for word in _OBJECT_WORDS):
            out["type"] = "object"
        elif "items" in schema or "prefixItems" in schema:
            out["type"] = "array"

    def _unique_items(self, schema: Mapping[str, Any], out: dict[str, Any]) -> None:
        """Bound arrays of different items by their number of different values."""
        unique = out.pop("uniqueItems", None)
        if not unique:
            return
        items = self._resolved(schema.get("items"))
        if isinstance(items, Mapping):
            values = items.get("enum", [items["const"]] if "const" in items else None)
            most = 2 if items.get("type") == "boolean" else None
            if isinstance(values, list):
                most = len({json.dumps(value, sort_keys=True) for value in values})
            limit = schema.get("maxItems", most)
            if most is not None and isinstance(limit, int | float):
                out["maxItems"] = min(most, limit)
                if out["maxItems"] <= 1:
                    return
        if schema.get("maxItems") not in (0, 1):
            self.relaxed.add("uniqueItems")


_OF_NAMES = ("enum", "const", "pattern", "minLength", "maxLength", "format", "not", *_LISTS)


def _bounded_format(kind: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    """A format, and beside it the pattern that bounds it."""
    bound = BOUNDS_OF_FORMATS.get(kind)
    if bound is None or "allOf" in schema:
        return {"format": kind}
    if "pattern" in schema:
        return {"format": kind, "allOf": [{"pattern": bound}]}
    return {"format": kind, "pattern": bound}


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {name: change(below) for name, below in value.items()}


def _members(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _tags(schema: Any) -> dict[str, set[str]]:
    """Return the properties that tell the values of a schema from others.

    Their types, their constants, and those of required properties; each as JSON text.
    """
    if not isinstance(schema, Mapping):
        return {}
    tags: dict[str, set[str]] = {}
    kinds = schema.get("type")
    if kinds is not None:
        found = {str(kind) for kind in (kinds if isinstance(kinds, list) else [kinds])}
        tags["type"] = {"number" if kind == "integer" else kind for kind in found}
    constants = _constants(schema)
    if constants is not None:
        tags["value"] = constants
    if schema.get("type") == "object":
        for name in _items(schema.get("required")):
            constants = _constants(_members(schema.get("properties")).get(str(name)))
            if constants is not None:
                tags[f"property {name}"] = constants
    return tags


def _constants(schema: Any) -> set[str] | None:
    if not isinstance(schema, Mapping):
        return None
    if "const" in schema:
        return {json.dumps(schema["const"], sort_keys=True)}
    values = schema.get("enum")
    return {json.dumps(v, sort_keys=True) for v in values} if isinstance(values, list) else None


def _disjoint(sets: list[set[str]]) -> bool:
    return len(set().union(*sets)) == sum(map(len, sets))
