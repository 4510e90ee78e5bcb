"""``POST /v1/completions``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from sensorium.outputs import CompletionOutput, RequestOutput
from sensorium.server.context import ServingContext, context_of, request_id_of
from sensorium.server.errors import SPELLED
from sensorium.server.http.body import read_body
from sensorium.server.http.disconnect import unless_disconnected
from sensorium.server.http.sse import Chunks, EventStream
from sensorium.server.openai.generation import Job, finished_outputs, num_values, run_job, usage
from sensorium.server.openai.logprobs import completion_logprobs, prompt_logprobs
from sensorium.server.openai.prompts import raw_prompts
from sensorium.server.openai.protocol import CompletionBody
from sensorium.server.openai.sampling import completion_params, constraint_param
from sensorium.server.openai.streaming import StreamReport
from sensorium.server.payload import json_response
from sensorium.server.routes.chat import check_stream_options


@dataclass(frozen=True, slots=True)
class CompletionAnswer:
    """What all parts of one answer have in common."""

    context: ServingContext
    body: CompletionBody
    job: Job
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def hides_text(self) -> bool:
        """Whether only the prompt is wanted: ``max_tokens=0`` with ``echo``."""
        return self.body.max_tokens == 0

    @property
    def num_hidden(self) -> int:
        """Generated tokens of each sample that are not shown."""
        return 1 if self.hides_text else 0

    def head(self) -> dict[str, Any]:
        """The members that the answer and each of its chunks begin with."""
        return {
            "id": f"cmpl-{self.job.request_id}",
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }

    def choice_index(self, prompt_index: int, sample: CompletionOutput) -> int:
        """Samples of the first prompt come first."""
        return prompt_index * self.job.params.n + sample.index

    def prompt_text(self, output: RequestOutput) -> str:
        """What ``echo`` puts in front."""
        if output.prompt is not None:
            return output.prompt
        tokenizer = self.context.frontend.tokenizer
        # A model's vocabulary may be padded beyond its tokenizer's, with ids that stand for no text.
        return tokenizer.decode([i for i in output.prompt_token_ids if i <= tokenizer.max_token_id])


def completions_router() -> APIRouter:
    """The route of text completions."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=None)
    async def completions(request: Request) -> Response:
        """Continue one or several prompts."""
        context = context_of(request)
        body, answer = await read_body(
            request, CompletionBody, lambda body: _begin(context, request, body)
        )
        if body.stream:
            return EventStream(_chunks(answer), answer.job.headers)
        outputs = await unless_disconnected(request.receive, finished_outputs(context, answer.job))
        return await json_response(
            lambda: _completion(answer, outputs), num_values(outputs), answer.job.headers()
        )

    return router


def _begin(context: ServingContext, request: Request, body: CompletionBody) -> CompletionAnswer:
    model = context.check_model(body.model)
    context.check_generates()
    check_stream_options(body)
    job = Job(
        prompts=raw_prompts(request, body),
        params=completion_params(body, context.frontend.default_params),
        request_id=request_id_of(request, body.request_id),
        priority=body.priority or 0,
        spelled=request.scope["state"].get(SPELLED, {}),
        constraint_param=constraint_param(body),
    )
    return CompletionAnswer(context, body, job, model)


def _completion(answer: CompletionAnswer, outputs: list[RequestOutput]) -> dict[str, Any]:
    """The whole answer, not streamed."""
    completion = answer.head()
    completion["choices"] = [
        _choice(answer, index, output, sample)
        for index, output in enumerate(outputs)
        for sample in output.outputs
    ]
    completion["usage"] = usage(
        outputs, answer.context.frontend.modalities, num_hidden=answer.num_hidden
    )
    return completion


def _choice(
    answer: CompletionAnswer, index: int, output: RequestOutput, sample: CompletionOutput
) -> dict[str, Any]:
    piece = _Piece(answer, output, sample, 0, 0, with_prompt=bool(answer.body.echo))
    choice = piece.choice(answer.choice_index(index, sample))
    choice["finish_reason"] = "length" if answer.hides_text else sample.finish_reason
    choice["stop_reason"] = sample.stop_reason
    shown = None if answer.body.prompt_logprobs is None else output.prompt_logprobs
    spelling = answer.context.spelling
    choice["prompt_logprobs"] = None if shown is None else prompt_logprobs(spelling, shown)
    choice.setdefault("prompt_token_ids", None)
    choice.setdefault("token_ids", None)
    return choice


