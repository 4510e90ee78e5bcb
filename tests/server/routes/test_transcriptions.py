"""Transcriptions by models of transformers that hear: the whole way from a form to tokens."""

from __future__ import annotations

import io
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from sensorium.engine.outputs.stream import OutputCollector
from sensorium.engine.prompts.input_processor import InputProcessor
from sensorium.engine.prompts.types import Prompt
from sensorium.outputs import RequestOutput
from sensorium.params import SamplingParams
from tests.checkpoints.hf import FILL_TOKENS, make_hf
from tests.models.harness import text_ids
from tests.parts import Parts, build_llm
from tests.server.fake_frontend import FakeFrontend
from tests.server.harness import App
from tests.server.routes.test_audio import TRANSLATIONS, ask

pytestmark = pytest.mark.slow

ASKED = {
    "qwen2_audio": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\n{}<|im_end|>\n<|im_start|>assistant\n",
    "voxtral": "[INST][BEGIN_AUDIO][AUDIO]{}[/INST]",
}
"""The families' chats about a sound."""
OWN = {"voxtral": "[INST][BEGIN_AUDIO][AUDIO][/INST]{}[TRANSCRIBE]"}
"""Prompts of those that are trained to transcribe with one of their own."""
NUM_AUDIO = {"qwen2_audio": 25, "voxtral": 375}
FILE: dict[str, Any] = {"max_tokens": 8}


@dataclass
class InProcess(FakeFrontend):
    """A front end with an engine in the caller's thread."""

    parts: Parts | None = None
    modalities: tuple[str, ...] = ("audio",)
    prompts: list[tuple[int, ...]] = field(default_factory=list)

    @property
    def input_processor(self) -> InputProcessor:  # type: ignore[override]
        """That of the engine's model."""
        assert self.parts is not None
        return self.parts.processor

    async def generate(
        self, prompt: Prompt, params: SamplingParams, *, request_id: str, priority: int = 0
    ) -> AsyncIterator[RequestOutput]:
        """The model's answer."""
        assert self.parts is not None
        processor, engine = self.parts.processor, self.parts.engine
        prepared = await processor.prepare(prompt)
        self.prompts.append(prepared.token_ids)
        now = time.monotonic()
        requests = processor.requests(prepared, params, request_id, priority, now)
        stream = OutputCollector.for_requests(
            request_id, prepared, requests, params, processor.tokenizer
        )
        for request in requests:
            engine.add(request, tuple(item.features for item in prepared.items))
        while not stream.finished:
            for update in engine.step():
                if stream.apply(update):
                    engine.abort(update.request_id)
            yield stream.output


@dataclass
class Case:
    """A model and its server."""

    family: str
    folder: Path
    frontend: InProcess
    app: App

    def ids(self, text: str) -> tuple[int, ...]:
        """Return the ids of a prompt with one sound in it."""
        ids = list(text_ids(self.folder, text))
        place = ids.index(text_ids(self.folder, FILL_TOKENS[self.family])[-1])
        return (*ids[:place], *[ids[place]] * NUM_AUDIO[self.family], *ids[place + 1 :])


@pytest.fixture(scope="module", params=sorted(ASKED))
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    folder = make_hf(request.param, tmp_path_factory.mktemp(request.param))
    with build_llm(folder, max_model_len=600) as parts:
        frontend = InProcess(parts=parts)
        yield Case(request.param, folder, frontend, App(frontend))


@pytest.fixture(scope="module")
def sound() -> bytes:
    buffer = io.BytesIO()
    tone = np.sin(np.arange(16_000) * 0.2).astype(np.float32)
    soundfile.write(buffer, tone, 16_000, format="WAV")
    return buffer.getvalue()


async def test_all_forms_of_an_answer_say_the_same(case: Case, sound: bytes) -> None:
    found = (await ask(case.app, file=sound, **FILE)).json()
    assert found["text"]
    assert found["usage"]["input_tokens"] == len(case.frontend.prompts[-1])
    assert found["usage"]["input_token_details"]["audio_tokens"] == NUM_AUDIO[case.family]
    text = await ask(case.app, file=sound, response_format="text", **FILE)
    assert text.body.decode() == found["text"] + "\n"
    verbose = (await ask(case.app, file=sound, response_format="verbose_json", **FILE)).json()
    assert (verbose["text"], verbose["segments"], verbose["words"]) == (found["text"], None, None)
    *deltas, done = (await ask(case.app, file=sound, stream="true", **FILE)).events()
    assert done["text"] == found["text"]
    assert "".join(delta["delta"] for delta in deltas).strip() == found["text"]


@pytest.mark.parametrize(
    ("fields", "told", "words"),
    [
        ({}, "", "Transcribe the audio."),
        ({"language": "DE"}, "lang:de", "Transcribe the audio. Its language is DE."),
        ({"language": "german"}, None, "Transcribe the audio. Its language is german."),
        ({"prompt": "Names: Ada."}, None, "Transcribe the audio. Names: Ada."),
    ],
)
async def test_the_prompt_is_the_family_s(
    case: Case, sound: bytes, fields: dict[str, str], told: str | None, words: str
) -> None:
    answer = await ask(case.app, file=sound, **FILE, **fields)
    assert answer.status == 200, answer.body
    own = OWN.get(case.family)
    [ids] = case.frontend.prompts[-1:]
    if own is not None and told is not None:
        assert ids == case.ids(own.format(told))
    else:
        assert ids == case.ids(ASKED[case.family].format(words))


async def test_translations_are_asked_for_in_words(case: Case, sound: bytes) -> None:
    answer = await ask(case.app, TRANSLATIONS, file=sound, **FILE)
    assert answer.status == 200, answer.body
    words = ASKED[case.family].format("Translate the audio into English.")
    assert case.frontend.prompts[-1] == case.ids(words)
