"""Ultravox through the offline API and a server: tuples, files, base64, embeddings.

Against a plain implementation.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import soundfile
import torch

from sensorium import LLM, SamplingParams
from sensorium.errors import (
    ConfigError,
    InvalidEmbeddingsError,
    InvalidRequestError,
    MediaTooLargeError,
    MediaUndecodableError,
    PlaceholderMismatchError,
    UnsupportedModalityError,
)
from tests.checkpoints import make_ultravox
from tests.e2e.serving import Server
from tests.models.families.test_ultravox import AUDIO, RATE, Case, sound, split, woven
from tests.models.plain_ultravox import PlainUltravox
from tests.parts import patient_llm

NUM_TOKENS = 16
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
ROOM = {"max_model_len": 256, "block_size": 8, "enable_mm_embeds": True}
PROMPTS: list[Case] = [
    ("How many birds?", []),
    (f"{AUDIO} What was said?", [7231]),
    (f"First {AUDIO} then {AUDIO}", [40_000, 161]),
    (f"Listen: {AUDIO}", [66_011]),
    *((f"{AUDIO} and more", [9000 + length]) for length in range(4)),
]
TURN = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_ultravox(tmp_path_factory.mktemp("ultravox"), layout="ids")


@pytest.fixture(scope="module")
def plain(folder: Path) -> PlainUltravox:
    return PlainUltravox(folder)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file that holds a sound without loss."""
    path = tmp_path_factory.mktemp("clips")
    (path / "clip.flac").write_bytes(encoded(sound(7231).samples, "FLAC"))
    return path


@pytest.fixture(scope="module")
def llm(folder: Path, clips: Path) -> Iterator[LLM]:
    with LLM(str(folder), num_kv_blocks=400, allowed_local_media_path=str(clips), **ROOM) as llm:
        yield llm


def encoded(samples: np.ndarray, form: str = "WAV") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE, format=form, subtype="PCM_16")
    return buffer.getvalue()


def rounded(samples: np.ndarray) -> np.ndarray:
    """What 16 bits keep of a sound."""
    read: np.ndarray = soundfile.read(io.BytesIO(encoded(samples)), dtype="float32")[0]
    return read


def expected(folder: Path, plain: PlainUltravox, text: str, sounds: list[np.ndarray]) -> list[int]:
    bos = split(folder, "")[0]
    texts = split(folder, text)
    if texts[0][: 2 * len(bos)] == [*bos, *bos]:  # a template wrote one already
        texts[0] = texts[0][len(bos) :]
    return plain.greedy(woven(texts, [plain.embeds(samples) for samples in sounds]), NUM_TOKENS)


def asked(case: Case) -> dict[str, Any]:
    pairs = [(sound(length).samples, RATE) for length in case[1]]
    return {"prompt": case[0], "multi_modal_data": {"audio": pairs} if pairs else {}}


def answers(llm: LLM, prompts: list[dict[str, Any]]) -> list[list[int]]:
    return [out.outputs[0].token_ids for out in llm.generate(prompts, GREEDY, use_tqdm=False)]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_kv_blocks": 400},
        {"num_kv_blocks": 400, "max_num_batched_tokens": 7},
        {"num_kv_blocks": 9, "max_num_batched_tokens": 64, "max_model_len": 64},
    ],
    ids=["roomy", "chunked", "preempted"],
)
def test_generate(folder: Path, plain: PlainUltravox, settings: dict[str, Any]) -> None:
    """Cold and warm."""
    wanted = [
        expected(folder, plain, text, [sound(length).samples for length in lengths])
        for text, lengths in PROMPTS
    ]
    with patient_llm(str(folder), **{**ROOM, **settings}) as llm:
        prompts = [asked(case) for case in PROMPTS]
        assert answers(llm, prompts) == wanted
        assert answers(llm, prompts) == wanted
        stats = llm.stats()
        assert stats.kv_blocks_used == 0
        assert stats.held_features == 0
        if settings["num_kv_blocks"] == 9:
            assert stats.num_preemptions > 0


