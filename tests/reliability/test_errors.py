"""Every error about media: its status, its code and the place of the part, from every stage,
offline and over HTTP.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from PIL import Image

from tests.multimodal.clips import make_clip
from tests.reliability.asking import CHAT, Answer, Offline, Service, audio, image, text, video
from tests.reliability.media import data_url, encoded, picture, picture_url, sound_url
from tests.reliability.test_bombs import PICTURES
from tests.reliability.test_embeddings import embeds, part, saved

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@dataclass(frozen=True)
class Case:
    """A part that is wrong; ``inside`` is the rest of its place, behind the part."""

    part: Callable[[], Any]
    status: int
    code: str
    inside: str


def _truncated() -> str:
    return data_url(encoded(picture(300, 200), "JPEG")[:2000])


CASES: dict[str, Case] = {
    # what a part is
    "no part": Case(lambda: 3, 400, "invalid_request", ""),
    "an unknown type": Case(
        lambda: {"type": "imge_url", "imge_url": {}}, 400, "invalid_request", ".type"
    ),
    "nothing known": Case(lambda: {"url": "x"}, 400, "invalid_request", ".type"),
    "no payload": Case(lambda: {"type": "image_url"}, 400, "invalid_request", ".image_url"),
    "a number": Case(
        lambda: {"type": "image_url", "image_url": 3}, 400, "invalid_request", ".image_url"
    ),
    "a list": Case(
        lambda: {"type": "video_url", "video_url": ["x"]}, 400, "invalid_request", ".video_url"
    ),
    "a URL that is a number": Case(
        lambda: {"type": "image_url", "image_url": {"url": 3}},
        400,
        "invalid_request",
        ".image_url",
    ),
    "an empty URL": Case(lambda: image(""), 400, "invalid_request", ".image_url"),
    "an id that is a number": Case(
        lambda: image(picture_url(), uuid=3), 400, "invalid_request", ".uuid"
    ),
    # what the model takes
    "a sound": Case(lambda: audio(sound_url()), 400, "unsupported_modality", ".audio_url"),
    "a sound in base64": Case(
        lambda: {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
        400,
        "unsupported_modality",
        ".input_audio",
    ),
    "embeddings of a sound": Case(
        lambda: {"type": "audio_embeds", "audio_embeds": saved(embeds())},
        400,
        "unsupported_modality",
        ".audio_embeds",
    ),
    # where it is
    "a scheme": Case(lambda: image("ftp://example.com/x"), 400, "media_refused", ".image_url"),
    "an inner address": Case(
        lambda: image("http://127.0.0.1/x"), 400, "media_refused", ".image_url"
    ),
    "an inner address of a clip": Case(
        lambda: video("http://169.254.169.254/x"), 400, "media_refused", ".video_url"
    ),
    "a path": Case(lambda: image("/etc/passwd"), 400, "media_refused", ".image_url"),
    "an alias": Case(
        lambda: {"type": "input_image", "image_url": "/etc/passwd"},
        400,
        "media_refused",
        ".image_url",
    ),
    "an alias of clips": Case(
        lambda: {"type": "video", "video": "/etc/passwd"}, 400, "media_refused", ".video"
    ),
    "a part without a type": Case(
        lambda: {"image_url": "/etc/passwd"}, 400, "media_refused", ".image_url"
    ),
    "no base64": Case(
        lambda: image("data:image/png;base64,!!!"), 400, "media_undecodable", ".image_url"
    ),
    "no comma": Case(lambda: image("data:image/png;base64"), 400, "media_refused", ".image_url"),
    # what it is
    "no picture": Case(lambda: image(data_url(b"hello")), 400, "media_undecodable", ".image_url"),
    "half a picture": Case(lambda: image(_truncated()), 400, "media_undecodable", ".image_url"),
    "a clip as a picture": Case(
        lambda: image(data_url(make_clip("mp4", 2))), 400, "media_undecodable", ".image_url"
    ),
    "no clip": Case(lambda: video(data_url(b"hello")), 400, "media_undecodable", ".video_url"),
    "a clip of no pictures": Case(
        lambda: video("data:video/jpeg;base64,AAAA"), 400, "media_undecodable", ".video_url"
    ),
    "too many pixels": Case(
        lambda: image(data_url(PICTURES["PNG"]())), 413, "media_too_large", ".image_url"
    ),
    "too many bytes": Case(
        lambda: image(data_url(bytes(5 << 20))), 413, "media_too_large", ".image_url"
    ),
    "a clip of too many bytes": Case(
        lambda: video(data_url(bytes(5 << 20))), 413, "media_too_large", ".video_url"
    ),
    "an aspect that the processor refuses": Case(
        lambda: image(picture_url(width=3000, height=2)), 400, "invalid_request", ".image_url"
    ),
    # embeddings
    "embeddings of another size": Case(
        lambda: part(saved(embeds(4, 3))),
        400,
        "invalid_embeddings",
        ".image_embeds.image_embeds",
    ),
    "embeddings of another grid": Case(
        lambda: part(saved(embeds()), [[1, 3, 3]]),
        400,
        "invalid_embeddings",
        ".image_embeds.image_grid_thw[0]",
    ),
    "embeddings of a clip that are not numbers": Case(
        lambda: part(saved(torch.full((4, 256), torch.nan)), modality="video"),
        400,
        "invalid_embeddings",
        ".video_embeds.video_embeds",
    ),
    "no file of embeddings": Case(
        lambda: part(base64.b64encode(b"hello").decode()),
        400,
        "invalid_embeddings",
        ".image_embeds",
    ),
    # what is cached
    "an id of nothing": Case(
        lambda: image(None, uuid="never seen"), 404, "media_not_cached", ".image_url"
    ),
    "an id of no clip": Case(
        lambda: video(None, uuid="never seen"), 404, "media_not_cached", ".video_url"
    ),
    "an id of no embeddings": Case(
        lambda: {"type": "image_embeds", "image_embeds": None, "uuid": "never seen"},
        404,
        "media_not_cached",
        ".image_embeds",
    ),
}


def conversation(wrong: Any) -> list[dict[str, Any]]:
    """A conversation whose third message has the part in second place, behind a good one."""
    return [
        {"role": "user", "content": [image(picture_url()), text("What is this?")]},
        {"role": "assistant", "content": "a square"},
        {"role": "user", "content": [text("And"), wrong, text("this?")]},
    ]


@pytest.mark.parametrize("name", CASES)
def test_errors_point_at_their_part(anywhere: Service | Offline, name: str) -> None:
    """Status, code and place of every error about a part, whatever stage found it."""
    case = CASES[name]
    answer = anywhere.chat(conversation(case.part()))
    answer.is_refusal(case.status, case.code, f"messages[2].content[1]{case.inside}")


@pytest.mark.parametrize(
    "name", ["no part", "a sound", "an inner address", "no picture", "an id of nothing"]
)
@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
def test_errors_are_the_same_on_every_route(served: Service, name: str, path: str) -> None:
    """In a stream an error before the first token has its status too.

    Counting tokens loads media as answering does.
    """
    case = CASES[name]
    body: dict[str, Any] = {"messages": conversation(case.part())}
    if path == CHAT:
        body |= {"stream": True, "max_tokens": 2}
    answer = served.post(path, body)
    answer.is_refusal(case.status, case.code, f"messages[2].content[1]{case.inside}")


def test_errors_of_downloads(served: Service, media_host: Any) -> None:
    """What a host did wrong, in another message than the first.

    A time-out is in ``test_downloads``.
    """
    for path, status in (("/gone", "410 Gone"), ("/teapot", "418 Teapot")):
        url = media_host.serve(path, b"", status=status)
        answer = served.chat(conversation(image(url)))
        answer.is_refusal(424, "media_fetch_failed", "messages[2].content[1].image_url")
        assert status[:3] in answer.error["message"]


def test_too_many_items(anywhere: Service | Offline) -> None:
    """The first one that is too many is pointed at, and the flag is named."""
    answer = anywhere.ask(*[image(picture_url(seed)) for seed in range(6)])
    answer.is_refusal(400, "too_many_items", "messages[0].content[4].image_url")
    assert "--limit-mm-per-prompt" in answer.error["message"]
    answer = anywhere.ask(text("x"), *[video(data_url(make_clip("gif", 2)))] * 3)
    answer.is_refusal(400, "too_many_items", "messages[0].content[3].video_url")


OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"mm_processor_kwargs": {"max_pixel": 1}}, "mm_processor_kwargs.max_pixel"),
    ({"mm_processor_kwargs": {"max_pixels": "many"}}, "mm_processor_kwargs"),
    ({"mm_processor_kwargs": {"max_pixels": -1}}, "mm_processor_kwargs"),
    ({"mm_processor_kwargs": {"fps": "fast"}}, "mm_processor_kwargs"),
    ({"mm_processor_kwargs": 3}, "mm_processor_kwargs"),
    ({"media_io_kwargs": {"imge": {}}}, "media_io_kwargs.imge"),
    ({"media_io_kwargs": {"audio": {}}}, "media_io_kwargs.audio"),
    ({"media_io_kwargs": {"image": {"colour": 1}}}, "media_io_kwargs.image"),
    (
        {"media_io_kwargs": {"image": {"rgba_background_color": [1, 2]}}},
        "media_io_kwargs.image.rgba_background_color",
    ),
    ({"media_io_kwargs": {"video": {"num_frames": 0}}}, "media_io_kwargs.video.num_frames"),
    ({"media_io_kwargs": {"video": {"fps": -1}}}, "media_io_kwargs.video.fps"),
    ({"media_io_kwargs": []}, "media_io_kwargs"),
]


@pytest.mark.parametrize(("fields", "where"), OPTIONS, ids=str)
def test_options_that_cannot_be(served: Service, fields: dict[str, Any], where: str) -> None:
    """Wrong options of loading and of the processor are found with any media, at their own place."""
    answer = served.ask(image(picture_url()), text("What is this?"), **fields)
    assert str(answer.error["param"]).startswith(where), answer.body
    answer.is_refusal(400, "invalid_request", answer.error["param"])


COUNTS = [(0, 1), (1, 0), (1, 2), (2, 1), (3, 2), (2, 4)]


@pytest.mark.parametrize(("num_placeholders", "num_items"), COUNTS)
def test_placeholders_and_items_must_agree(
    offline: Offline, num_placeholders: int, num_items: int
) -> None:
    """vLLM issue 55546: placeholders that disagreed with their items ended the whole engine.

    SGLang answered 500. Here both counts are told before the engine hears of it.
    """
    prompt: dict[str, Any] = {"prompt": "What is " + IMAGE * num_placeholders + "?"}
    if num_items:
        prompt["multi_modal_data"] = {"image": [picture(seed=i) for i in range(num_items)]}
    answer = offline.generate(prompt)
    answer.is_refusal(400, "placeholder_mismatch", "prompt")
    assert str(num_placeholders) in answer.error["message"]
    assert str(num_items) in answer.error["message"]


@pytest.mark.parametrize(
    "prompt",
    [
        IMAGE,
        "<|image_pad|>",
        "<|video_pad|>" * 3,
        "<|vision_start|>" + "<|image_pad|>" * 4,
        [1308, 1311, 1309],
        [1312] * 7,
    ],
)
def test_placeholders_without_items_over_http(served: Service, prompt: Any) -> None:
    """CVE-2026-44222: literal placeholders in a text without media ended the worker of a model
    with M-RoPE.
    """
    body = {"prompt": prompt, "max_tokens": 2}
    served.post("/v1/completions", body).is_refusal(400, "placeholder_mismatch", "prompt")


def test_a_hundred_thousand_placeholders(anywhere: Service | Offline) -> None:
    """CVE-2025-46560: expanding placeholders took time that grew with their square.

    Here a text of them is refused in one pass, and in a chat they are words like any others.
    """
    many = "<|image_pad|>" * 100_000

    def refused(answer: Answer) -> None:
        assert answer.status == 400, answer.body
        assert answer.error["code"] in ("context_length_exceeded", "placeholder_mismatch")
        answer.is_discreet()

    refused(anywhere.ask(text(many)))
    if isinstance(anywhere, Service):
        refused(anywhere.post("/v1/completions", {"prompt": many, "max_tokens": 2}))
        refused(anywhere.post("/v1/completions", {"prompt": [1311] * 100_000, "max_tokens": 2}))
    else:
        refused(anywhere.generate(many))
        prompt = {"prompt": many, "multi_modal_data": {"image": picture()}}
        refused(anywhere.generate(prompt))


TOO_LONG = r"This model's maximum context length is \d+ tokens\. However, the prompt has [\w ,]*\d+ tokens?[ ,.].*"
"""The words that LiteLLM, LangChain and agents look for, to shorten what they sent."""


def too_long(answer: Answer, param: str) -> None:
    answer.is_refusal(400, "context_length_exceeded", param)
    assert re.fullmatch(TOO_LONG, answer.error["message"]), answer.error
    assert answer.error["type"] == "invalid_request_error"


def test_too_long_is_said_in_openais_words(anywhere: Service | Offline) -> None:
    """On every way to a prompt: text that is tokenized, or refused before it is, and token ids."""
    for words in ("red square " * 3000, "red square " * 100_000):
        too_long(anywhere.ask(text(words)), "messages")
    if isinstance(anywhere, Service):
        too_long(anywhere.ask(text("red " * 3000), stream=True), "messages")
        for prompt, param in (
            ("red " * 3000, "prompt"),
            ([5] * 6000, "prompt"),
            ([[5], [5] * 6000], "prompt[1]"),
        ):
            too_long(anywhere.post("/v1/completions", {"prompt": prompt, "max_tokens": 2}), param)
    else:
        too_long(anywhere.generate({"prompt_token_ids": [5] * 6000}), "prompt")


def test_media_that_make_a_prompt_too_long_are_named_so(offline: Offline) -> None:
    media = {"image": [picture(896, 896)] * 4}
    answer = offline.generate({"prompt": IMAGE * 4 + "red " * 2000, "multi_modal_data": media})
    too_long(answer, "prompt")


def test_pil_images_are_for_offline_use(served: Service, offline: Offline) -> None:
    """A part that can hold an object only is refused over HTTP, at its place."""
    wrong = {"type": "image_pil", "image_pil": "iVBORw0KGgo="}
    served.ask(wrong).is_refusal(400, "invalid_request", "messages[0].content[0].image_pil")
    good = {"type": "image_pil", "image_pil": Image.new("RGB", (40, 40))}
    assert offline.ask(good).status == 200
