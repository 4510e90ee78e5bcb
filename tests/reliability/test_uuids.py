"""Callers' ids of items: every rule of them, for every modality and for embeddings, offline and
over HTTP.
"""

from __future__ import annotations

import base64
import concurrent.futures
import logging
from typing import Any

import numpy as np
import pytest
import torch

from sensorium import SamplingParams
from tests.parts import build_llm
from tests.reliability.asking import (
    PLAIN,
    Answer,
    Offline,
    Service,
    audio,
    image,
    log_of,
    place,
    text,
    video,
)
from tests.reliability.conftest import KEYS, NO_CACHES, ONE_PICTURE
from tests.reliability.listeners import Host
from tests.reliability.media import RATE, data_url, encoded, picture, picture_url, sound, tone
from tests.reliability.test_digests import identity, of
from tests.reliability.test_embeddings import GRID, embeds, part, saved

QUESTION = text("What is shown?")
ADA, BEN = KEYS


def clip_url(seed: int) -> str:
    data = [encoded(picture(64, 48, seed + number), "JPEG") for number in range(4)]
    return "data:video/jpeg;base64," + ",".join(base64.b64encode(one).decode() for one in data)


PARTS: dict[str, list[dict[str, Any]]] = {
    "image": [image(picture_url(seed)) for seed in (101, 102)],
    "video": [video(clip_url(seed)) for seed in (201, 301)],
    "image_embeds": [part(saved(embeds() * scale)) for scale in (1, 3)],
    "video_embeds": [part(saved(embeds() * scale), GRID, "video") for scale in (1, 3)],
}
SOUNDS = [audio(data_url(sound(tone(pitch=p)), "audio/wav")) for p in (300, 900)]


def named(part: dict[str, Any], uuid: Any) -> dict[str, Any]:
    return {**part, "uuid": uuid}


def without_data(part: dict[str, Any], uuid: Any) -> dict[str, Any]:
    """The part as it names what is cached."""
    return {"type": part["type"], part["type"]: None, "uuid": uuid}


def ask(model: Service | Offline, *content: Any, **more: Any) -> Answer:
    return model.ask(*content, QUESTION, max_tokens=6, **more)


# --- what an id stands for ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PARTS)
def test_an_id_stands_for_its_item(anywhere: Service | Offline, kind: str) -> None:
    """With its data once; then without them, or with any others under the same id.

    The item is the first one.
    """
    one, other = PARTS[kind]
    name = f"stands for {kind}"
    first = ask(anywhere, named(one, name)).text
    assert ask(anywhere, without_data(one, name)).text == first
    assert ask(anywhere, named(other, name)).text == first
    assert ask(anywhere, one).text == first
    assert ask(anywhere, without_data(one, name), other).status == 200
    twice = [named(one, f"twice {kind}"), named(other, f"twice {kind}")]
    assert ask(anywhere, *twice).text == ask(anywhere, *twice).text


def test_an_id_stands_for_its_sound(listening: Service | Offline) -> None:
    """The same of sounds, also as ``input_audio``."""
    one, other = SOUNDS
    first = ask(listening, named(one, "sound")).text
    for again in (
        without_data(one, "sound"),
        named(other, "sound"),
        {"type": "input_audio", "input_audio": None, "uuid": "sound"},
        {"audio_url": None, "uuid": "sound"},
    ):
        assert ask(listening, again).text == first


def test_what_is_cached_is_not_fetched(served: Service, trap: Host) -> None:
    """An id that is known needs no data, so that nothing is downloaded, read or decoded for it."""
    first = ask(served, named(PARTS["image"][0], "known")).text
    for url in (f"http://127.0.0.1:{trap.port}/x", "/etc/hostname", "data:image/png;base64,!!!!"):
        assert ask(served, named(image(url), "known")).text == first


@pytest.mark.parametrize("kind", PARTS)
def test_an_id_that_is_not_cached(anywhere: Service | Offline, kind: str) -> None:
    """404 at the place of the part, with the id; others in the request or beside it are not harmed."""
    good, missing = PARTS[kind][0], without_data(PARTS[kind][0], f"nobody's {kind}")
    answer = ask(anywhere, good, missing)
    answer.is_refusal(404, "media_not_cached", place(missing, 1))
    assert f"nobody's {kind}" in answer.error["message"]
    assert ask(anywhere, good).status == 200


