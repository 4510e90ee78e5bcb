"""Calls whose arguments stand between tags, as Qwen3-Coder and GLM-4.5 write them.

Values have no types there: the schema of the tool says which of them are texts. All others are read
as JSON, and are texts where they are none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from sensorium.text.tools.deltas import NAME_CHARS, TOOL_NAME, CallSink
from sensorium.text.tools.source import STRICT_JSON, Reading, Source

_MOST_KEY = 256
_TAG = re.compile("<")


def function_call(source: Source, sink: CallSink, *, opened: bool) -> Reading[bool]:
    """Read ``<function=name><parameter=key>value</parameter>…</function>``.

    ``opened``: ``<function=`` was read already.
    """
    yield from source.blanks()
    if not opened and not (yield from source.takes("<function=")):
        return False
    name = ((yield from source.up_to(">", _MOST_KEY)) or "").strip()
    if TOOL_NAME.fullmatch(name) is None:
        return False
    yield from source.blanks()
    if not (yield from source.takes("<parameter=")):
        if not (yield from source.takes("</function>")):
            return False
        sink.whole(name, "{}")
        return True
    sink.begin(name)
    before = "{"
    while True:
        key = yield from source.up_to(">", _MOST_KEY)
        value = yield from _value(source, "</parameter>", ("<parameter=", "</function>"))
        if key is None or value is None:
            return True
        sink.arguments(before + _member(sink, name, key.strip(), value))
        before = ", "
        if not (yield from source.takes("<parameter=")):
            break
    sink.arguments("}")
    sink.end()
    yield from source.takes("</function>")
    return True


def keyed_call(source: Source, sink: CallSink) -> Reading[bool]:
    """Read ``name<arg_key>key</arg_key><arg_value>value</arg_value>…`` up to ``</tool_call>``."""
    yield from source.blanks()
    name = yield from source.takes_while(NAME_CHARS, 64)
    yield from source.blanks()
    if not name:
        return False
    if not (yield from source.takes("<arg_key>")):
        if name not in sink.tools or not (yield from source.takes("</tool_call>")):
            return False
        sink.whole(name, "{}")
        return True
    sink.begin(name)
    before = "{"
    while True:
        key = yield from source.up_to("</arg_key>", _MOST_KEY)
        yield from source.blanks()
        if key is None or not (yield from source.takes("<arg_value>")):
            return True
        value = yield from _value(source, "</arg_value>", ("<arg_key>", "</tool_call>"))
        if value is None:
            return True
        sink.arguments(before + _member(sink, name, key.strip(), value))
        before = ", "
        if not (yield from source.takes("<arg_key>")):
            break
    sink.arguments("}")
    sink.end()
    return True


def _value(source: Source, end: str, followers: tuple[str, ...]) -> Reading[str | None]:
    """Read a value up to its closing tag; None where there is none.

    A closing tag counts where one of ``followers`` or nothing comes after it: others stand in the
    value, such as code that a model writes about these very tags.
    """
    start = source.pos
    while (yield from source.skip_to(_TAG)):
        at = source.pos
        if not (yield from source.takes(end)):
            source.pos = at + 1
            continue
        yield from source.blanks()
        after = source.pos
        found = yield from source.takes_any(followers)
        if found is not None or not (yield from source.peek()):
            source.pos = after
            value = source.text(start, at)
            return value.removeprefix("\n").removesuffix("\n")
        source.pos = at + 1
    return None


def _member(sink: CallSink, name: str, key: str, value: str) -> str:
    """Return a member of the arguments as JSON."""
    return f"{json.dumps(key, ensure_ascii=False)}: {_json(value, sink.tools.get(name, {}), key)}"


def _json(value: str, schema: Mapping[str, Any], key: str) -> str:
    """Return a value as JSON: a text where the schema wants one, or where it is no JSON."""
    properties = schema.get("properties")
    wanted = properties.get(key) if isinstance(properties, Mapping) else None
    kind = wanted.get("type") if isinstance(wanted, Mapping) else None
    if kind != "string":
        text = value.strip()
        try:
            STRICT_JSON.decode(text)
        except (ValueError, RecursionError):
            pass
        else:
            return text
        if text in ("True", "False", "None"):
            return {"True": "true", "False": "false", "None": "null"}[text]
    return json.dumps(value, ensure_ascii=False)