def test_the_prompt_in_ids(llm: LLM, folder: Path) -> None:
    """The tokenizer's end token stands for each embedding.

    Ids expanded by the caller stand as they are.
    """
    (out,) = llm.generate(asked(PROMPTS[1]), GREEDY, use_tqdm=False)
    end = split(folder, "<|eot_id|>")[0][-1]
    texts = split(folder, PROMPTS[1][0])
    assert out.prompt_token_ids == [*texts[0], *[end] * 3, *texts[1]]
    assert out.num_item_tokens == {"audio": 3}
    again = {**asked(PROMPTS[1]), "prompt_token_ids": out.prompt_token_ids}
    del again["prompt"]
    assert answers(llm, [again]) == [out.outputs[0].token_ids]


def test_any_rate_and_layout(llm: LLM) -> None:
    """The same sound as a tensor, as a list, in two channels either way round.

    At half the rate it is twice as long.
    """
    samples = sound(7231).samples
    forms: list[Any] = [
        samples,
        torch.from_numpy(samples),
        samples.tolist(),
        np.stack([samples, samples]),
        np.stack([samples, samples], axis=1),
    ]
    data = [{"prompt": AUDIO, "multi_modal_data": {"audio": (form, RATE)}} for form in forms]
    assert len({tuple(tokens) for tokens in answers(llm, data)}) == 1
    (out,) = llm.generate(
        {"prompt": AUDIO, "multi_modal_data": {"audio": (samples, 8000)}}, GREEDY, use_tqdm=False
    )
    assert out.num_item_tokens == {"audio": 6}


def part(kind: str, payload: Any) -> dict[str, Any]:
    return {"type": kind, kind: payload}


def test_chat(llm: LLM, folder: Path, plain: PlainUltravox, clips: Path) -> None:
    """``input_audio``, ``audio_url`` with a file and with data; typed placeholders are text."""
    samples = rounded(sound(7231).samples)
    wav = base64.b64encode(encoded(samples)).decode()
    parts = [
        part("input_audio", {"data": wav, "format": "wav"}),
        part("audio_url", {"url": f"data:audio/wav;base64,{wav}"}),
        part("audio_url", {"url": f"file://{clips}/clip.flac"}),
        part("audio_url", str(clips / "clip.flac")),
    ]
    rendered = TURN.format(f"{AUDIO}What was said?")
    wanted = expected(folder, plain, rendered, [samples])
    for one in parts:
        messages = [{"role": "user", "content": [one, part("text", "What was said?")]}]
        (out,) = llm.chat(messages, GREEDY, use_tqdm=False)
        assert out.prompt == rendered
        assert out.outputs[0].token_ids == wanted
    typed = [{"role": "user", "content": f"{AUDIO} is a word <|eot_id|>"}]
    (out,) = llm.chat(typed, GREEDY, use_tqdm=False)
    assert out.num_item_tokens == {}
    assert AUDIO in out.prompt


def test_embeddings_in_place_of_sounds(llm: LLM, plain: PlainUltravox) -> None:
    text, lengths = PROMPTS[2]
    made = [plain.embeds(sound(length).samples) for length in lengths]
    wanted = answers(llm, [asked(PROMPTS[2])])
    assert answers(llm, [{"prompt": text, "multi_modal_data": {"audio": made}}]) == wanted
    (one,) = (plain.embeds(sound(length).samples) for length in PROMPTS[3][1])
    whole = {"prompt": PROMPTS[3][0], "multi_modal_data": {"audio": one[None]}}
    assert answers(llm, [whole]) == answers(llm, [asked(PROMPTS[3])])
    for wrong in (torch.zeros(1, 3, 7), torch.zeros(2, 0, 64), torch.full((1, 3, 64), torch.nan)):
        with pytest.raises(InvalidEmbeddingsError) as caught:
            answers(llm, [{"prompt": text, "multi_modal_data": {"audio": wrong}}])
        assert caught.value.param is not None
        assert caught.value.param.startswith("prompt.multi_modal_data.audio")


