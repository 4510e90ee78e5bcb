"""Splitting of an answer into reasoning, content and tool calls, while it is written."""

from __future__ import annotations

from sensorium.text.tools.deltas import ContentDelta, Delta, ReasoningDelta
from sensorium.text.tools.forms import ReasoningForm
from sensorium.text.tools.reader import ToolCallReader


class PlainReader:
    """All text is content."""

    def feed(self, text: str) -> list[Delta]:
        """Return the text."""
        return [ContentDelta(text)] if text else []

    def flush(self) -> list[Delta]:
        """Return nothing: no text was held back."""
        return []


class AnswerSplitter:
    """Splitter of one sample's text. The deltas say the same however the text is cut into pieces.

    Reasoning stands at the beginning only; white space around it is dropped. Without its closing
    tag all text is reasoning. In reasoning no calls are looked for.

    Args:
        calls: The reader of what follows the reasoning; None where all of it is content.
        reasoning: The form of reasoning; None where it is not looked for.
        opened: The answer begins within reasoning, as the prompt ends with its first tag.
    """

    def __init__(
        self,
        calls: ToolCallReader | None = None,
        reasoning: ReasoningForm | None = None,
        *,
        opened: bool = False,
    ) -> None:
        self._calls = calls or PlainReader()
        self._form = reasoning
        self._buffer = ""
        if reasoning is None:
            self._state = "content"
        else:
            self._state = "reasoning" if opened else "start"
        self._has_begun = False

    def feed(self, text: str) -> list[Delta]:
        """Return the deltas that new text completes."""
        if self._form is None or self._state == "content":
            return self._calls.feed(text)
        self._buffer += text
        deltas: list[Delta] = []
        if self._state == "start":
            self._start(self._form)
        if self._state == "reasoning":
            self._reason(self._form, deltas)
        if self._state == "after":
            self._buffer = self._buffer.lstrip()
            if self._buffer:
                self._state = "content"
        if self._state == "content":
            rest, self._buffer = self._buffer, ""
            deltas += self._calls.feed(rest)
        return deltas

    def flush(self) -> list[Delta]:
        """Return the rest, when the generation has ended."""
        rest, self._buffer = self._buffer, ""
        if self._state == "start":
            return [*self._calls.feed(rest), *self._calls.flush()]
        if self._state == "reasoning":
            rest = rest.rstrip()
            return [ReasoningDelta(rest)] if rest else []
        return self._calls.flush()

    def _start(self, form: ReasoningForm) -> None:
        """Find out whether the answer begins with reasoning."""
        rest = self._buffer.lstrip()
        if rest.startswith(form.begin):
            self._state, self._buffer = "reasoning", rest[len(form.begin) :]
        elif not form.begin.startswith(rest):
            self._state = "content"

    def _reason(self, form: ReasoningForm, deltas: list[Delta]) -> None:
        """Report reasoning, but for its last white space and what may begin the closing tag."""
        text, tag, rest = self._buffer.partition(form.end)
        if not self._has_begun:
            text = text.lstrip()
        held = 0 if tag else _num_partial(text, form.end)
        kept = text[: len(text) - held].rstrip()
        if kept:
            self._has_begun = True
            deltas.append(ReasoningDelta(kept))
        self._buffer = rest if tag else text[len(kept) :]
        if tag:
            self._state = "after"


def _num_partial(text: str, tag: str) -> int:
    """Return the length of the longest end of ``text`` that begins ``tag``."""
    sizes = range(min(len(tag) - 1, len(text)), 0, -1)
    return next((size for size in sizes if text.endswith(tag[:size])), 0)


_TAIL = 64
"""Characters at the end of a prompt that tell whether it opens reasoning."""


def opens_reasoning(prompt: str | None, form: ReasoningForm) -> bool:
    """Return whether an answer to ``prompt`` begins within reasoning."""
    text = (prompt or "")[-_TAIL:].rstrip()
    if text.endswith(form.begin):
        return True
    return form.opened and not text.endswith(form.end)
