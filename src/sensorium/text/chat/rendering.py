"""Rendering of a chat template: its variables, and the errors for its failures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sensorium.config import suggestion
from sensorium.errors import ChatTemplateError, InvalidRequestError
from sensorium.text.chat.content_format import FAILURES
from sensorium.text.chat.conversation import ROLES, Message, plain_data
from sensorium.text.chat.sandbox import MAX_SECONDS, TemplateRefusal, render_bounded
from sensorium.text.chat.template_files import CompiledTemplate
from sensorium.text.control import unmark

RESERVED_KWARGS = frozenset(
    (
        *("messages", "conversation", "tools", "add_generation_prompt", "continue_final_message"),
        *("chat_template", "tokenize", "tokenizer_kwargs", "return_dict", "return_tensors"),
        *("return_assistant_tokens_mask", "padding", "truncation", "max_length"),
        *("raise_exception", "strftime_now", "namespace", "range", "dict", "cycler", "joiner"),
        *("loop", "self", "caller", "varargs", "kwargs"),
    )
)

REQUEST_SECONDS = 2.0
"""Time that the template of a request may take; the operator's templates get ``MAX_SECONDS``."""


@dataclass(frozen=True, slots=True)
class Marks:
    """Marks in the rendered text.

    ``guard`` breaks the spellings of control tokens that users typed; ``end`` is the place where
    the final message is continued.
    """

    guard: str
    end: str


def run_template(
    chosen: CompiledTemplate, variables: dict[str, Any], marks: Marks, has_kwargs: bool
) -> str:
    """Return the template's output.

    Raises InvalidRequestError where the template refuses the conversation, or fails and it, or its
    ``chat_template_kwargs``, came with the request; ChatTemplateError where it fails otherwise.
    """
    try:
        seconds = REQUEST_SECONDS if chosen.from_request else MAX_SECONDS
        return render_bounded(chosen.template, variables, seconds)
    except TemplateRefusal as error:
        raise InvalidRequestError(
            "The model's chat template refuses the conversation: "
            + _unmarked(f"{error.message}{_custom_roles(variables['messages'])}", marks),
            param="messages",
        ) from error
    except FAILURES as error:
        reason = f"{type(error).__name__}: {_unmarked(error, marks)[:300]}"
        if chosen.from_request or has_kwargs:
            param = "chat_template" if chosen.from_request else "chat_template_kwargs"
            raise InvalidRequestError(
                f"The chat template cannot render the conversation with this {param}: {reason}",
                param=param,
            ) from error
        raise ChatTemplateError(
            f"The model's chat template fails on this conversation ({reason}). The request is well "
            "formed; the operator of the server can give another template with --chat-template.",
            param="messages",
        ) from error


def _unmarked(text: object, marks: Marks) -> str:
    return unmark(unmark(str(text), marks.guard), marks.end)


def _custom_roles(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return a note on the first unusual role, the likely reason of a template's refusal."""
    for index, message in enumerate(messages):
        if message["role"] not in ROLES:
            near = suggestion(message["role"], list(ROLES))
            return f" (messages[{index}].role is {message['role']!r}.{near})"
    return ""


def check_custom_roles(messages: Sequence[Message], marked: str, marks: Marks) -> None:
    """Raise InvalidRequestError for messages that the template leaves out for their role."""
    if all(message.role in ROLES for message in messages):
        return
    text = _unmarked(marked, marks)
    for index, message in enumerate(messages):
        if message.role in ROLES:
            continue
        word = max(re.findall(r"\w+", message.text), key=len, default="")
        if word not in text:
            near = suggestion(message.role, list(ROLES))
            raise InvalidRequestError(
                f"The model's chat template leaves out messages[{index}], whose role "
                f"{message.role!r} it does not know; use a role that it knows.{near}",
                param=f"messages[{index}].role",
            )


def checked_kwargs(given: Mapping[str, Any], special: Mapping[str, str]) -> dict[str, Any]:
    """Return ``chat_template_kwargs`` as plain data.

    Raises InvalidRequestError for reserved names and for ``special``, the names of special tokens.
    """
    param = "chat_template_kwargs"
    plain = plain_data(dict(given), param)
    for name in plain:
        if name in RESERVED_KWARGS or name in special or name.startswith(("_", "sensorium")):
            raise InvalidRequestError(
                f"chat_template_kwargs may not set {name!r}, a reserved name.",
                param=f"{param}.{name}",
            )
    return dict(plain)
