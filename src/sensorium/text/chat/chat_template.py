"""Rendering of conversations to token ids through the model's chat template.

Text of users stays plain text whatever it contains: role markers and placeholders act only where
the template, or this module for a media part, wrote them (see ``sensorium.text.control``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sensorium.errors import InvalidRequestError
from sensorium.multimodal.items import MediaRef, Modality
from sensorium.multimodal.placeholders import NumberedPlaceholder, PlaceholderIds
from sensorium.text.chat.content_format import ContentFormat
from sensorium.text.chat.conversation import (
    Conversation,
    Message,
    TextPart,
    parse_messages,
    plain_data,
    texts_of,
)
from sensorium.text.chat.rendering import Marks, check_custom_roles, checked_kwargs, run_template
from sensorium.text.chat.template_files import CompiledTemplate, compile_template, find_templates
from sensorium.text.chat.variables import VariableWriter, up_to_end, with_arguments
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

    ``text`` is for people; None when the prompt was given as ids. ``token_ids`` hold one
    placeholder per item. ``refs`` are the items; those of one modality are in the order of their
    placeholders, or of the numbers in ``numbered``, the placeholders that are no single tokens.
    """

    text: str | None
    token_ids: tuple[int, ...]
    refs: tuple[MediaRef, ...]
    numbered: tuple[NumberedPlaceholder, ...] = ()


class ChatTemplate:
    """The chat templates of a model, with its tokenizer. Immutable, usable from several threads.

    ``placeholder_texts`` are the spellings of media placeholders, which have no effect where users
    type them. ``placeholders`` gives ids to those that are not in the vocabulary.
    """

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
        self.text = "\n".join(sources.values())
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
        """Load the templates of a model folder, or ``chat_template`` (a file or text) instead.

        ``fallback`` is the template where there is none. Without one, too, only ``render`` fails.
        Raises ConfigError for a template that cannot be read or compiled.
        """
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
        """True when the model has a template."""
        return "default" in self._templates

    @property
    def content_format(self) -> ContentFormat | None:
        """Form of content that the default template takes; None without a template."""
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
        """Render and tokenize a conversation.

        ``placeholder_text`` returns the placeholder of an item, by its modality and its number
        among those (from 1), for templates that take strings only. ``chat_template`` is the name of
        one of the model's templates or, where requests are trusted, the text of one.
        ``default_kwargs`` are the operator's; ``chat_template_kwargs``, of the request, win.
        ``add_special_tokens``: None adds BOS where the tokenizer prescribes it and the template
        wrote none, as processors of ``transformers`` do; True and False apply to any template.
        ``check_text`` may refuse the text before it is tokenized; its second argument returns the
        number of tokens of about so many first characters. Raises InvalidRequestError, and
        ChatTemplateError when the model's template fails.
        """
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

        def rendered(texts: bool) -> str:
            values = VariableWriter(
                self._control, marks, chosen, self._interleave, placeholder_text, texts
            ).variables(conversation, extra, tools=tools, continues=continue_final_message)
            adds = {"add_generation_prompt": add_generation_prompt}
            variables = {**self._tokenizer.special_tokens, **values, **adds}
            return run_template(chosen, variables, marks, has_kwargs=bool(given))

        marked = with_arguments(conversation, rendered)
        check_custom_roles(conversation.messages, marked, marks)
        if continue_final_message:
            marked = up_to_end(marked, marks.end)
        if check_text is not None:
            check_text(
                unmark(marked, marks.guard),
                lambda num_chars: len(self._encode(marked[:num_chars], marks.guard)[1]),
            )
        return self._tokenized(marked, marks.guard, add_special_tokens, conversation.refs)

    def _tokenized(
        self,
        marked: str,
        guard: str,
        add_special_tokens: bool | None,
        refs: tuple[MediaRef, ...],
    ) -> RenderedPrompt:
        pieces, found = self._split(marked)
        encoded = [self._encode(piece, guard) for piece in pieces]
        texts = [encoded[0][0]]
        ids = list(self._opened(encoded[0][1], add_special_tokens))
        for (spelling, placeholder), (more_text, more_ids) in zip(found, encoded[1:], strict=True):
            texts += [spelling, more_text]
            ids += [*placeholder.ids, *self._begun(more_ids, add_special_tokens)]
        if add_special_tokens:
            ids += self._tokenizer.suffix_ids
        numbered = tuple(placeholder for _, placeholder in found)
        return RenderedPrompt("".join(texts), tuple(ids), refs, numbered)

    def _split(self, marked: str) -> tuple[list[str], list[tuple[str, NumberedPlaceholder]]]:
        """Split the marked text at acting placeholders that are not in the vocabulary."""
        pieces, found, end = [], [], 0
        if self._placeholders is not None:
            for control in self._control.pattern.finditer(marked):
                placeholder = self._placeholders.read(control[0])
                if placeholder is not None:
                    pieces.append(marked[end : control.start()])
                    found.append((control[0], placeholder))
                    end = control.end()
        return [*pieces, marked[end:]], found

    def _begun(self, ids: list[int], add_special_tokens: bool | None) -> list[int]:
        """Return a piece of text after a placeholder, with the prefix that the model gives each."""
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
        """Return the text without marks, and ids in which only unmarked control tokens act."""
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
        """Return the first piece of a prompt, with the prefix of the tokenizer."""
        written = ids[:1] == [self._tokenizer.bos_token_id]
        if add_special_tokens or (add_special_tokens is None and not written):
            return [*self._tokenizer.prefix_ids, *ids]
        return ids


def _control_tokens(tokenizer: Tokenizer, placeholder_texts: Iterable[str]) -> ControlTokens:
    return tokenizer.control.plus(text for text in placeholder_texts if text)
