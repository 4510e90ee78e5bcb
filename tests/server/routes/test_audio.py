"""Transcriptions over a front end without an engine: forms, streams, refusals."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sensorium.engine.prompts.types import ChatPrompt
from sensorium.text.chat.conversation import TextPart
from tests.server.fake_frontend import FakeFrontend
from tests.server.harness import Answer, App

PATH = "/v1/audio/transcriptions"
TRANSLATIONS = "/v1/audio/translations"
BOUNDARY = "x7Yz"
REPLY = "seven three"


def form(fields: dict[str, Any], file: bytes | None = b"RIFF....") -> bytes:
    """A form as clients send it."""
    parts = []
    for name, value in fields.items():
        parts.append(f'Content-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode())
    if file is not None:
        head = 'Content-Disposition: form-data; name="file"; filename="a.wav"\r\n'
        parts.append(f"{head}Content-Type: audio/wav\r\n\r\n".encode() + file)
    body = b"".join(b"--" + BOUNDARY.encode() + b"\r\n" + part + b"\r\n" for part in parts)
    return body + f"--{BOUNDARY}--\r\n".encode()


async def ask(
    app: App, path: str = PATH, *, file: bytes | None = b"RIFF....", **fields: Any
) -> Answer:
    headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
    body = form(fields, file)
    return await app.request("POST", path, [body[:40], body[40:]], headers)


def hearing(reply: str = REPLY, **options: Any) -> App:
    return App(FakeFrontend(reply=reply, modalities=("audio",)), **options)


async def test_json() -> None:
    app = hearing(f" {REPLY}\n")
    answer = await ask(app, model="demo")
    assert answer.status == 200, answer.body
    body = answer.json()
    assert body["text"] == REPLY
    assert body["usage"]["type"] == "tokens"
    assert body["usage"]["output_tokens"] > 0
    assert body["usage"]["total_tokens"] == body["usage"]["input_tokens"] + body["usage"]["output_tokens"]  # fmt: skip
    [call] = app.frontend.calls
    assert isinstance(call.prompt, ChatPrompt)
    [ref] = call.prompt.conversation.refs
    assert (ref.modality, ref.kind, ref.source, ref.param) == (
        "audio",
        "bytes",
        b"RIFF....",
        "file",
    )
    assert call.params.temperature == 0.0  # type: ignore[union-attr]


async def test_text_and_verbose_json() -> None:
    answer = await ask(hearing(), response_format="text")
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.body.decode() == f"{REPLY}\n"
    body = (await ask(hearing(), response_format="verbose_json", language="de")).json()
    assert (body["task"], body["language"], body["text"]) == ("transcribe", "de", REPLY)
    assert (body["segments"], body["words"], body["duration"]) == (None, None, None)
    body = (await ask(hearing(), TRANSLATIONS, response_format="verbose_json")).json()
    assert (body["task"], body["language"]) == ("translate", "en")


async def test_a_stream_has_pieces_and_the_whole() -> None:
    answer = await ask(hearing(f"  {REPLY} "), stream="true")
    events = answer.events()
    *deltas, done = events
    assert {event["type"] for event in deltas} == {"transcript.text.delta"}
    assert "".join(event["delta"] for event in deltas).strip() == REPLY
    assert deltas[0]["delta"].strip()
    assert (done["type"], done["text"]) == ("transcript.text.done", REPLY)
    assert done["usage"]["output_tokens"] > 0


async def test_language_and_prompt_are_asked_for() -> None:
    app = hearing()
    await ask(app, language="de", prompt="Digits only.", temperature="0.5", seed="7")
    [call] = app.frontend.calls
    assert isinstance(call.prompt, ChatPrompt)
    [message] = call.prompt.conversation.messages
    [text] = [part.text for part in message.parts if isinstance(part, TextPart)]
    assert text == "Transcribe the audio. Its language is de. Digits only."
    assert (call.params.temperature, call.params.seed) == (0.5, 7)  # type: ignore[union-attr]
    await ask(app, TRANSLATIONS)
    assert "into English" in json.dumps(app.frontend.calls[1].prompt.conversation.messages[0].text)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "srt"}, "response_format"),
        ({"response_format": "vtt"}, "response_format"),
        ({"response_format": "xml"}, "response_format"),
        ({"timestamp_granularities[]": "word"}, "timestamp_granularities"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": "-1"}, "temperature"),
        ({"temperature": "nan"}, "temperature"),
        ({"seed": "1.5"}, "seed"),
        ({"stream": "maybe"}, "stream"),
        ({"language": "../x"}, "language"),
        ({"model": "other"}, "model"),
        ({"unknown": "x"}, "unknown"),
        ({"file": None}, "file"),
        ({"file": b""}, "file"),
    ],
)
async def test_refusals(fields: dict[str, Any], param: str) -> None:
    answer = await ask(hearing(), **fields)
    assert answer.status in (400, 404), answer.body
    assert answer.error["param"] == param


async def test_a_translation_has_no_language() -> None:
    answer = await ask(hearing(), TRANSLATIONS, language="de")
    assert (answer.status, answer.error["param"]) == (400, "language")


async def test_models_that_do_not_hear_are_refused() -> None:
    answer = await ask(App())
    assert (answer.status, answer.error["code"]) == (400, "unsupported_modality")
    assert "image" in answer.error["message"]


async def test_files_are_bounded() -> None:
    answer = await ask(hearing(max_body_bytes=1000), file=b"x" * 2000)
    assert answer.status == 413


async def test_other_bodies_are_refused() -> None:
    answer = await hearing().post(PATH, {"file": "x"})
    assert answer.status == 400
    assert "multipart/form-data" in answer.error["message"]
