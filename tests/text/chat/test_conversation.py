"""Messages in OpenAI's form become a conversation, or an error that names the place."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from sensorium.errors import InvalidRequestError
from sensorium.multimodal.items import MediaRef
from sensorium.text.chat.conversation import TextPart, parse_messages


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def test_strings_and_parts() -> None:
    conversation = parse_messages(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, "b"]},
            {"role": "user", "content": [{"type": "input_text", "text": "c"}, {"text": "d"}]},
            {"role": "assistant", "content": None},
        ]
    )
    assert [m.text for m in conversation.messages] == ["Be brief.", "a\nb", "c\nd", ""]
    assert [m.is_string for m in conversation.messages] == [True, False, False, True]
    assert conversation.refs == ()


def test_media_parts_in_order() -> None:
    picture = Image.new("RGB", (2, 2))
    (message,) = parse_messages(
        user(
            {"type": "image_url", "image_url": {"url": "https://a/b.png", "detail": "low"}},
            {"type": "text", "text": "and"},
            {"type": "image_url", "image_url": "https://a/c.png"},
            {"image_url": {"url": "data:image/png;base64,AA=="}},
            {"type": "input_image", "image_url": "https://a/d.png", "uuid": "x"},
            {"type": "image_pil", "image_pil": picture},
            {"type": "image_url", "image_url": None, "uuid": "known"},
            {"type": "video_url", "video_url": {"url": "https://a/v.mp4"}},
            {"type": "input_audio", "input_audio": {"data": "AA==", "format": "mp3"}},
        )
    ).messages
    refs = [p for p in message.parts if isinstance(p, MediaRef)]
    assert isinstance(message.parts[1], TextPart)
    assert [r.modality for r in refs] == ["image"] * 6 + ["video", "audio"]
    assert [r.kind for r in refs] == ["url"] * 4 + ["object", "cached", "url", "url"]
    assert refs[0].source == "https://a/b.png"
    assert refs[0].param == "messages[0].content[0].image_url"
    assert [r.uuid for r in refs[3:6]] == ["x", None, "known"]


@pytest.mark.parametrize(
    ("messages", "param", "message"),
    [
        ([], "messages", "empty"),
        ("hello", "messages", "list"),
        (["hello"], "messages[0]", "object"),
        ([{"content": "a"}], "messages[0].role", "must be a role such as system"),
        ([{"role": "us er", "content": "a"}], "messages[0].role", "'us er'"),
        ([{"role": "a" * 65, "content": "a"}], "messages[0].role", "up to 64"),
        ([{"role": "user"}], "messages[0].content", "missing"),
        ([{"role": "user", "content": 3}], "messages[0].content", "string or a list"),
        ([{"role": "user", "content": [3]}], "messages[0].content[0]", "object"),
        (
            [{"role": "user", "content": ["a", {"type": "image_ulr", "image_url": "x"}]}],
            "messages[0].content[1].type",
            "Did you mean 'image_url'",
        ),
        ([{"role": "user", "content": [{}]}], "messages[0].content[0].type", "no 'type'"),
        (
            [{"role": "user", "content": [{"type": "text", "text": 1}]}],
            "messages[0].content[0].text",
            "string",
        ),
        ([{"role": "user", "content": "\ud800"}], "messages[0].content", "surrogate"),
        ([{"role": "user", "content": "a", "name": 3}], "messages[0].name", "string"),
        (
            [{"role": "assistant", "tool_calls": [{"id": "x"}]}],
            "messages[0].tool_calls[0]",
            "function",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": None}]}],
            "messages[0].content[0].image_url",
            "uuid",
        ),
    ],
)
def test_errors_name_the_place(messages: Any, param: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        parse_messages(messages)
    assert caught.value.param == param


def test_embeddings_in_one_message_only() -> None:
    import torch

    part = {"type": "image_embeds", "image_embeds": torch.zeros(2, 4)}
    assert len(parse_messages(user(part, part)).refs) == 2
    with pytest.raises(InvalidRequestError, match="only one message") as caught:
        parse_messages(user(part) + user(part))
    assert caught.value.param == "messages[1].content"


def test_tool_calls_have_objects_as_arguments() -> None:
    def call(arguments: Any) -> Any:
        function = {"name": "f", "arguments": arguments}
        messages = [{"role": "assistant", "tool_calls": [{"id": "1", "function": function}]}]
        return parse_messages(messages).messages[0].tool_calls[0].arguments

    assert call('{"a": [1]}') == {"a": [1]}
    assert call({"a": 1}) == {"a": 1}
    assert call("") == {}
    assert call("not json") == "not json"
    assert call("[1]") == "[1]"
    deep: Any = 1
    for _ in range(100):
        deep = {"a": deep}
    with pytest.raises(InvalidRequestError, match="nested"):
        call(deep)
    with pytest.raises(InvalidRequestError, match="JSON values"):
        call({"a": object()})
