"""Counting right answers, the table and the card."""

from __future__ import annotations

from pathlib import Path

import pytest
from training.evaluate import (
    BEGIN,
    END,
    Question,
    count_right,
    draw_questions,
    messages_of,
    put_into_card,
    table_of,
)

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
