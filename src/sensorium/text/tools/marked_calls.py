"""Calls between special tokens, as DeepSeek and Kimi write them."""

from __future__ import annotations

from sensorium.text.tools.deltas import TOOL_NAME, CallSink
from sensorium.text.tools.json_calls import streamed_object
from sensorium.text.tools.source import Reading, Source

DEEPSEEK_BEGIN, DEEPSEEK_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
KIMI_BEGIN, KIMI_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_CALL, _SEP, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_FENCE, _FENCE_END = "```json", "```"
_MOST_NAME = 128


def deepseek_calls(source: Source, sink: CallSink) -> Reading[bool]:
    """Read the calls after ``DEEPSEEK_BEGIN``.

    Version 3 writes the type, the name on a line of its own and fenced JSON; version 3.1 the name
    and JSON.
    """
    num_before = sink.num_calls
    while True:
        yield from source.blanks()
        start = source.pos
        if not (yield from _deepseek_call(source, sink)):
            source.pos = start
            break
    yield from source.takes(DEEPSEEK_END)
    return sink.num_calls > num_before


def _deepseek_call(source: Source, sink: CallSink) -> Reading[bool]:
    if not (yield from source.takes(_CALL)):
        return False
    name = ((yield from source.up_to(_SEP, _MOST_NAME)) or "").strip()
    fenced = False
    if name == "function":
        start = source.pos
        line = yield from source.up_to("\n", _MOST_NAME)
        yield from source.blanks()
        fenced = yield from source.takes(_FENCE)
        if fenced and line is not None:
            name = line.strip()
        else:
            source.pos = start
    yield from source.blanks()
    if TOOL_NAME.fullmatch(name) is None:
        return False
    if not (yield from streamed_object(source, sink, name)):
        return False
    yield from source.blanks()
    if fenced:
        yield from source.takes(_FENCE_END)
        yield from source.blanks()
    yield from source.takes(_CALL_END)
    return True


def kimi_calls(source: Source, sink: CallSink) -> Reading[bool]:
    """Read the calls after ``KIMI_BEGIN``: each has an id, ``functions.NAME:NUMBER``, and JSON."""
    num_before = sink.num_calls
    while True:
        yield from source.blanks()
        start = source.pos
        if not (yield from source.takes("<|tool_call_begin|>")):
            break
        found = yield from source.up_to("<|tool_call_argument_begin|>", _MOST_NAME)
        name = (found or "").strip().removeprefix("functions.").rpartition(":")[0]
        yield from source.blanks()
        is_call = TOOL_NAME.fullmatch(name) is not None
        if not is_call or not (yield from streamed_object(source, sink, name)):
            source.pos = start
            break
        yield from source.blanks()
        yield from source.takes("<|tool_call_end|>")
    yield from source.takes(KIMI_END)
    return sink.num_calls > num_before