@dataclass(slots=True)
class _Piece:
    """A part of one sample: the text from ``num_chars`` and the tokens from ``num_tokens``, and
    the prompt if wanted.

    ``offset``: characters of the choice that were sent before.
    """

    answer: CompletionAnswer
    output: RequestOutput
    sample: CompletionOutput
    num_chars: int
    num_tokens: int
    with_prompt: bool
    offset: int = 0

    def choice(self, index: int) -> dict[str, Any]:
        """The choice without a reason to end."""
        choice: dict[str, Any] = {
            "index": index,
            "text": self._text(),
            "logprobs": self._logprobs(),
            "finish_reason": None,
        }
        if self.answer.body.return_token_ids:
            choice["token_ids"] = self._new_tokens()
            if self.num_tokens == 0:
                choice["prompt_token_ids"] = self.output.prompt_token_ids
        return choice

    def _text(self) -> str:
        prompt = self.answer.prompt_text(self.output) if self.with_prompt else ""
        return prompt if self.answer.hides_text else prompt + self.sample.text[self.num_chars :]

    def _new_tokens(self) -> list[int]:
        return [] if self.answer.hides_text else self.sample.token_ids[self.num_tokens :]

    def _logprobs(self) -> dict[str, Any] | None:
        num_top = self.answer.body.logprobs
        if num_top is None:
            return None
        token_ids = self._new_tokens()
        entries: list[Any] = list((self.sample.logprobs or [])[self.num_tokens :][: len(token_ids)])
        if self.with_prompt and self.output.prompt_logprobs is not None:
            token_ids = [*self.output.prompt_token_ids, *token_ids]
            entries = [*self.output.prompt_logprobs, *entries]
        spelling = self.answer.context.spelling
        return completion_logprobs(spelling, token_ids, entries, num_top, self.offset)


async def _chunks(answer: CompletionAnswer) -> Chunks:
    """The answer as chunks of text, each choice ended by a reason; then the usage."""
    stream = _CompletionStream(answer)
    async with aclosing(run_job(answer.context, answer.job)) as steps:
        async for index, output in steps:
            yield list(stream.chunks(index, output))
    yield list(stream.last())


@dataclass(slots=True)
class _Sent:
    num_chars: int = 0
    num_tokens: int = 0
    offset: int = 0
    finished: bool = False


class _CompletionStream:
    """Which parts of an answer have been sent."""

    def __init__(self, answer: CompletionAnswer) -> None:
        self._answer = answer
        self._sent: dict[int, _Sent] = {}
        self._report = StreamReport(
            answer.body.stream_options,
            answer.context.frontend.modalities,
            forced=answer.context.config.enable_force_include_usage,
        )
        self._report.num_hidden = answer.num_hidden

    def chunks(self, index: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """What is new in the output of a prompt."""
        self._report.take(index, output)
        for sample in output.outputs:
            if sample.token_ids or sample.finished:
                choice = self._choice(self._answer.choice_index(index, sample), output, sample)
                if choice is not None:
                    yield self._report.mark({**self._answer.head(), "choices": [choice]})

    def last(self) -> Iterator[dict[str, Any]]:
        """What follows the last choice's end."""
        yield from self._report.last(self._answer.head())

    def _choice(
        self, index: int, output: RequestOutput, sample: CompletionOutput
    ) -> dict[str, Any] | None:
        """One chunk's choice with all that is new, or None when nothing is."""
        sent = self._sent.setdefault(index, _Sent())
        body = self._answer.body
        first = sent.num_tokens == 0
        new_tokens = len(sample.token_ids) > sent.num_tokens
        wants_tokens = body.return_token_ids or body.logprobs is not None
        news = len(sample.text) > sent.num_chars or (new_tokens and wants_tokens)
        if sent.finished or not (news or sample.finished or (first and body.echo)):
            return None
        piece = _Piece(
            self._answer,
            output,
            sample,
            sent.num_chars,
            sent.num_tokens,
            with_prompt=first and bool(body.echo),
            offset=sent.offset,
        )
        choice = piece.choice(index)
        sent.num_chars, sent.num_tokens = len(sample.text), len(sample.token_ids)
        sent.offset += len(choice["text"])
        if sample.finished:
            sent.finished = True
            choice["finish_reason"] = "length" if self._answer.hides_text else sample.finish_reason
            choice["stop_reason"] = sample.stop_reason
        return choice
