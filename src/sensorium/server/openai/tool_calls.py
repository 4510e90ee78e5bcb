"""Parts of a chat's answer: content, reasoning, and calls of the request's tools."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from sensorium.outputs import CompletionOutput, RequestOutput
from sensorium.server.context import ServingContext
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
from sensorium.text.tools.forms import AnswerForms
from sensorium.text.tools.reader import (
    CallListReader,
    CallReader,
    CallsOnly,
    NamedCallReader,
    ToolCallReader,
)
from sensorium.text.tools.splitter import AnswerSplitter, opens_reasoning


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
        opened = self._opens_reasoning(prompt)
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

    def _opens_reasoning(self, prompt: str | None) -> bool:
        form = self.forms.reasoning
        if form is None or self.constrained:
            return False
        if self.continued is not None:
            return self.continued.rfind(form.begin) > self.continued.rfind(form.end)
        return opens_reasoning(prompt, form)

    def num_reasoning_tokens(self, output: RequestOutput) -> int:
        """Return the number of generated tokens that are reasoning, with its tags."""
        forms = self.forms
        if forms.reasoning is None or self.constrained:
            return 0
        if forms.end_id is None:
            return sum(self._spelled_reasoning(sample, output.prompt) for sample in output.outputs)
        opened = self._opens_reasoning(output.prompt)
        total = 0
        for sample in output.outputs:
            ids = sample.token_ids
            if opened or (forms.begin_id is not None and forms.begin_id in ids[:4]):
                ended = forms.end_id in ids
                total += ids.index(forms.end_id) + 1 if ended else len(ids)
        return total

    def _spelled_reasoning(self, sample: CompletionOutput, prompt: str | None) -> int:
        """Return the number of tokens of reasoning whose closing tag is no single token."""
        form = self.forms.reasoning
        text = sample.text
        if form is None or self.spelling is None:
            return 0
        if not (self._opens_reasoning(prompt) or text.lstrip().startswith(form.begin)):
            return 0
        before, tag, _ = text.partition(form.end)
        num_bytes, count = len((before + tag).encode()), 0
        for token_id in sample.token_ids:
            if num_bytes <= 0:
                break
            num_bytes -= len(self.spelling.to_bytes(token_id))
            count += 1
        return count

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


def tool_plan(context: ServingContext, body: ChatBody) -> ToolPlan:
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