def test_a_sound_that_is_not_cached(listening: Service | Offline) -> None:
    missing = without_data(SOUNDS[0], "nobody's")
    ask(listening, missing).is_refusal(404, "media_not_cached", place(missing))


@pytest.mark.parametrize("kind", PARTS)
def test_neither_data_nor_id(anywhere: Service | Offline, kind: str) -> None:
    """A part of nothing is a mistake of its own."""
    missing = without_data(PARTS[kind][0], None)
    ask(anywhere, missing).is_refusal(400, "invalid_request", place(missing))


def test_pictures_and_clips_of_one_name(anywhere: Service | Offline) -> None:
    """The same id may be used for both; each has its own."""
    picture_part, clip = PARTS["image"][0], PARTS["video"][0]
    first = ask(anywhere, named(picture_part, "both")).text
    ask(anywhere, without_data(clip, "both")).is_refusal(
        404, "media_not_cached", place(without_data(clip, "both"))
    )
    second = ask(anywhere, named(clip, "both")).text
    assert ask(anywhere, without_data(picture_part, "both")).text == first
    assert ask(anywhere, without_data(clip, "both")).text == second


@pytest.mark.parametrize("uuid", ["", 3, True, ["a"], {"a": 1}])
def test_ids_are_texts(anywhere: Service | Offline, uuid: Any) -> None:
    """Anything else is refused at the id."""
    answer = ask(anywhere, named(PARTS["image"][0], uuid))
    answer.is_refusal(400, "invalid_request", "messages[0].content[0].uuid")


@pytest.mark.parametrize(
    "uuid", ["x" * 1024, "x" * 99_999, "../../etc/passwd", "\0\n", "🦆", "a'; DROP TABLE"]
)
def test_ids_may_be_any_text(anywhere: Service | Offline, uuid: str) -> None:
    """An id is no path and no key: whatever it holds, it is digested."""
    first = ask(anywhere, named(PARTS["image"][0], uuid)).text
    assert ask(anywhere, without_data(PARTS["image"][0], uuid)).text == first


# --- whose they are -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PARTS)
def test_another_tenants_id_is_unknown(served: Service, kind: str) -> None:
    """An id shared among tenants could read another's media (a risk that vLLM documents).

    Ids belong to the API key and the salt under which they were made.
    """
    one, other = PARTS[kind]
    name = f"private {kind}"
    missing = without_data(one, name)
    first = ask(served, named(one, name), key=ADA).text
    salted = ask(served, named(other, name), key=ADA, cache_salt="ward 5").text
    for options in (
        {"key": BEN},
        {"key": ADA, "cache_salt": "x"},
        {"key": BEN, "cache_salt": "ward 5"},
    ):
        answer = ask(served, missing, **options)
        answer.is_refusal(404, "media_not_cached", place(missing))
    assert ask(served, missing, key=ADA).text == first
    assert ask(served, missing, key=ADA, cache_salt="ward 5").text == salted
    own = ask(served, named(other, name), key=BEN).text
    assert ask(served, missing, key=BEN).text == own
    assert ask(served, missing, key=ADA).text == first


def test_salts_separate_offline(offline: Offline) -> None:
    """The same of prompts of ``LLM``."""
    prompt = "<|vision_start|><|image_pad|><|vision_end|>What is it?"
    missing = {
        "prompt": prompt,
        "multi_modal_data": {"image": None},
        "multi_modal_uuids": {"image": "salted"},
    }
    first = {**missing, "multi_modal_data": {"image": picture()}, "cache_salt": "a"}
    assert offline.generate(first).status == 200
    assert offline.generate({**missing, "cache_salt": "a"}).status == 200
    for other in (missing, {**missing, "cache_salt": "b"}):
        offline.generate(other).is_refusal(404, "media_not_cached", "prompt.multi_modal_data.image")


