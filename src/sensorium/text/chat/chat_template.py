"""From a conversation to token ids, through the model's chat template.

What users write stays plain text whatever it spells: role markers and placeholders act only where
the template, or this module on behalf of a media part, put them (see ``sensorium.text.control``
for how)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sensorium.errors import InvalidRequestError, located
from sensorium.multimodal.items import MediaRef, Modality
from sensorium.multimodal.placeholders import NumberedPlaceholder, PlaceholderIds
from sensorium.text.chat.content_format import ContentFormat
from sensorium.text.chat.conversation import (
    ROLES,
    Conversation,
    Message,
    TextPart,
    parse_messages,
    plain_data,
    texts_of,
)
from sensorium.text.chat.rendering import Marks, check_custom_roles, checked_kwargs, run_template
from sensorium.text.chat.template_files import CompiledTemplate, compile_template, find_templates
from sensorium.text.control import ControlTokens, pick_mark, unmark
from sensorium.text.tokenizer import Tokenizer

__all__ = [
    "ChatTemplate",
    "Conversation",
    "Message",
    "RenderedPrompt",
    "TextPart",
    "parse_messages",
]

_NO_TEMPLATE = (
    "The model has no chat template. Start the server with --chat-template FILE_OR_TEXT (in "
    "Python: LLM(..., chat_template=...)), or use completions with a finished prompt."
)


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """A prompt as token ids, its placeholders not expanded yet.

    ``text`` is for people; None when the prompt was given as ids. ``token_ids`` hold one placeholder
    per item. ``refs`` are the items; those of one modality are in the order of their placeholders,
    or of the numbers in ``numbered``, the placeholders that are no single tokens.
    """

    text: str | None
    token_ids: tuple[int, ...]
    refs: tuple[MediaRef, ...]
    numbered: tuple[NumberedPlaceholder, ...] = ()


class ChatTemplate:
    """The chat templates of a model, with its tokenizer. Immutable, usable from several threads.

    ``placeholder_texts`` are the spellings of media placeholders, which users must not be able to
    type even where they are no tokens of the vocabulary. ``placeholders`` turns those that are none
    into ids."""

    def __init__(
        self,
        sources: Mapping[str, str],
        tokenizer: Tokenizer,
        *,
        content_format: ContentFormat | Literal["auto"] = "auto",
        interleave_mm_strings: bool = True,
        trust_request_chat_template: bool = False,
        placeholder_texts: Iterable[str] = (),
        placeholders: PlaceholderIds | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._placeholders = placeholders
        self._format = content_format
        self._interleave = interleave_mm_strings
        self._trusts_requests = trust_request_chat_template
        self._control = _control_tokens(tokenizer, placeholder_texts)
        self._templates = {
            name: compile_template(
                source,
                content_format=content_format,
                variables=tokenizer.special_tokens,
                plain=name == "default",
            )
            for name, source in sources.items()
        }

    @classmethod
    def load(
        cls,
        folder: str | Path | None,
        tokenizer: Tokenizer,
        *,
        chat_template: str | None = None,
        fallback: str | None = None,
        content_format: ContentFormat | Literal["auto"] = "auto",
        interleave_mm_strings: bool = True,
        trust_request_chat_template: bool = False,
        placeholder_texts: Iterable[str] = (),
        placeholders: PlaceholderIds | None = None,
    ) -> ChatTemplate:
        """The templates of a model folder, or ``chat_template`` (a file or text) in their place,
        or ``fallback``.

        A model without any can be loaded; only ``render`` then refuses. Raises ConfigError for a
        template that cannot be read or compiled."""
        sources = find_templates(folder, override=chat_template, fallback=fallback)
        return cls(
            sources,
            tokenizer,
            content_format=content_format,
            interleave_mm_strings=interleave_mm_strings,
            trust_request_chat_template=trust_request_chat_template,
            placeholder_texts=placeholder_texts,
            placeholders=placeholders,
        )

    @property
    def exists(self) -> bool:
        """Whether the model has a template."""
        return "default" in self._templates

    @property
    def content_format(self) -> ContentFormat | None:
        """The form of content that the usual template takes; None without a template."""
        return self._templates["default"].content_format if self.exists else None

    def render(
        self,
        conversation: Conversation,
        *,
        placeholder_text: Callable[[Modality, int], str],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        default_kwargs: Mapping[str, Any] | None = None,
        add_special_tokens: bool | None = None,
        check_text: Callable[[str, Callable[[int], int]], None] | None = None,
    ) -> RenderedPrompt:
        """The prompt of a conversation.

        ``placeholder_text`` gives what stands for an item, by its modality and its number among
        those (from 1), where a template takes strings only.
        ``chat_template`` is a name of one of the model's templates or, where the operator trusts
        requests, a template. ``default_kwargs`` are the operator's, who answers for them; those of the
        request win. ``add_special_tokens``: None puts a BOS in front where the tokenizer
        prescribes one and the template wrote none, as the processors of the reference do; True and
        False leave the template out of account. ``check_text`` may refuse the text before it is
        tokenized; it also gets a function that tells how many tokens about so many of its first
        characters are. Raises InvalidRequestError."""
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt cannot both be true; "
                "set one of them to false.",
                param="continue_final_message",
            )
        given = checked_kwargs(chat_template_kwargs or {}, self._tokenizer.special_tokens)
        extra = {**plain_data(dict(default_kwargs or {}), "default_chat_template_kwargs"), **given}
        tools = plain_data(list(tools), "tools") if tools else None
        marks = self._pick_marks(conversation, tools, extra)
        chosen = self._choose(chat_template, has_tools=tools is not None)
        writer = _Writer(
            self._control, marks, chosen, self._interleave, placeholder_text, Counter()
        )
        messages = writer.messages(conversation, continue_final_message)
        variables = {
            **self._tokenizer.special_tokens,
            "documents": None,
            **writer.guarded(extra),
            "messages": messages,
            "tools": writer.guarded(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        marked = run_template(chosen, variables, marks, has_kwargs=bool(given))
        check_custom_roles(conversation.messages, marked, marks)
        if continue_final_message:
            marked = _up_to_end(marked, marks.end)
        if check_text is not None:
            check_text(
                unmark(marked, marks.guard),
                lambda num_chars: len(self._encode(marked[:num_chars], marks.guard)[1]),
            )
        stretches, found = self._split(marked)
        encoded = [self._encode(stretch, marks.guard) for stretch in stretches]
        texts = [encoded[0][0]]
        ids = list(self._opened(encoded[0][1], add_special_tokens))
        for (spelling, placeholder), (more_text, more_ids) in zip(found, encoded[1:], strict=True):
            texts += [spelling, more_text]
            ids += [*placeholder.ids, *self._begun(more_ids, add_special_tokens)]
        if add_special_tokens:
            ids += self._tokenizer.suffix_ids
        numbered = tuple(placeholder for _, placeholder in found)
        return RenderedPrompt("".join(texts), tuple(ids), conversation.refs, numbered)

    def _split(self, marked: str) -> tuple[list[str], list[tuple[str, NumberedPlaceholder]]]:
        """The marked text, split at acting placeholders that the vocabulary does not hold; these, with their texts."""
        stretches, found, end = [], [], 0
        if self._placeholders is not None:
            for control in self._control.pattern.finditer(marked):
                placeholder = self._placeholders.read(control[0])
                if placeholder is not None:
                    stretches.append(marked[end : control.start()])
                    found.append((control[0], placeholder))
                    end = control.end()
        return [*stretches, marked[end:]], found

    def _begun(self, ids: list[int], add_special_tokens: bool | None) -> list[int]:
        """A stretch of text after a placeholder, with what the family puts in front of each."""
        each = self._placeholders is not None and self._placeholders.prefix_each
        if not each or add_special_tokens is False:
            return ids
        return [*self._tokenizer.prefix_ids, *ids]

    def _pick_marks(self, conversation: Conversation, *more: Any) -> Marks:
        texts = list(texts_of(conversation, *more))
        guard = pick_mark(texts)
        return Marks(guard, pick_mark(texts, not_in=guard))

    def _choose(self, requested: str | None, *, has_tools: bool) -> CompiledTemplate:
        if requested is not None and requested in self._templates:
            return self._templates[requested]
        if requested is not None:
            if not self._trusts_requests:
                raise InvalidRequestError(
                    "This server takes no chat templates from requests; its operator can allow "
                    "them with --trust-request-chat-template.",
                    param="chat_template",
                )
            return compile_template(
                requested,
                content_format=self._format,
                request=True,
                variables=self._tokenizer.special_tokens,
            )
        if has_tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if not self.exists:
            raise InvalidRequestError(_NO_TEMPLATE, param="messages")
        return self._templates["default"]

    def _encode(self, marked: str, mark: str) -> tuple[str, list[int]]:
        """Text without the mark, and ids in which only the control tokens of the marked text
        act."""
        text = unmark(marked, mark)
        pieces: list[tuple[str, bool]] = []
        acting: list[tuple[int, str]] = []
        end = length = 0
        for found in self._control.pattern.finditer(marked):
            plain = unmark(marked[end : found.start()], mark)
            pieces += [(plain, False), (found[0], True)]
            acting.append((length + len(plain), found[0]))
            length += len(plain) + len(found[0])
            end = found.end()
        pieces.append((unmark(marked[end:], mark), False))
        spelled = [(found.start(), found[0]) for found in self._control.pattern.finditer(text)]
        if spelled == acting:
            return text, self._tokenizer.encode(text, add_special_tokens=False)
        return text, self._tokenizer.inert.encode_pieces(pieces)

    def _opened(self, ids: list[int], add_special_tokens: bool | None) -> list[int]:
        """The first stretch of a prompt, with what the tokenizer puts in front."""
        written = ids[:1] == [self._tokenizer.bos_token_id]
        if add_special_tokens or (add_special_tokens is None and not written):
            return [*self._tokenizer.prefix_ids, *ids]
        return ids


@dataclass(frozen=True, slots=True)
class _Writer:
    """Makes the values that a template sees, with all texts of users guarded."""

    control: ControlTokens
    marks: Marks
    template: CompiledTemplate
    interleave: bool
    placeholder_text: Callable[[Modality, int], str]
    numbers: Counter[Modality]

    def messages(self, conversation: Conversation, continues: bool) -> list[dict[str, Any]]:
        """The messages of the conversation; the last text ends with the end mark if it is to be
        continued."""
        last = len(conversation.messages) - 1
        return [
            self._message(message, f"messages[{i}]", continues and i == last)
            for i, message in enumerate(conversation.messages)
        ]

    def guarded(self, value: Any, key: str = "") -> Any:
        """Plain data with all its texts guarded. Of keys and of values under ``type``, which
        templates compare, only complete spellings are broken."""
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
                out["tool_call_id"] = self.guarded(message.tool_call_id)
            if message.reasoning is not None:
                out["reasoning_content"] = self.guarded(message.reasoning)
            if message.tool_calls:
                out["tool_calls"] = [
                    {
                        "id": self.guarded(call.id),
                        "type": "function",
                        "function": {
                            "name": self.guarded(call.name),
                            "arguments": self.guarded(call.arguments),
                        },
                    }
                    for call in message.tool_calls
                ]
        return out

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
            else:
                end = f"{self.marks.end} " if continues and i == last else ""
                pieces.append((None, self.guarded(part.text) + end))
        keeps_string = message.is_string and self.template.tests_string
        if self.template.content_format == "string" or keeps_string:
            return self._joined(pieces)
        return [
            {"type": "text", "text": text} if modality is None else {"type": modality}
            for modality, text in pieces
        ]

    def _joined(self, pieces: list[tuple[Modality | None, str]]) -> str:
        """Content as one string: placeholders in their places, or in front of the texts where that was asked for."""
        if not self.interleave:
            pieces = sorted(pieces, key=lambda piece: piece[0] is None)
        return "\n".join(
            text if modality is None else self._placeholder(modality) for modality, text in pieces
        )

    def _placeholder(self, modality: Modality) -> str:
        self.numbers[modality] += 1
        return self.placeholder_text(modality, self.numbers[modality])


def _up_to_end(marked: str, end: str) -> str:
    """What stands before the end mark; where the template trimmed the message, trailing white
    space goes too."""
    at = marked.rfind(end)
    if at < 0:
        raise InvalidRequestError(
            "continue_final_message: the chat template leaves the final message out.",
            param="continue_final_message",
        )
    kept = marked[:at]
    return kept if marked[at + 1 : at + 2] == " " else kept.rstrip()


def _control_tokens(tokenizer: Tokenizer, placeholder_texts: Iterable[str]) -> ControlTokens:
    return tokenizer.control.plus(text for text in placeholder_texts if text)
