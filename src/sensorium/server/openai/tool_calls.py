"""Parts of a chat's answer: content, reasoning, and calls of the request's tools."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from sensorium.outputs import CompletionOutput, RequestOutput
from sensorium.server.context import ModelContext
from sensorium.server.openai.protocol import ChatBody
from sensorium.text.detokenizer import TokenSpelling
from sensorium.text.tools.choice import ToolChoice, parse_tool_choice, parse_tools
from sensorium.text.tools.deltas import (
    ContentDelta,
    Delta,
    ReasoningDelta,
    ToolCallDelta,
    ToolCallEnd,
    new_call_id,
)
from sensorium.text.tools.forced import ForcedCall, forced_call
from sensorium.text.tools.forms import AnswerForms, ReasoningForm
from sensorium.text.tools.reader import (
    CallListReader,
    CallReader,
    CallsOnly,
    NamedCallReader,
    ToolCallReader,
)
from sensorium.text.tools.splitter import AnswerSplitter, opens_reasoning

_MOST_BEFORE = 4
"""Tokens at the beginning of an answer among which the opening tag is."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The text, OpenAI's ``tool_calls`` and the reasoning of a whole answer."""

    content: str
    calls: list[dict[str, Any]]
    reasoning: str = ""


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """Tools of a request, and the forms that its answer is read in.

    Attributes:
        choice: The choice among the tools.
        for_template: Tools that the template lists.
        forced: The constraint on calls.
        forms: The forms in which the model writes.
        parallel: More than one call may be made.
        constrained: A grammar begins with the answer, so there is no reasoning before it.
        continued: The text that the answer continues; None for an answer of its own.
        shows_reasoning: Reasoning is part of the answer.
        spelling: The texts of tokens.
    """

    choice: ToolChoice
    for_template: list[dict[str, Any]] = field(default_factory=list)
    forced: ForcedCall | None = None
    forms: AnswerForms = field(default_factory=AnswerForms)
    parallel: bool = True
    constrained: bool = False
    continued: str | None = None
    shows_reasoning: bool = True
    spelling: TokenSpelling | None = None

    def reader(self, prompt: str | None = None) -> DeltaReader:
        """Return a reader for one sample. ``prompt``: the rendered text that it answers."""
        return DeltaReader(self.splitter(prompt), shows_reasoning=self.shows_reasoning)

    def splitter(self, prompt: str | None = None) -> AnswerSplitter:
        """Return the splitter for one sample. ``prompt``: the rendered text that it answers."""
        opened = self.opens_reasoning(prompt)
        form = None if self.constrained else self.forms.reasoning
        return AnswerSplitter(self._call_reader(), form, opened=opened)

    def _call_reader(self) -> ToolCallReader | None:
        if self.choice.mode == "none":
            return None
        if self.forced is not None and self.forced.as_json:
            if self.choice.name is not None:
                return NamedCallReader(self.choice.name, self._new_id)
            return CallListReader(self._new_id)
        if self.forms.calls is None:
            return None
        schemas = {
            tool["function"]["name"]: tool["function"].get("parameters") or {}
            for tool in self.for_template
        }
        most = None if self.parallel else 1
        reader = CallReader(self.forms.calls.syntax, schemas, most=most)
        return CallsOnly(reader) if self.demands else reader

    @property
    def demands(self) -> bool:
        """Return whether the answer is a call, and nothing else."""
        return self.forced is not None and self.forced.demands

    @property
    def _new_id(self) -> Callable[[], str]:
        form = self.forms.calls
        return new_call_id if form is None else form.syntax.new_id

    def opens_reasoning(self, prompt: str | None) -> bool:
        """Return whether an answer to the prompt begins within reasoning."""
        form = self.forms.reasoning
        if form is None or self.constrained:
            return False
        if self.continued is not None:
            return self.continued.rfind(form.begin) > self.continued.rfind(form.end)
        return opens_reasoning(prompt, form)

    def num_reasoning_tokens(self, output: RequestOutput) -> int:
        """Return the number of generated tokens that are reasoning, with its tags."""
        return ReasoningCounter(self)(output)

    def reply(self, text: str, prompt: str | None = None) -> Reply:
        """Return the parts of a whole answer, without a call that was cut off."""
        splitter = self.splitter(prompt)
        content, reasoning = list[str](), list[str]()
        calls, arguments, complete = list[dict[str, Any]](), list[list[str]](), set[int]()
        for delta in (*splitter.feed(text), *splitter.flush()):
            if isinstance(delta, ContentDelta):
                content.append(delta.text)
            elif isinstance(delta, ReasoningDelta):
                reasoning.append(delta.text)
            elif isinstance(delta, ToolCallEnd):
                complete.add(delta.index)
            else:
                if delta.name is not None:
                    calls.append({k: v for k, v in _piece(delta).items() if k != "index"})
                    arguments.append([])
                arguments[-1].append(delta.arguments)
        kept = []
        for index, (call, pieces) in enumerate(zip(calls, arguments, strict=True)):
            call["function"]["arguments"] = "".join(pieces)
            if index in complete:
                kept.append(call)
        shown = "".join(reasoning) if self.shows_reasoning else ""
        return Reply("".join(content), kept, shown)


