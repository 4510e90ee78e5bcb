"""Tokens of reasoning are counted as an answer grows, each token read once."""

from __future__ import annotations

from typing import Any, SupportsIndex

import pytest

from sensorium.outputs import CompletionOutput, RequestOutput
from sensorium.server.openai.tool_calls import ReasoningCounter, ToolPlan
from sensorium.text.detokenizer import TokenSpelling
from sensorium.text.tools.choice import ToolChoice
from sensorium.text.tools.forms import REASONING_FORMS, AnswerForms
from tests.server.fake_frontend import TOKENIZER

[FORM] = [form for form in REASONING_FORMS if form.name == "qwen3"]
BEGIN, END, OTHER = 100, 101, 7


class Watched(list[int]):
    """Token ids that count how many of them are looked at."""

    num_read = 0

    def index(self, value: int, start: SupportsIndex = 0, stop: SupportsIndex = 1 << 62) -> int:
        """Search, counting."""
        self.num_read += len(self) - int(start)
        return super().index(value, start, stop)


class Spelling(TokenSpelling):
    """Spelling that counts its calls."""

    num_calls = 0

    def to_bytes(self, token_id: int) -> bytes:
        """Spell, counting."""
        self.num_calls += 1
        return super().to_bytes(token_id)


def plan(**forms: Any) -> ToolPlan:
    """The plan of a chat without tools."""
    return ToolPlan(
        ToolChoice("none"),
        forms=AnswerForms(reasoning=FORM, **forms),
        spelling=Spelling(TOKENIZER),
    )


def output(*samples: CompletionOutput, prompt: str | None = None) -> RequestOutput:
    """An output that is not complete."""
    return RequestOutput("id", prompt, [1], list(samples), False)


@pytest.mark.parametrize(
    ("ids", "prompt", "expected"),
    [
        ([BEGIN, OTHER, OTHER, END, OTHER, END], None, 4),
        ([OTHER, OTHER, OTHER, BEGIN, OTHER, END, OTHER], None, 6),
        ([OTHER, OTHER, OTHER, OTHER, BEGIN, OTHER, END], None, 0),
        ([OTHER, END, OTHER], "<think>\n", 2),
        ([END, OTHER], None, 0),
        ([BEGIN, OTHER, OTHER], None, 3),
        ([], None, 0),
    ],
)
def test_tokens_count_up_to_the_closing_one(
    ids: list[int], prompt: str | None, expected: int
) -> None:
    known = plan(begin_id=BEGIN, end_id=END)
    counter, sample = ReasoningCounter(known), CompletionOutput(0, "", [])
    grown = output(sample, prompt=prompt)
    for token_id in ids:
        sample.token_ids.append(token_id)
        assert counter(grown) == known.num_reasoning_tokens(grown)
    assert counter(grown) == known.num_reasoning_tokens(grown) == expected


@pytest.mark.parametrize(
    ("reply", "prompt", "reasoning"),
    [
        ("<think>\nTwo.\n</think>\n\nFour. </think>", None, "<think>\nTwo.\n</think>"),
        (" \n<think>Größe</think>x", None, " \n<think>Größe</think>"),
        ("Two.</think>Four.", "<think>", "Two.</think>"),
        ("Four. <think>no</think>", None, ""),
        ("<think>\nTwo", None, "<think>\nTwo"),
    ],
)
def test_spelled_tags_count_their_tokens(reply: str, prompt: str | None, reasoning: str) -> None:
    known = plan()
    counter, sample = ReasoningCounter(known), CompletionOutput(0, "", [])
    grown = output(sample, prompt=prompt)
    ids, spelled = TOKENIZER.encode(reply), b""
    for token_id in ids:
        sample.token_ids.append(token_id)
        spelled += known.spelling.to_bytes(token_id)  # type: ignore[union-attr]
        sample.text = spelled.decode("utf-8", "ignore")
        assert counter(grown) == known.num_reasoning_tokens(grown)
    assert sample.text == reply
    least, size = 0, 0
    while size < len(reasoning.encode()):
        size += len(TOKENIZER.token_bytes(ids[least]))
        least += 1
    assert counter(grown) == least


def test_each_token_is_read_once() -> None:
    known = plan(begin_id=BEGIN, end_id=END)
    ids = [Watched([BEGIN]) for _ in range(3)]
    samples = [CompletionOutput(i, "", mine) for i, mine in enumerate(ids)]
    counter, grown = ReasoningCounter(known), output(*samples)
    for length in range(2, 1001):
        for sample in samples:
            sample.token_ids.append(OTHER)
        assert counter(grown) == 3 * length
    assert sum(mine.num_read for mine in ids) == 3 * 1000
    spelled = plan()
    spelling = spelled.spelling
    assert isinstance(spelling, Spelling)
    counter, sample = ReasoningCounter(spelled), CompletionOutput(0, "", [])
    for token_id in TOKENIZER.encode("<think>" + "One two. " * 100):
        sample.token_ids.append(token_id)
        sample.text += TOKENIZER.token_bytes(token_id).decode()
        counter(output(sample))
    assert spelling.num_calls == len(sample.token_ids)
