"""``apply_chat_template`` as in ``transformers``: from messages to the text or ids of a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sensorium.multimodal.parse.messages import media_part_type
from sensorium.text.chat.chat_template import ChatTemplate, parse_messages
from sensorium.text.tokenizer import ApplyTemplate

_BARE = {"image": "image_url", "video": "video_url", "audio": "audio_url"}
"""Types of parts that stand for media without holding them, as ``transformers`` has them."""


def template_applier(template: ChatTemplate, placeholder_text: Any) -> ApplyTemplate:
    """Return a function from messages to text, in which media parts become placeholders.

    ``placeholder_text``: as for ``ChatTemplate.render``. The function raises InvalidRequestError.
    """

    def apply(messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        conversation = parse_messages([_without_media(message) for message in messages])
        rendered = template.render(conversation, placeholder_text=placeholder_text, **options)
        return rendered.text or ""

    return apply


def _without_media(message: Any) -> Any:
    """Return a message whose media parts refer to no media, as none are loaded."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list | tuple):
        return message
    return {**message, "content": [_bare(part) for part in content]}


def _bare(part: Any) -> Any:
    if not isinstance(part, Mapping):
        return part
    kind = media_part_type(part) or str(part.get("type"))
    modality = next((m for m in _BARE if kind == m or m in kind.split("_")), None)
    if modality is None:
        return part
    name = _BARE[modality]
    return {"type": name, name: None, "uuid": "-"}
