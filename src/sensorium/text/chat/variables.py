"""The variables that a chat template gets, with all texts of users guarded."""

from __future__ import annotations

import hashlib
import json
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sensorium.errors import ChatTemplateError, InvalidRequestError, located
from sensorium.multimodal.items import MediaRef, Modality
from sensorium.text.chat.conversation import ROLES, Conversation, Message, TextPart
from sensorium.text.chat.rendering import Marks
from sensorium.text.chat.template_files import CompiledTemplate
from sensorium.text.control import ControlTokens

_SHORT_ID = 9


@dataclass(frozen=True, slots=True)
class VariableWriter:
    """Writer of the template's variables, with all texts of users guarded.

    ``arguments_as_texts``: the arguments of tool calls are JSON texts instead of objects.
    """

    control: ControlTokens
    marks: Marks
    template: CompiledTemplate
    interleave: bool
    placeholder_text: Callable[[Modality, int], str]
    arguments_as_texts: bool = False
    numbers: Counter[Modality] = field(default_factory=Counter)

    def variables(
        self,
        conversation: Conversation,
        kwargs: Mapping[str, Any],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        continues: bool,
    ) -> dict[str, Any]:
        """Return the variables of the conversation; ``kwargs`` are further ones."""
        return {
            "documents": None,
            **self.guarded(dict(kwargs)),
            "messages": self.messages(conversation, continues),
            "tools": self.guarded(tools),
        }

    def messages(self, conversation: Conversation, continues: bool) -> list[dict[str, Any]]:
        """Return the messages; the last text ends with the end mark if it is to be continued."""
        last = len(conversation.messages) - 1
        return [
            self._message(message, f"messages[{i}]", continues and i == last)
            for i, message in enumerate(conversation.messages)
        ]

    def guarded(self, value: Any, key: str = "") -> Any:
        """Return plain data with all its texts guarded.

        In keys and in values of ``type``, which templates compare, only whole spellings are broken.
        """
        if isinstance(value, str):
            return self.control.protect(value, self.marks.guard, whole_only=key == "type")
        if isinstance(value, dict):
            return {
                self.control.protect(k, self.marks.guard, whole_only=True): self.guarded(v, k)
                for k, v in value.items()
            }
        if isinstance(value, list):
            return [self.guarded(item) for item in value]
        return value

    def _message(self, message: Message, param: str, continues: bool) -> dict[str, Any]:
        with located(param):
            content = self._content(message, f"{param}.content", continues)
            role = message.role if message.role in ROLES else self.guarded(message.role)
            out: dict[str, Any] = {"role": role, "content": content}
            if message.name is not None:
                out["name"] = self.guarded(message.name)
            if message.tool_call_id is not None:
                out["tool_call_id"] = self.guarded(self._call_id(message.tool_call_id))
            if message.reasoning is not None:
                out["reasoning_content"] = self.guarded(message.reasoning)
            if message.tool_calls:
                out["tool_calls"] = [
                    {
                        "id": self.guarded(self._call_id(call.id)),
                        "type": "function",
                        "function": {
                            "name": self.guarded(call.name),
                            "arguments": self.guarded(self._arguments(call.arguments)),
                        },
                    }
                    for call in message.tool_calls
                ]
        return out

    def _arguments(self, arguments: Mapping[str, Any] | str) -> Mapping[str, Any] | str:
        if self.arguments_as_texts and not isinstance(arguments, str):
            return json.dumps(arguments, ensure_ascii=False)
        return arguments

    def _call_id(self, call_id: str) -> str:
        """Return the id of a call; a short one for templates that take no other."""
        fits = len(call_id) == _SHORT_ID and call_id.isalnum() and call_id.isascii()
        if fits or not self.template.short_ids:
            return call_id
        number = int.from_bytes(hashlib.sha256(call_id.encode()).digest())
        chars = string.ascii_letters + string.digits
        return "".join(chars[number // len(chars) ** i % len(chars)] for i in range(_SHORT_ID))

    def _content(self, message: Message, param: str, continues: bool) -> str | list[dict[str, Any]]:
        last = max(
            (i for i, p in enumerate(message.parts) if isinstance(p, TextPart)), default=None
        )
        if continues and last is None:
            raise InvalidRequestError(
                "continue_final_message needs a final message with text.", param=param
            )
        pieces: list[tuple[Modality | None, str]] = []
        for i, part in enumerate(message.parts):
            if isinstance(part, MediaRef):
                pieces.append((part.modality, ""))
            elif isinstance(part, TextPart):
                end = f"{self.marks.end} " if continues and i == last else ""
                pieces.append((None, self.guarded(part.text) + end))
            else:
                raise ValueError("files become media before a template renders them")
        keeps_string = message.is_string and self.template.tests_string
        if self.template.content_format == "string" or keeps_string:
            return self._joined(pieces)
        return [
            {"type": "text", "text": text} if modality is None else {"type": modality}
            for modality, text in pieces
        ]

    def _joined(self, pieces: list[tuple[Modality | None, str]]) -> str:
        """Return content as a string, with placeholders in place or, if so configured, in front."""
        if not self.interleave:
            pieces = sorted(pieces, key=lambda piece: piece[0] is None)
        return "\n".join(
            text if modality is None else self._placeholder(modality) for modality, text in pieces
        )

    def _placeholder(self, modality: Modality) -> str:
        self.numbers[modality] += 1
        return self.placeholder_text(modality, self.numbers[modality])


def up_to_end(marked: str, end: str) -> str:
    """Return the text before the end mark, stripped where the template trimmed the message."""
    at = marked.rfind(end)
    if at < 0:
        raise InvalidRequestError(
            "continue_final_message: the chat template does not render the final message.",
            param="continue_final_message",
        )
    kept = marked[:at]
    return kept if marked[at + 1 : at + 2] == " " else kept.rstrip()


def with_arguments(conversation: Conversation, render: Callable[[bool], str]) -> str:
    """Return the template's text, with the arguments of tool calls in the form that it takes.

    ``render`` is told whether arguments are JSON texts. Most templates take objects, some, such as
    DeepSeek's, join texts. Raises what ``render`` raises of objects.
    """
    try:
        return render(False)
    except (ChatTemplateError, InvalidRequestError):
        if not any(message.tool_calls for message in conversation.messages):
            raise
        try:
            return render(True)
        except (ChatTemplateError, InvalidRequestError):
            pass
        raise
