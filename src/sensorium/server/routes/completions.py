"""``POST /v1/completions``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from sensorium.server.openai.logprobs import completion_logprobs, prompt_logprobs
from sensorium.server.openai.prompts import raw_prompts
from sensorium.server.openai.protocol import CompletionBody
from sensorium.server.openai.sampling import completion_params


def completions_router() -> APIRouter:
    """Return the router of text completions."""
    router = APIRouter()

    @router.post("/v1/completions", response_model=None)
    async def completions(request: Request) -> Response:
        """Continue one or several prompts."""
        return await respond(request, CompletionBody, _begin)

    return router


def _begin(context: ModelContext, request: Request, body: CompletionBody) -> CompletionAnswer:
    model = check_generation(context, body)
    params = completion_params(body, context.frontend.input_processor.default_params)
    serving = serving_request(request, body, raw_prompts(request, body), params)
    return CompletionAnswer(context, body, serving, model)


@dataclass(frozen=True, slots=True)
class CompletionAnswer(Answer[CompletionBody]):
    """The answer to the prompts of one request."""

    id_prefix: ClassVar[str] = "cmpl"

    @property
    def hides_text(self) -> bool:
        """True where only the prompt is wanted: ``max_tokens=0`` with ``echo``."""
        return self.body.max_tokens == 0

    @property
    def num_hidden(self) -> int:
        """Generated tokens of each sample that are not shown."""
        return 1 if self.hides_text else 0

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """Return the answer that is not streamed."""
        modalities = self.context.frontend.input_processor.modalities
        return {
            **self.head("text_completion"),
            "choices": [
                self._choice(index, output, sample)
                for index, output in enumerate(outputs)
                for sample in output.outputs
            ],
            "usage": usage(outputs, modalities, num_hidden=self.num_hidden),
        }

    def stream(self) -> AnswerStream:
        """Return the state of a stream of which nothing has been sent."""
        return _CompletionStream(self)

    def choice_index(self, prompt_index: int, sample: CompletionOutput) -> int:
        """Return the index of a choice: samples of the first prompt come first."""
        return prompt_index * self.request.params.n + sample.index

    def end(self, sample: CompletionOutput) -> dict[str, Any]:
        """Return the members that end a choice."""
        reason = "length" if self.hides_text else sample.finish_reason
        return {"finish_reason": reason, "stop_reason": sample.stop_reason}

    def prompt_text(self, output: RequestOutput) -> str:
        """Return the text that ``echo`` puts in front."""
        if output.prompt is not None:
            return output.prompt
        tokenizer = self.context.frontend.input_processor.tokenizer
        # A model's vocabulary may be padded beyond its tokenizer's, with ids that stand for no
        # text.
        return tokenizer.decode([i for i in output.prompt_token_ids if i <= tokenizer.max_token_id])

    def _choice(
        self, index: int, output: RequestOutput, sample: CompletionOutput
    ) -> dict[str, Any]:
        piece = _Piece(self, output, sample, with_prompt=bool(self.body.echo))
        wanted = None if self.body.prompt_logprobs is None else output.prompt_logprobs
        choice = piece.choice(self.choice_index(index, sample)) | self.end(sample)
        choice["prompt_logprobs"] = prompt_logprobs(self.context.spelling, wanted)
        return {**choice, **dict.fromkeys(("prompt_token_ids", "token_ids") - choice.keys())}


@dataclass(slots=True)
class _Piece:
    """A part of one sample: the text from ``num_chars`` and the tokens from ``num_tokens`` on.

    ``with_prompt``: the prompt goes in front. ``offset``: characters of the choice that were sent.
    """

    answer: CompletionAnswer
    output: RequestOutput
    sample: CompletionOutput
    with_prompt: bool
    num_chars: int = 0
    num_tokens: int = 0
    offset: int = 0

    def choice(self, index: int) -> dict[str, Any]:
        """Return the choice without a reason to end."""
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


@dataclass(slots=True)
class _Sent:
    num_chars: int = 0
    num_tokens: int = 0
    offset: int = 0
    finished: bool = False


class _CompletionStream(AnswerStream):
    """Chunks of completions: pieces of text, and a reason to end for each choice."""

    def __init__(self, answer: CompletionAnswer) -> None:
        super().__init__(answer, "text_completion", num_hidden=answer.num_hidden)
        self._answer = answer
        self._sent: dict[int, _Sent] = {}

    def chunks(self, index: int, output: RequestOutput) -> Iterator[dict[str, Any]]:
        """Yield chunks for what is new in the output of the prompt ``index``."""
        for sample in output.outputs:
            if sample.token_ids or sample.finished:
                choice = self._choice(self._answer.choice_index(index, sample), output, sample)
                if choice is not None:
                    yield self.chunk(choice)

    def _choice(
        self, index: int, output: RequestOutput, sample: CompletionOutput
    ) -> dict[str, Any] | None:
        """Return one chunk's choice with all that is new, or None when nothing is."""
        sent = self._sent.setdefault(index, _Sent())
        body = self._answer.body
        echoes = sent.num_tokens == 0 and bool(body.echo)
        wants_tokens = body.return_token_ids or body.logprobs is not None
        is_new = len(sample.text) > sent.num_chars or (
            wants_tokens and len(sample.token_ids) > sent.num_tokens
        )
        if sent.finished or not (is_new or sample.finished or echoes):
            return None
        piece = _Piece(
            self._answer, output, sample, echoes, sent.num_chars, sent.num_tokens, sent.offset
        )
        choice = piece.choice(index)
        sent.num_chars, sent.num_tokens = len(sample.text), len(sample.token_ids)
        sent.offset += len(choice["text"])
        if sample.finished:
            sent.finished = True
            choice |= self._answer.end(sample)
        return choice