class ReasoningCounter:
    """Counts the tokens of one output that are reasoning, with its tags, while the output grows.

    Each call reads only what the samples got since the one before.
    """

    def __init__(self, plan: ToolPlan) -> None:
        self._plan = plan
        self._samples: dict[int, _SampleReasoning] = {}
        self._opened: bool | None = None

    def __call__(self, output: RequestOutput) -> int:
        """Return the number of generated tokens that are reasoning."""
        plan = self._plan
        form = plan.forms.reasoning
        if form is None or plan.constrained:
            return 0
        if self._opened is None:
            self._opened = plan.opens_reasoning(output.prompt)
        total = 0
        for sample in output.outputs:
            found = self._samples.get(sample.index)
            if found is None:
                found = _SampleReasoning(begun=self._opened or None)
                self._samples[sample.index] = found
            if plan.forms.end_id is not None:
                found.read_ids(sample, plan.forms.begin_id, plan.forms.end_id)
            elif plan.spelling is not None:
                found.read_text(sample, form, plan.spelling)
            total += found.num_tokens
        return total


@dataclass(slots=True)
class _SampleReasoning:
    """Reasoning of one sample, as far as it has been read.

    ``begun``: it begins with reasoning; None while that is not known. ``num_bytes``: bytes of its
    reasoning that tokens are still to be counted for.
    """

    begun: bool | None = None
    ended: bool = False
    num_tokens: int = 0
    num_chars: int = 0
    num_bytes: int = 0

    def read_ids(self, sample: CompletionOutput, begin_id: int | None, end_id: int) -> None:
        """Count up to the token that is the closing tag."""
        ids = sample.token_ids
        if self.begun is None:
            if begin_id is not None and begin_id in ids[:_MOST_BEFORE]:
                self.begun = True
            elif begin_id is None or len(ids) >= _MOST_BEFORE:
                self.begun = False
        if not self.begun or self.ended:
            return
        try:
            self.num_tokens = ids.index(end_id, self.num_tokens) + 1
            self.ended = True
        except ValueError:
            self.num_tokens = len(ids)

    def read_text(
        self, sample: CompletionOutput, form: ReasoningForm, spelling: TokenSpelling
    ) -> None:
        """Count the tokens that the text up to the closing tag is made of."""
        text, ids = sample.text, sample.token_ids
        if self.begun is None:
            start = text.lstrip()
            if start.startswith(form.begin):
                self.begun = True
            elif not form.begin.startswith(start):
                self.begun = False
        if not self.begun:
            return
        if not self.ended:
            at = text.find(form.end, max(0, self.num_chars - len(form.end)))
            self.ended = at >= 0
            stop = at + len(form.end) if self.ended else len(text)
            self.num_bytes += len(text[self.num_chars : stop].encode())
            self.num_chars = stop
        while self.num_bytes > 0 and self.num_tokens < len(ids):
            self.num_bytes -= len(spelling.to_bytes(ids[self.num_tokens]))
            self.num_tokens += 1


def tool_plan(context: ModelContext, body: ChatBody) -> ToolPlan:
    """Return the tools and the choice of ``body``. Raises InvalidRequestError with the place."""
    tools = parse_tools(body.tools)
    choice = parse_tool_choice(body.tool_choice, tools)
    parallel = body.parallel_tool_calls is not False
    listed = choice.among(tools)
    forced = forced_call(choice, tools, parallel=parallel, forms=context.forms)
    if forced is not None and not forced.demands and _is_constrained(body):
        forced = None
    return ToolPlan(
        choice,
        listed,
        forced,
        context.forms,
        parallel=parallel,
        constrained=(forced is not None and forced.demands) or _is_constrained(body),
        continued=_final_text(body) if body.continue_final_message else None,
        shows_reasoning=body.include_reasoning is not False,
        spelling=context.spelling,
    )


def _is_constrained(body: ChatBody) -> bool:
    form, given = body.response_format, body.structured_outputs or {}
    options = ("whitespace", "whitespace_pattern", "unsupported", "disable_any_whitespace")
    return (form is not None and form.type != "text") or any(
        value not in (None, False) for key, value in given.items() if key not in options
    )


def _final_text(body: ChatBody) -> str:
    """Return the text of the final message."""
    content = body.messages[-1].get("content") if body.messages else None
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    texts = (part.get("text") for part in parts if isinstance(part, dict))
    return "".join(text for text in texts if isinstance(text, str))


class DeltaReader:
    """Turns text, as it grows, into the ``delta`` members of chunks."""

    def __init__(self, splitter: AnswerSplitter, *, shows_reasoning: bool = True) -> None:
        self._splitter = splitter
        self._shows_reasoning = shows_reasoning
        self.has_calls = False

    def feed(self, text: str) -> list[dict[str, Any]]:
        """Return the deltas for the text that was added."""
        return list(self._members(self._splitter.feed(text)))

    def flush(self) -> list[dict[str, Any]]:
        """Return the deltas for text that was held back."""
        return list(self._members(self._splitter.flush()))

    def _members(self, deltas: Iterable[Delta]) -> Iterable[dict[str, Any]]:
        for delta in deltas:
            if isinstance(delta, ToolCallDelta):
                self.has_calls = True
                yield {"tool_calls": [_piece(delta)]}
            elif isinstance(delta, ContentDelta):
                yield {"content": delta.text}
            elif isinstance(delta, ReasoningDelta) and self._shows_reasoning:
                yield reasoning_members(delta.text)


def reasoning_members(text: str) -> dict[str, str]:
    """Return the members of a message or delta that hold reasoning, by both names in use."""
    return {"reasoning_content": text, "reasoning": text}


def _piece(delta: ToolCallDelta) -> dict[str, Any]:
    """Return a piece of a call: the first has id and name, later ones have arguments alone."""
    if delta.id is None:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    return {
        "index": delta.index,
        "id": delta.id,
        "type": "function",
        "function": {"name": delta.name, "arguments": delta.arguments},
    }
