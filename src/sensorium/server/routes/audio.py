"""``POST /v1/audio/transcriptions`` and ``/v1/audio/translations``, for models that hear."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from sensorium.engine.prompts.types import Prompt, RawPrompt
from sensorium.errors import (
    BodyTooLargeError,
    InvalidRequestError,
    UnsupportedModalityError,
    located,
)
from sensorium.multimodal.items import MediaRef
from sensorium.outputs import RequestOutput
from sensorium.server.context import ModelContext, context_of
from sensorium.server.http.body import model_of, validate
from sensorium.server.http.disconnect import unless_disconnected
from sensorium.server.http.multipart import read_form
from sensorium.server.http.sse import EventStream
from sensorium.server.openai.answers import serving_request
from sensorium.server.openai.generation import ServingRequest, finished_outputs, run_request
from sensorium.server.openai.prompts import chat_prompt, media_options
from sensorium.server.openai.protocol import ChatBody, TranscriptionBody
from sensorium.server.openai.sampling import chat_params
from sensorium.server.openai.tool_calls import ToolPlan, tool_plan
from sensorium.server.payload import JsonResponse
from sensorium.text.chat.conversation import Conversation, Message, TextPart

Task = Literal["transcribe", "translate"]

_ASK: dict[Task, str] = {
    "transcribe": "Transcribe the audio.",
    "translate": "Translate the audio into English.",
}
_NUMBERS = ("temperature", "top_p", "frequency_penalty", "presence_penalty")
_INTEGERS = ("seed", "top_k", "max_completion_tokens", "max_tokens")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-z0-9]{2,8})?")
_PASSED = (*_NUMBERS, *_INTEGERS, "model", "request_id", "user")


def audio_router() -> APIRouter:
    """Return the router of transcriptions and translations."""
    router = APIRouter()

    @router.post("/v1/audio/transcriptions", response_model=None)
    async def transcriptions(request: Request) -> Response:
        """Write down what is said in a sound."""
        return await _respond(request, "transcribe")

    @router.post("/v1/audio/translations", response_model=None)
    async def translations(request: Request) -> Response:
        """Write down in English what is said in a sound."""
        return await _respond(request, "translate")

    return router


class _Collector:
    """Sink that keeps a file of at most ``most`` bytes."""

    def __init__(self, most: int) -> None:
        self.data = bytearray()
        self._most = most

    async def write(self, data: bytes) -> None:
        """Take the next bytes. Raises BodyTooLargeError beyond the limit."""
        if len(self.data) + len(data) > self._most:
            raise BodyTooLargeError(
                f"The file is larger than {self._most} bytes, the limit (--max-body-bytes).",
                param="file",
            )
        self.data += data


@dataclass(frozen=True, slots=True)
class _Transcription:
    """One request, and what its answer needs."""

    context: ModelContext
    body: TranscriptionBody
    task: Task
    serving: ServingRequest
    plan: ToolPlan

    def text(self, output: RequestOutput) -> str:
        """Return the text of a whole answer."""
        return self.plan.reply(output.outputs[0].text, output.prompt).content.strip()

    def usage(self, output: RequestOutput) -> dict[str, Any]:
        """Return the ``usage`` member, in the form of these routes."""
        num_prompt, num_audio = (
            len(output.prompt_token_ids),
            output.num_item_tokens.get("audio", 0),
        )
        num_generated = len(output.outputs[0].token_ids)
        return {
            "type": "tokens",
            "input_tokens": num_prompt,
            "input_token_details": {
                "audio_tokens": num_audio,
                "text_tokens": num_prompt - num_audio,
            },
            "output_tokens": num_generated,
            "total_tokens": num_prompt + num_generated,
        }

    def whole(self, output: RequestOutput) -> Response:
        """Return the answer that is not streamed."""
        text, headers = self.text(output), self.serving.headers()
        if self.body.response_format == "text":
            return PlainTextResponse(f"{text}\n", headers=headers)
        members: dict[str, Any] = {"text": text, "usage": self.usage(output)}
        if self.body.response_format == "verbose_json":
            members |= {
                "task": self.task,
                "language": "en" if self.task == "translate" else self.body.language,
                "duration": None,
                "segments": None,
                "words": None,
            }
        return JsonResponse(members, headers=headers)

    async def events(self) -> AsyncGenerator[list[dict[str, Any]], None]:
        """Yield the events of a stream: pieces of the text, and the whole of it with the usage."""
        reader, num_chars, pieces = None, 0, list[str]()
        async with aclosing(run_request(self.context, self.serving)) as updates:
            async for _, output in updates:
                [sample] = output.outputs
                reader = reader or self.plan.reader(output.prompt)
                deltas = reader.feed(sample.text[num_chars:])
                num_chars = len(sample.text)
                if sample.finished:
                    deltas += reader.flush()
                new = [delta["content"] for delta in deltas if delta.get("content")]
                if not pieces and new:
                    new = ["".join(new).lstrip()]
                new = [text for text in new if text]
                pieces += new
                yield [{"type": "transcript.text.delta", "delta": text} for text in new]
        text = "".join(pieces).strip()
        yield [{"type": "transcript.text.done", "text": text, "usage": self.usage(output)}]


async def _respond(request: Request, task: Task) -> Response:
    collector = _Collector(context_of(request).config.max_body_bytes)

    async def open_sink() -> _Collector:
        return collector

    form = await read_form(request, open_sink)
    if form.filename is None:
        raise InvalidRequestError("file is required: the sound, as a file.", param="file")
    if not collector.data:
        raise InvalidRequestError("file is empty.", param="file")
    body = _body(form.fields, task)
    context = await model_of(request, body.model)
    context.check_generates()
    if "audio" not in context.frontend.input_processor.modalities:
        takes = ", ".join(context.frontend.input_processor.modalities) or "text only"
        raise UnsupportedModalityError(
            f"This model does not hear; it takes: {takes}. Use one that takes audio.",
            param="file",
        )
    asked = _begin(context, request, body, task, bytes(collector.data))
    if body.stream:
        return EventStream(asked.events(), asked.serving.headers)
    work = finished_outputs(context, asked.serving)
    [output] = await unless_disconnected(request.receive, work)
    return asked.whole(output)


def _body(fields: Mapping[str, str], task: Task) -> TranscriptionBody:
    """Return the fields of a form with their types. Raises InvalidRequestError with the field."""
    values: dict[str, Any] = {}
    for name, text in fields.items():
        if name in _NUMBERS or name in _INTEGERS:
            values[name] = _number(name, text)
        elif name == "stream":
            if text.lower() not in ("true", "false", "1", "0"):
                raise InvalidRequestError(
                    f"stream must be true or false, got {text!r:.80}.", param=name
                )
            values[name] = text.lower() in ("true", "1")
        elif name.removesuffix("[]") == "timestamp_granularities":
            raise InvalidRequestError(
                "timestamp_granularities cannot be had: the models here write text without times. "
                "Leave it out.",
                param="timestamp_granularities",
            )
        else:
            values[name.removesuffix("[]")] = text
    form = values.get("response_format")
    if form in ("srt", "vtt", "diarized_json"):
        raise InvalidRequestError(
            f"response_format {form!r} needs times or speakers, which the models here do not tell; "
            "use json, text or verbose_json.",
            param="response_format",
        )
    if task == "translate" and values.get("language"):
        raise InvalidRequestError(
            "A translation is into English; language is for transcriptions.", param="language"
        )
    return validate(TranscriptionBody, values)


def _number(name: str, text: str) -> float | int:
    try:
        return int(text) if name in _INTEGERS else float(text)
    except ValueError:
        kind = "an integer" if name in _INTEGERS else "a number"
        raise InvalidRequestError(f"{name} must be {kind}, got {text!r:.80}.", param=name) from None


def _begin(
    context: ModelContext, request: Request, body: TranscriptionBody, task: Task, data: bytes
) -> _Transcription:
    model = context.model_name(body.model)
    ask = _ASK[task]
    if body.language:
        ask += f" Its language is {body.language}."
    if body.prompt:
        ask += f" {body.prompt}"
    given = {name: getattr(body, name) for name in _PASSED if getattr(body, name) is not None}
    given.setdefault("temperature", 0.0)
    message = {"role": "user", "content": ask}
    chat = ChatBody.model_construct(**{**given, "messages": [message], "model": model})
    plan = tool_plan(context, chat)
    sound = MediaRef("audio", "bytes", data, param="file", alone=True)
    with located(rename=lambda place: "prompt" if place.startswith("messages") else place):
        prompt: Prompt | None = _own_prompt(context, request, chat, body, task, sound)
        if prompt is None:
            conversation = Conversation((Message("user", (sound, TextPart(ask)), is_string=False),))
            asked = chat_prompt(context, request, chat)
            prompt = dataclasses.replace(asked, conversation=conversation, param="file")
        params = chat_params(chat, context.frontend.input_processor.default_params)
    serving = serving_request(request, chat, [prompt], params)
    return _Transcription(context, body, task, serving, plan)


def _own_prompt(
    context: ModelContext,
    request: Request,
    chat: ChatBody,
    body: TranscriptionBody,
    task: Task,
    sound: MediaRef,
) -> RawPrompt | None:
    """Return the prompt of models that are trained to transcribe with one of their own.

    It has no room for a request's ``prompt``, and knows languages by their codes.
    """
    own = context.frontend.input_processor.transcription
    language = body.language.lower() if body.language else None
    known = language is None or _LANGUAGE.fullmatch(language)
    if own is None or task != "transcribe" or body.prompt or not known:
        return None
    media = media_options(request, chat)
    return RawPrompt(text=own(language), refs=(sound,), media=media, param="file")
