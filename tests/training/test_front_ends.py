"""What front ends add to a question: its form, and that it leaves question and answer alone."""

from __future__ import annotations

import re
from random import Random

import numpy as np
import pytest
from training.batches import IGNORED, MAX_LENGTH, MAX_NOISY_LENGTH, Encoder, layout, make_batch
from training.clip_batches import make_clips
from training.evaluate import FIRST_SEED, draw_front_end_questions, messages_of
from training.front_ends import FORMS, HELD_OUT_FORMS, Noise, draw_noise, open_webui
from training.picture import Turn

ALL_FORMS = {name: form for name, (form, _) in FORMS.items()} | HELD_OUT_FORMS
TURNS = [Turn("colour", "What color is it?", "red"), Turn("word", "Read the text.", "CAT")]


@pytest.fixture(scope="module")
def encode() -> Encoder:
    return Encoder()


@pytest.mark.parametrize("name", ALL_FORMS)
def test_noise_leaves_the_tokens_of_the_question_alone(encode: Encoder, name: str) -> None:
    for seed in range(20):
        noise = ALL_FORMS[name](Random(seed))
        assert any(noise)
        question = "What color is the red circle?"
        parts = encode(noise.before) + encode(question) + encode(noise.after)
        assert encode(noise.before + question + noise.after) == parts
        assert not re.search(r"<\|\w+\|>", "".join(part or "" for part in noise))


def test_noise_of_a_seed_is_always_the_same() -> None:
    drawn = [draw_noise(Random(seed)) for seed in range(300)]
    assert drawn == [draw_noise(Random(seed)) for seed in range(300)]
    assert len(set(drawn)) > 250


def test_open_webui_tells_each_file_of_a_message_in_a_tag_before_the_text() -> None:
    form = re.compile(
        r"<attached_files>\n"
        r'(<file type="image" id="[0-9a-f-]{36}" url="[^"]+" content_type="image/\w+" '
        r'name="[^"]+"/>\n)+'
        r"</attached_files>\n\n"
    )
    assert all(form.fullmatch(open_webui(Random(seed)).before) for seed in range(50))


@pytest.mark.parametrize("way", ["packed", "question_first", "talk"])
def test_a_noisy_layout_keeps_answers_and_pictures(encode: Encoder, way: str) -> None:
    noise = Noise("Current date: 2026-11-30", "[Image: a.png]\n", "\nAnswer:")
    sequence = layout(Random(0), encode, (4, 5), TURNS, way, noise=noise)
    text = encode.decode([i for i in sequence.ids if i != encode.image_pad])
    labels = [label for label in sequence.labels if label != IGNORED]
    assert labels == encode("red<|im_end|>") + encode("CAT<|im_end|>")
    assert text.startswith("system\nCurrent date: 2026-11-30\nuser\n[Image: a.png]\nWhat color")
    # Before the first question of a message, behind each that is a message of its own.
    assert text.count("[Image: a.png]") == 1
    assert text.count("\nAnswer:") == (1 if way == "talk" else 2)
    pictures = 2 if way == "question_first" else 1
    assert sequence.ids.count(encode.image_pad) == 20 * pictures


def test_questions_after_noise_start_at_one_position(encode: Encoder) -> None:
    noise = Noise(before="[Image: a.png]\n")
    sequence = layout(Random(0), encode, (4, 5), TURNS, "question_first", noise=noise)
    segments, positions = np.array(sequence.segments), np.array(sequence.positions)
    assert (positions[segments == 1][0] == positions[segments == 2][0]).all()
    assert (positions[segments == 1][0] == positions[segments == 0][-1] + 1).all()


@pytest.mark.parametrize("make", [make_batch, make_clips])
def test_batches_are_noisy_at_the_share_asked_for(encode: Encoder, make: object) -> None:
    assert callable(make)
    plain = make(encode, 7, 2)
    asked = make(encode, 7, 2, noisy=1.0)
    assert not plain["noisy"]
    assert asked["noisy"]
    assert plain["ids"].shape[1] <= MAX_LENGTH
    assert asked["ids"].shape[1] <= MAX_NOISY_LENGTH
    assert all(asked["kinds"])
    again = make(encode, 7, 2, noisy=0.0)
    assert np.array_equal(again["ids"], plain["ids"])
    assert np.array_equal(again["pixels"], plain["pixels"])
    shares = [bool(make(encode, seed, 1, noisy=0.5)["noisy"]) for seed in range(40)]
    assert 10 < sum(shares) < 30


def test_the_same_questions_are_measured_in_every_form() -> None:
    questions = draw_front_end_questions(12, FIRST_SEED)
    groups: dict[str, list[tuple[str, str]]] = {}
    for question in questions:
        groups.setdefault(question.group, []).append((question.text, question.answer))
    assert set(groups) == {"nothing", "nothing, text first", *ALL_FORMS}
    assert all(asked == groups["nothing"] for asked in groups.values())
    noisy = next(question for question in questions if question.group == "Open WebUI")
    content = messages_of(noisy, {"type": "image"})[-1]["content"]
    assert [part["type"] for part in content] == ["text", "image"]
    assert content[0]["text"] == noisy.noise.before + noisy.text