def test_wrong_input(llm: LLM) -> None:
    pair = (sound(7231).samples, RATE)
    for text, items in ((AUDIO * 2, [pair]), (AUDIO, [pair, pair]), ("none", [pair]), (AUDIO, [])):
        with pytest.raises(PlaceholderMismatchError, match="audio"):
            answers(llm, [{"prompt": text, "multi_modal_data": {"audio": items}}])
    cases: list[tuple[Any, type[Exception], str]] = [
        ((np.full(100, np.nan), RATE), InvalidRequestError, "NaN"),
        ((np.zeros(601 * 100, np.float32), 100), MediaTooLargeError, "--max-audio-seconds"),
        (([0.1], 48000), MediaUndecodableError, "too short"),
        ((sound(7231).samples, 0), InvalidRequestError, "sampling rate"),
        (sound(7231).samples, InvalidRequestError, "tuple of samples and sampling rate"),
    ]
    for data, error, message in cases:
        with pytest.raises(error, match=message) as caught:
            answers(llm, [{"prompt": AUDIO, "multi_modal_data": {"audio": data}}])
        assert caught.value.param.startswith("prompt.multi_modal_data.audio")  # type: ignore[attr-defined]
    with pytest.raises(InvalidRequestError, match=r"no option 'speed'"):
        answers(llm, [{**asked(PROMPTS[1]), "mm_processor_kwargs": {"speed": 2}}])
    with pytest.raises(UnsupportedModalityError, match="audio"):
        answers(
            llm, [{"prompt": "x", "multi_modal_data": {"image": [np.zeros((4, 4, 3), np.uint8)]}}]
        )


def test_limits_and_switching_off(folder: Path) -> None:
    with LLM(str(folder), num_kv_blocks=60, limit_mm_per_prompt={"audio": 0}, **ROOM) as llm:
        assert len(answers(llm, [{"prompt": "Hello"}])[0]) == NUM_TOKENS
        with pytest.raises(UnsupportedModalityError, match="switched off"):
            answers(llm, [asked(PROMPTS[1])])
    with pytest.raises(ConfigError, match="sounds have none"):
        LLM(str(folder), num_kv_blocks=60, media_io_kwargs={"audio": {"mono": True}}, **ROOM)


def test_the_end_of_a_turn_ends_an_answer(folder: Path) -> None:
    end = split(folder, "<|eot_id|>")[0][-1]
    params = SamplingParams(temperature=0, max_tokens=4, allowed_token_ids=[end])
    with LLM(str(folder), num_kv_blocks=60, **ROOM) as llm:
        (out,) = llm.generate("Hello", params, use_tqdm=False)
    assert (out.outputs[0].finish_reason, out.outputs[0].token_ids) == ("stop", [end])


@pytest.mark.slow
def test_server(folder: Path, clips: Path, llm: LLM, tmp_path: Path) -> None:
    """The ``openai`` client gets what the offline API gives, and clear errors."""
    flags = ("--num-kv-blocks", "300", "--max-model-len", "256", "--allowed-local-media-path")
    server = Server(str(folder), tmp_path / "log", (*flags, str(clips), "--enable-mm-embeds"))
    wav = base64.b64encode(encoded(sound(7231).samples)).decode()
    made = io.BytesIO()
    torch.save(torch.randn(3, 64, generator=torch.Generator().manual_seed(0)), made)
    question = part("text", "What was said?")
    contents = [
        [part("input_audio", {"data": wav, "format": "wav"}), question],
        [question, part("audio_url", {"url": f"data:audio/wav;base64,{wav}"})],
        [part("audio_url", {"url": f"file://{clips}/clip.flac"}), question],
        [part("audio_embeds", base64.b64encode(made.getvalue()).decode()), question],
    ]
    try:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            model = client.models.list().data[0].id

            def chat(content: Any) -> Any:
                return client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": content}],
                    max_tokens=NUM_TOKENS,
                    temperature=0,
                    extra_body={"ignore_eos": True},
                )

            for content in contents:
                (out,) = llm.chat([{"role": "user", "content": content}], GREEDY, use_tqdm=False)
                assert chat(content).choices[0].message.content == out.outputs[0].text
            for payload, code in ((wav[:40], "media_undecodable"), ("", "media_undecodable")):
                with pytest.raises(openai.BadRequestError) as caught:
                    chat([part("input_audio", {"data": payload, "format": "wav"})])
                body: Any = caught.value.body
                assert (body["code"], body["param"]) == (code, "messages[0].content[0].input_audio")
            with pytest.raises(openai.BadRequestError) as caught:
                chat([part("audio_url", {"url": "file:///etc/hostname"})])
            assert caught.value.body["code"] == "media_refused"  # type: ignore[index]
    finally:
        assert server.stop() == 0
