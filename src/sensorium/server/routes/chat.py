"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from sensorium.errors import InvalidRequestError
from sensorium.outputs import CompletionOutput, RequestOutput
from sensorium.server.context import ServingContext, context_of, request_id_of
from sensorium.server.errors import SPELLED
from sensorium.server.http.body import read_body
from sensorium.server.http.disconnect import unless_disconnected
from sensorium.server.http.sse import Chunks, EventStream
from sensorium.server.openai.generation import Job, finished_outputs, num_values, run_job, usage
from sensorium.server.openai.logprobs import chat_logprobs, prompt_logprobs
from sensorium.server.openai.prompts import chat_prompt
from sensorium.server.openai.protocol import ChatBody
from sensorium.server.openai.sampling import chat_params, constraint_param
from sensorium.server.openai.streaming import StreamReport, TextProgress
from sensorium.server.openai.tool_calls import ToolPlan, tool_plan
from sensorium.server.payload import json_response


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """What all parts of one answer have in common."""

    context: ServingContext
    body: ChatBody
    job: Job
    model: str
    tools: ToolPlan
    created: int = field(default_factory=lambda: int(time.time()))

    def head(self, kind: str) -> dict[str, Any]:
        """The members that the answer and each of its chunks begin with."""
        return {
            "id": f"chatcmpl-{self.job.request_id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }

    def logprobs(self, output: CompletionOutput, start: int = 0) -> dict[str, Any] | None:
        """Log probabilities of the tokens from ``start``; None when none were asked for."""
        if output.logprobs is None:
            return None
        num_top = self.body.top_logprobs or 0
        ids, entries = output.token_ids[start:], output.logprobs[start:]
        return chat_logprobs(self.context.spelling, ids, entries, num_top)


def chat_router() -> APIRouter:
    """The route of chat completions."""
    router = APIRouter()

    @router.post("/v1/chat/completions", response_model=None)
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        context = context_of(request)
        body, answer = await read_body(
            request, ChatBody, lambda body: _begin(context, request, body)
        )
        if body.stream:
            return EventStream(_chunks(answer), answer.job.headers)
        outputs = await unless_disconnected(request.receive, finished_outputs(context, answer.job))
        return await json_response(
            lambda: _completion(answer, outputs[0]), num_values(outputs), answer.job.headers()
        )

    return router


def _begin(context: ServingContext, request: Request, body: ChatBody) -> ChatAnswer:
    model = context.check_model(body.model)
    context.check_generates()
    check_stream_options(body)
    plan = tool_plan(body)
    job = Job(
        prompts=[chat_prompt(context, request, body, plan.shown)],
        params=chat_params(body, context.frontend.default_params, plan.forced),
        request_id=request_id_of(request, body.request_id),
        priority=body.priority or 0,
        spelled=request.scope["state"].get(SPELLED, {}),
        constraint_param=constraint_param(body, plan.forced),
    )
    return ChatAnswer(context, body, job, model, plan)


def check_stream_options(body: Any) -> None:
    """Raise InvalidRequestError for options of a stream where there is none."""
    if body.stream_options is not None and not body.stream:
        raise InvalidRequestError(
            "stream_options needs stream=true; leave it out otherwise.", param="stream_options"
        )


def _completion(answer: ChatAnswer, output: RequestOutput) -> dict[str, Any]:
    """The whole answer, not streamed."""
    completion = answer.head("chat.completion")
    completion["choices"] = [_choice(answer, sample) for sample in output.outputs]
    completion["usage"] = usage([output], answer.context.frontend.modalities)
    completion["prompt_logprobs"] = (
        None
        if output.prompt_logprobs is None
        else prompt_logprobs(answer.context.spelling, output.prompt_logprobs)
    )
    wants_ids = answer.body.return_token_ids
    completion["prompt_token_ids"] = output.prompt_token_ids if wants_ids else None
    return completion


def _choice(answer: ChatAnswer, sample: CompletionOutput) -> dict[str, Any]:
    reply = answer.tools.reply(sample.text)
    message: dict[str, Any] = {"role": "assistant", "content": reply.content, "refusal": None}
    finish_reason: str | None = sample.finish_reason
    if reply.calls or answer.tools.forced is not None:
        message["content"] = reply.content or None
    if reply.calls:
        message["tool_calls"] = reply.calls
        finish_reason = "tool_calls" if finish_reason == "stop" else finish_reason
    return {
        "index": sample.index,
        "message": message,
        "logprobs": answer.logprobs(sample),
        "finish_reason": finish_reason,
        "stop_reason": sample.stop_reason,
        "token_ids": sample.token_ids if answer.body.return_token_ids else None,
    }


async def _chunks(answer: ChatAnswer) -> Chunks:
    """The answer as chunks: a role, pieces of text, a reason to end for each choice; then the
    usage.
    """
    stream = _ChatStream(answer)
    async with aclosing(run_job(answer.context, answer.job)) as steps:
        async for _, output in steps:
            yield list(stream.chunks(output))
    yield list(stream.last())


class _ChatStream:
    """Which parts of an answer have been sent."""

    def __init__(self, answer: ChatAnswer) -> None:
        self._answer = answer
        self._progress: dict[int, TextProgress] = {}
        self._report = StreamReport(
            answer.body.stream_options,
            answer.context.frontend.modalities,
            forced=answer.context.config.enable_force_include_usage,
        )

    def chunks(self, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """What is new in ``output``."""
        self._report.take(0, output)
        for sample in output.outputs:
            if sample.token_ids or sample.finished:
                yield from self._sample_chunks(output, sample)

    def last(self) -> Iterator[dict[str, Any]]:
        """What follows the last choice's end."""
        yield from self._report.last(self._answer.head("chat.completion.chunk"))

    def _sample_chunks(
        self, output: RequestOutput, sample: CompletionOutput
    ) -> Iterator[dict[str, Any]]:
        progress = self._progress.get(sample.index)
        if progress is None:
            progress = self._progress[sample.index] = TextProgress(self._answer.tools.reader())
            role = {"role": "assistant", "content": ""}
            chunk = self._chunk(sample, role, with_text=len(self._progress) > 1)
            if self._answer.body.return_token_ids:
                chunk["prompt_token_ids"] = output.prompt_token_ids
            yield chunk
        start = progress.num_tokens
        deltas = progress.deltas(sample)
        news = start < len(sample.token_ids)
        wants_tokens = self._answer.body.return_token_ids or sample.logprobs is not None
        if not deltas and news and wants_tokens:
            deltas = [{"content": ""}]
        joins_end = sample.finished and self._report.always
        for position, delta in enumerate(deltas):
            chunk = self._chunk(sample, delta)
            if position == 0:
                self._add_tokens(chunk["choices"][0], sample, start)
            # With usage all along, as in vLLM: each chunk counts more tokens than the one before.
            if joins_end and position == len(deltas) - 1 and progress.close():
                self._add_end(chunk["choices"][0], sample, progress)
            yield chunk
        if sample.finished and progress.close():
            chunk = self._chunk(sample, {})
            self._add_end(chunk["choices"][0], sample, progress)
            yield chunk

    def _add_end(
        self, choice: dict[str, Any], sample: CompletionOutput, progress: TextProgress
    ) -> None:
        called = progress.has_calls and sample.finish_reason == "stop"
        choice["finish_reason"] = "tool_calls" if called else sample.finish_reason
        choice["stop_reason"] = sample.stop_reason

    def _add_tokens(self, choice: dict[str, Any], sample: CompletionOutput, start: int) -> None:
        choice["logprobs"] = self._answer.logprobs(sample, start)
        if self._answer.body.return_token_ids:
            choice["token_ids"] = sample.token_ids[start:]

    def _chunk(
        self, sample: CompletionOutput, delta: dict[str, Any], *, with_text: bool = True
    ) -> dict[str, Any]:
        chunk = self._answer.head("chat.completion.chunk")
        chunk["choices"] = [
            {"index": sample.index, "delta": delta, "logprobs": None, "finish_reason": None}
        ]
        return self._report.mark(chunk, with_text=with_text)