# --- ``multi_modal_uuids`` ------------------------------------------------------------------------

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
CLIP = "<|vision_start|><|video_pad|><|vision_end|>"
FRAMES = np.zeros((2, 28, 28, 3), np.uint8)
PLACES: list[tuple[dict[str, Any], Any, str]] = [
    ({"image": [picture(), picture()]}, {"image": ["a"]}, "uuids.image"),
    ({"image": [picture()]}, {"image": ["a", "b"]}, "uuids.image"),
    ({"image": [picture()]}, {}, "uuids"),
    ({"image": picture(), "video": FRAMES}, {"image": ["a"]}, "uuids"),
    ({"image": picture()}, {"image": ["a"], "video": ["b"]}, "uuids.video"),
    ({"image": picture()}, {"picture": ["a"]}, "uuids.picture"),
    ({"image": picture()}, {"image": [3]}, "uuids.image[0]"),
    ({"image": picture()}, {"image": [""]}, "uuids.image[0]"),
    ({"image": picture()}, ["a"], "uuids"),
    ({"image": [None, picture()]}, {"image": [None, "a"]}, "data.image[0]"),
    ({"image": [None]}, None, "data.image[0]"),
]


@pytest.mark.parametrize(("data", "uuids", "where"), PLACES)
def test_ids_and_items_must_agree(
    offline: Offline, data: dict[str, Any], uuids: Any, where: str
) -> None:
    """Every modality appears, with as many entries as items; None is for those without an id."""
    prompt = {
        "prompt": IMAGE * 2,
        "multi_modal_data": data,
        "multi_modal_uuids": uuids,
    }
    offline.generate(prompt).is_refusal(400, "invalid_request", f"prompt.multi_modal_{where}")


def test_none_falls_back_to_the_content(offline: Offline) -> None:
    """Named and unnamed items of both modalities in one prompt, then the named ones without
    their data.
    """
    pictures = [picture(seed=401), picture(seed=402)]
    prompt = {
        "prompt": IMAGE * 2 + CLIP + "What is it?",
        "multi_modal_data": {"image": pictures, "video": FRAMES},
        "multi_modal_uuids": {"image": ["named", None], "video": ["named"]},
    }
    first = offline.generate(prompt)
    assert first.status == 200
    bare = {"image": [None, pictures[1]], "video": [None]}
    again = offline.generate({**prompt, "multi_modal_data": bare})
    assert again.text == first.text
    bare = {"image": [None, None], "video": [None]}
    offline.generate({**prompt, "multi_modal_data": bare}).is_refusal(
        400, "invalid_request", "prompt.multi_modal_data.image[1]"
    )


def test_ids_of_embeddings_as_a_whole(offline: Offline) -> None:
    """Embeddings of two pictures in one tensor have an id each, and are found again one by one."""
    value = {
        "image_embeds": torch.cat([embeds(), embeds() * 2]),
        "image_grid_thw": torch.tensor(GRID * 2),
    }
    prompt = {
        "prompt": IMAGE * 2 + "What is it?",
        "multi_modal_data": {"image": value},
        "multi_modal_uuids": {"image": ["first half", "second half"]},
    }
    first = offline.generate(prompt)
    assert first.status == 200
    again = offline.generate({**prompt, "multi_modal_data": {"image": [None, None]}})
    assert again.text == first.text
    wrong = {**prompt, "multi_modal_uuids": {"image": ["a", "b", "c"]}}
    offline.generate(wrong).is_refusal(400, "placeholder_mismatch", "prompt")


def test_ids_of_sounds(sounds: Offline) -> None:
    """The same of arrays of sounds and of embeddings of them."""
    ask = {"prompt": "<|audio|>\nWhat is it?", "multi_modal_uuids": {"audio": ["mine"]}}
    first = sounds.generate({**ask, "multi_modal_data": {"audio": (tone(), RATE)}})
    assert sounds.generate({**ask, "multi_modal_data": {"audio": [None]}}).text == first.text
    ask["multi_modal_uuids"] = {"audio": ["nobody's"]}
    missing = sounds.generate({**ask, "multi_modal_data": {"audio": [None]}})
    missing.is_refusal(404, "media_not_cached", "prompt.multi_modal_data.audio[0]")


