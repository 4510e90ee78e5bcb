"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from sensorium.outputs import CompletionOutput, RequestOutput
from sensorium.server.context import ModelContext
from sensorium.server.openai.answers import (
    Answer,
    AnswerStream,
    check_generation,
    respond,
    serving_request,
)
from sensorium.server.openai.generation import usage
from sensorium.server.openai.logprobs import chat_logprobs, prompt_logprobs
from sensorium.server.openai.metrics import answer_metrics
from sensorium.server.openai.prompts import chat_prompt
from sensorium.server.openai.protocol import ChatBody
from sensorium.server.openai.sampling import chat_params
from sensorium.server.openai.streaming import TextProgress
from sensorium.server.openai.tool_calls import (
    ReasoningCounter,
    ToolPlan,
    reasoning_members,
    tool_plan,
)


def chat_router() -> APIRouter:
    """Return the router of chat completions."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        return await respond(request, ChatBody, _begin)

    return router


def _begin(context: ModelContext, request: Request, body: ChatBody) -> ChatAnswer:
    model = check_generation(context, body)
    plan = tool_plan(context, body)
    prompt = chat_prompt(context, request, body, plan.for_template)
    params = chat_params(body, context.frontend.input_processor.default_params, plan.forced)
    serving = serving_request(request, body, [prompt], params, plan.forced)
    return ChatAnswer(context, body, serving, model, plan)


@dataclass(frozen=True, slots=True)
class ChatAnswer(Answer[ChatBody]):
    """The answer to one conversation."""

    id_prefix: ClassVar[str] = "chatcmpl"
    tools: ToolPlan

    @property
    def count_reasoning(self) -> Callable[[RequestOutput], int]:
        """Return what counts the reasoning tokens of the output, as it grows."""
        return ReasoningCounter(self.tools)

    @property
    def has_prediction(self) -> bool:
        """True when the request names the answer that it expects."""
        return self.body.prediction is not None

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """Return the answer that is not streamed."""
        [output] = outputs
        spelling, wants_ids = self.context.spelling, self.body.return_token_ids
        return {
            **self.head("chat.completion"),
            "choices": [self._choice(output, sample) for sample in output.outputs],
            "usage": usage(
                outputs,
                self.context.frontend.input_processor.modalities,
                reasoning=self.count_reasoning,
                prediction=self.has_prediction,
            ),
            "prompt_logprobs": prompt_logprobs(spelling, output.prompt_logprobs),
            "prompt_token_ids": output.prompt_token_ids if wants_ids else None,
            **({"metrics": answer_metrics(output)} if self.body.return_metrics else {}),
        }

    def stream(self) -> AnswerStream:
        """Return the state of a stream of which nothing has been sent."""
        return _ChatStream(self)

    def logprobs(self, output: CompletionOutput, start: int = 0) -> dict[str, Any] | None:
        """Return log probabilities of the tokens from ``start``; None when none were asked for."""
        if output.logprobs is None:
            return None
        num_top = self.body.top_logprobs or 0
        ids, entries = output.token_ids[start:], output.logprobs[start:]
        return chat_logprobs(self.context.spelling, ids, entries, num_top)

    def _choice(self, output: RequestOutput, sample: CompletionOutput) -> dict[str, Any]:
        reply = self.tools.reply(sample.text, output.prompt)
        message: dict[str, Any] = {"role": "assistant", "content": reply.content, "refusal": None}
        if reply.reasoning:
            message |= reasoning_members(reply.reasoning)
        if reply.calls or reply.reasoning or self.tools.demands:
            message["content"] = reply.content or None
        if reply.calls:
            message["tool_calls"] = reply.calls
        return {
            "index": sample.index,
            "message": message,
            "logprobs": self.logprobs(sample),
            "finish_reason": _finish_reason(sample, has_calls=bool(reply.calls)),
            "stop_reason": sample.stop_reason,
            "token_ids": sample.token_ids if self.body.return_token_ids else None,
        }


def _finish_reason(sample: CompletionOutput, *, has_calls: bool) -> str | None:
    return "tool_calls" if has_calls and sample.finish_reason == "stop" else sample.finish_reason


class _ChatStream(AnswerStream):
    """Chunks of a chat: for each choice a role, pieces of text and calls, and a reason to end."""

    def __init__(self, answer: ChatAnswer) -> None:
        super().__init__(answer, "chat.completion.chunk")
        self._answer = answer
        self._progress: dict[int, TextProgress] = {}
        self._output: RequestOutput | None = None

    def chunks(self, index: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """Yield chunks for what is new in ``output``."""
        self._output = output
        for sample in output.outputs:
            if sample.token_ids or sample.finished:
                yield from self._sample_chunks(output, sample)

    def last_chunks(self) -> list[dict[str, Any]]:
        """Return the chunk with usage and metrics, as far as they were asked for."""
        last = super().last_chunks()
        if self._answer.body.return_metrics and self._output is not None:
            last = last or [{**self._answer.head("chat.completion.chunk"), "choices": []}]
            last[-1]["metrics"] = answer_metrics(self._output)
        return last

    def _sample_chunks(
        self, output: RequestOutput, sample: CompletionOutput
    ) -> Iterator[dict[str, Any]]:
        progress = self._progress.get(sample.index)
        if progress is None:
            progress = self._progress[sample.index] = TextProgress(
                self._answer.tools.reader(output.prompt)
            )
            first = _choice(sample, {"role": "assistant", "content": ""})
            chunk = self.chunk(first, with_text=len(self._progress) > 1)
            if self._answer.body.return_token_ids:
                chunk["prompt_token_ids"] = output.prompt_token_ids
            yield chunk
        start = progress.num_tokens
        choices = [_choice(sample, delta) for delta in progress.deltas(sample)]
        wants_tokens = self._answer.body.return_token_ids or sample.logprobs is not None
        if not choices and start < len(sample.token_ids) and wants_tokens:
            choices = [_choice(sample, {"content": ""})]
        if choices:
            self._add_tokens(choices[0], sample, start)
        if sample.finished and progress.close():
            # With usage in each chunk, as in vLLM: each counts more tokens than the one before.
            if not (choices and self._report.always):
                choices.append(_choice(sample, {}))
            choices[-1]["finish_reason"] = _finish_reason(sample, has_calls=progress.has_calls)
            choices[-1]["stop_reason"] = sample.stop_reason
        yield from map(self.chunk, choices)

    def _add_tokens(self, choice: dict[str, Any], sample: CompletionOutput, start: int) -> None:
        choice["logprobs"] = self._answer.logprobs(sample, start)
        if self._answer.body.return_token_ids:
            choice["token_ids"] = sample.token_ids[start:]


def _choice(sample: CompletionOutput, delta: dict[str, Any]) -> dict[str, Any]:
    return {"index": sample.index, "delta": delta, "logprobs": None, "finish_reason": None}
