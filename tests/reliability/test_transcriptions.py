"""Sounds are written down by the demo model of sounds, asked by OpenAI's client."""

from __future__ import annotations

import openai
import pytest

from sensorium.assets import AudioAsset
from tests.reliability.asking import Service

SOUND = AudioAsset("winning_call")
FILE = ("call.ogg", SOUND.path.read_bytes())


@pytest.fixture
def client(closed: Service) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{closed.server.url}/v1", api_key="none", max_retries=0)


def test_the_words_are_those_of_a_chat(client: openai.OpenAI) -> None:
    found = client.audio.transcriptions.create(model="demo-audio", file=FILE)
    part = {"type": "audio_url", "audio_url": {"url": SOUND.data_url}}
    ask = {"type": "text", "text": "Transcribe the audio."}
    answer = client.chat.completions.create(
        model="demo-audio",
        temperature=0,
        messages=[{"role": "user", "content": [part, ask]}],  # type: ignore[list-item, misc]
    )
    assert found.text
    assert found.text == answer.choices[0].message.content
    assert found.usage is not None
    assert found.usage.type == "tokens"
    assert found.usage.input_token_details is not None
    assert (found.usage.input_token_details.audio_tokens or 0) > 0


def test_text_verbose_json_and_a_stream_say_the_same(client: openai.OpenAI) -> None:
    create = client.audio.transcriptions.create
    text = create(model="demo-audio", file=FILE, response_format="text")
    verbose = create(model="demo-audio", file=FILE, response_format="verbose_json")
    assert str(text).strip() == verbose.text
    events = list(create(model="demo-audio", file=FILE, stream=True))
    assert events[-1].type == "transcript.text.done"
    assert events[-1].text == verbose.text
    deltas = [event.delta for event in events if event.type == "transcript.text.delta"]
    assert "".join(deltas) == verbose.text


def test_translations_and_refusals(client: openai.OpenAI) -> None:
    assert client.audio.translations.create(model="demo-audio", file=FILE).text
    with pytest.raises(openai.BadRequestError) as caught:
        client.audio.transcriptions.create(
            model="demo-audio", file=FILE, timestamp_granularities=["word"]
        )
    assert caught.value.param == "timestamp_granularities"
    with pytest.raises(openai.BadRequestError) as caught:
        client.audio.transcriptions.create(model="demo-audio", file=("a.wav", b"no sound at all"))
    assert (caught.value.code, caught.value.param) == ("media_undecodable", "file")
