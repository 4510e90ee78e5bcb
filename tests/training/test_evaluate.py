"""Counting right answers, the table and the card."""

from __future__ import annotations

import base64
import io
import wave
from pathlib import Path

import av
import numpy as np
import pytest
from training.evaluate import (
    BEGIN,
    END,
    SOUND_SETS,
    Question,
    count_right,
    draw_clip_questions,
    draw_questions,
    draw_sound_questions,
    messages_of,
    put_into_card,
    table_of,
)
from training.speech import Speech

QUESTIONS = [
    Question("shapes", "colour", None, "What color is it?", "red"),
    Question("shapes", "colour", None, "What color is it?", "blue"),
    Question("text", "word", None, "Read it.", "CAT"),
]


def test_only_equal_answers_are_right() -> None:
    counts = count_right(QUESTIONS, ["red", "light blue", " CAT\n"])
    assert counts == {("shapes", "colour"): (1, 2), ("text", "word"): (1, 1)}
    assert "| shapes | colour | 1 | 2 | 50.0 % |" in table_of(counts)


def test_table_goes_between_the_marks(tmp_path: Path) -> None:
    card = tmp_path / "card.md"
    card.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    put_into_card(card, "new")
    put_into_card(card, "newer")
    assert card.read_text() == f"before\n{BEGIN}\nnewer\n{END}\nafter\n"
    card.write_text("no marks")
    with pytest.raises(ValueError, match=r"card\.md"):
        put_into_card(card, "new")


def test_questions_are_the_same_each_time() -> None:
    first, second = draw_questions(8), draw_questions(8)
    assert [q[1:2] + q[3:] for q in first] == [q[1:2] + q[3:] for q in second]
    assert {"shapes", "text", "chart", "no picture"} <= {q.group for q in first}


def test_messages_carry_the_picture_only_where_there_is_one() -> None:
    parts = messages_of(QUESTIONS[0], {"type": "image"})[0]["content"]
    assert [part["type"] for part in parts] == ["text"]
    drawn = draw_questions(4)[0]
    parts = messages_of(drawn, {"type": "image"})[0]["content"]
    assert [part["type"] for part in parts] == ["image", "text"]
    assert messages_of(drawn)[0]["content"][0]["type"] == "image_pil"


def test_clips_are_sent_without_loss() -> None:
    questions = draw_clip_questions(6)
    assert {"clips", "clips, 320x240"} == {q.group for q in questions}
    part = messages_of(questions[0])[0]["content"][0]
    data = base64.b64decode(part["video_url"]["url"].split(",")[1])
    with av.open(io.BytesIO(data)) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    assert len(frames) == len(questions[0].media)
    assert all(map(np.array_equal, frames, questions[0].media))


def test_sounds_are_sent_as_files_of_16_bits(speech: Speech) -> None:
    questions = draw_sound_questions(speech, 5)
    groups = list(dict.fromkeys(question.group for question in questions))
    assert groups == [name for name, *_ in SOUND_SETS] + ["no sound"]
    part = messages_of(questions[0])[0]["content"][0]
    with wave.open(io.BytesIO(base64.b64decode(part["input_audio"]["data"]))) as file:
        assert (file.getframerate(), file.getnchannels()) == (16000, 1)
        samples = np.frombuffer(file.readframes(10**6), "<i2")
    assert np.abs(samples / 32767 - questions[0].media).max() < 2e-5
    assert messages_of(questions[-1])[0]["content"][0]["type"] == "text"