def test_a_missing_id_in_a_batch_is_named(offline: Offline) -> None:
    """The message says which prompt it was, and what follows works."""
    good = {"prompt": IMAGE, "multi_modal_data": {"image": picture()}}
    missing = {
        "prompt": IMAGE,
        "multi_modal_data": {"image": [None]},
        "multi_modal_uuids": {"image": ["nobody's"]},
    }
    answer = offline.generate([good, missing, good])
    assert (answer.status, answer.error["code"]) == (404, "media_not_cached")
    assert "Prompt 1" in answer.error["message"]


# --- caches that are small, or off ----------------------------------------------------------------


def pictures_by_name(count: int) -> list[tuple[str, str]]:
    return [(f"picture {number}", picture_url(500 + number)) for number in range(count)]


@pytest.mark.slow
def test_what_was_admitted_stays_until_it_is_used() -> None:
    """Eviction between admission and use (vLLM issue 31404 is such a fault).

    The cache holds one picture, and while a request by its id waits for its turn, those after it
    push it out. It is answered all the same.
    """
    named_pictures = [(f"picture {number}", picture(seed=500 + number)) for number in range(8)]

    def prompt(name: str, data: Any) -> dict[str, Any]:
        return {
            "prompt": IMAGE + "What is it?",
            "multi_modal_data": {"image": data},
            "multi_modal_uuids": {"image": [name]},
        }

    options: dict[str, Any] = {"num_kv_blocks": 60, "block_size": 16, "max_num_seqs": 4}
    with build_llm("demo", **options) as parts:
        expected = [Offline(parts).generate(prompt(*one)).text for one in named_pictures]
    params = SamplingParams(**PLAIN)
    for first in (0, 3):
        order = named_pictures[first:] + named_pictures[:first]
        with build_llm("demo", **options, mm_processor_cache_gb=ONE_PICTURE) as parts:
            llm = parts.llm
            # Loaded, but not encoded: no other cache has it.
            identity(Offline(parts), of("image", order[0][1], order[0][0]))
            batch = [prompt(*one) for one in order]
            batch[0] = prompt(order[0][0], None)
            outputs = llm.generate(batch, params, use_tqdm=False)
            texts = expected[first:] + expected[:first]
            assert [output.outputs[0].text for output in outputs] == texts
            evicted = Offline(parts).generate(batch[0])
            evicted.is_refusal(404, "media_not_cached", "prompt.multi_modal_data.image")


def test_evictions_under_load_are_misses_or_nothing(tight: Service) -> None:
    """Eight clients name pictures with and without data, of which the cache holds one.

    Each answer is that picture's, or 404 for one that is not there, and never another's.
    """
    names = pictures_by_name(8)
    expected = {name: ask(tight, image(url)).text for name, url in names}
    missing = image(None, uuid="x")

    def client(number: int) -> None:
        for step in range(6):
            name, url = names[(number + step) % len(names)]
            assert ask(tight, image(url, uuid=name)).text == expected[name]
            answer = ask(tight, image(None, uuid=name))
            if answer.status == 200:
                assert answer.text == expected[name]
            else:
                answer.is_refusal(404, "media_not_cached", place(missing))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(client, range(8)))
    tight.is_well()


def test_ids_are_ignored_without_caches_offline(caplog: pytest.LogCaptureFixture) -> None:
    """With both caches off an id changes nothing, which is said once; data cannot be left out then."""
    with (
        build_llm("demo", enable_prefix_caching=False, **NO_CACHES) as parts,
        caplog.at_level(logging.WARNING),
    ):
        off = Offline(parts)
        one, other = PARTS["image"]
        plain = [ask(off, each).text for each in (one, other)]
        for _ in range(2):
            assert [ask(off, named(each, "same")).text for each in (one, other)] == plain
        missing = without_data(one, "same")
        ask(off, missing).is_refusal(404, "media_not_cached", place(missing))
    assert caplog.text.count("multi_modal_uuids are ignored") == 1


def test_ids_are_ignored_without_caches_over_http(narrow: Service) -> None:
    """The same of a server; its log says it once."""
    one, other = PARTS["image"]
    plain = [ask(narrow, each).text for each in (one, other)]
    for _ in range(2):
        assert [ask(narrow, named(each, "same")).text for each in (one, other)] == plain
    missing = without_data(one, "same")
    ask(narrow, missing).is_refusal(404, "media_not_cached", place(missing))
    assert log_of(narrow).count("multi_modal_uuids are ignored") == 1
