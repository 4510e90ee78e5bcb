"""What front ends put before a question does not change the answer of the demo model."""

from __future__ import annotations

from typing import Any

from training.picture import Turn
from training.pictures import draw_picture

from tests.reliability.asking import Service
from tests.reliability.media import data_url, encoded

#: Far from all seeds of training.
FIRST = 3 * 10**15
NUM_PICTURES = 16
FILE_ID = "0b7d5c1e-6a0f-4d3c-9a63-5f0f6f2f1a4e"
ATTACHED = (
    "<attached_files>\n"
    f'<file type="image" id="{FILE_ID}" url="{FILE_ID}" content_type="image/png" '
    'name="circle.png"/>\n'
    "</attached_files>\n\n"
)
#: One of the tools that Open WebUI brings, and always sends with such a message.
TOOL = {
    "type": "function",
    "function": {
        "name": "get_current_timestamp",
        "description": "Get the current Unix timestamp in seconds.",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}


def drawn() -> list[tuple[Turn, dict[str, Any]]]:
    """One question of a kind of which the card says that it is answered, for each drawn picture."""
    asked = []
    for seed in range(FIRST, FIRST + NUM_PICTURES):
        scene, kinds = (("shapes", ("shape", "colour", "count")), ("text", ("number", "word")))[
            seed % 2
        ]
        picture = draw_picture(seed, scene, (168, 168))
        turns = [turn for turn in picture.turns if turn.kind in kinds]
        if turns:
            asked.append(
                (
                    turns[0],
                    {"type": "image_url", "image_url": {"url": data_url(encoded(picture.image))}},
                )
            )
    assert len(asked) > NUM_PICTURES // 2
    return asked


def share_right(service: Service, chats: list[tuple[str, list[Any]]], **fields: Any) -> float:
    """The share of ``chats``, each with its true answer, that the server answers exactly."""
    right = []
    for truth, messages in chats:
        answer = service.chat(messages, max_tokens=24, **fields)
        assert answer.status == 200, answer.body
        right.append(answer.body["choices"][0]["message"]["content"] == truth)
    return sum(right) / len(right)


def test_open_webui_lists_the_files_of_a_message_before_its_question(served: Service) -> None:
    chats = []
    for turn, part in drawn():
        content = [
            {"type": "text", "text": ATTACHED},
            {"type": "text", "text": turn.question},
            part,
        ]
        chats.append((turn.answer, [{"role": "user", "content": content}]))
    assert share_right(served, chats, tools=[TOOL]) >= 0.8


def test_the_place_of_the_image_in_a_message_does_not_matter(served: Service) -> None:
    chats = []
    for turn, part in drawn():
        content = [{"type": "text", "text": turn.question}, part]
        chats.append((turn.answer, [{"role": "user", "content": content}]))
    assert share_right(served, chats) >= 0.8


def test_a_tag_that_does_not_end_and_what_stands_around_one_are_left_alone(served: Service) -> None:
    """Only whole lists of files are left out; other text is the prompt's, in order."""
    told = {}
    for text in ("a <attached_files> b", "a " + ATTACHED + "b " + ATTACHED + "c", "a b c"):
        body = {"messages": [{"role": "user", "content": text}], "model": "demo"}
        answer = served.post("/tokenize", body)
        told[text] = answer.body["count"]
    counts = list(told.values())
    assert counts[0] > counts[2] == counts[1]
