"""Running a chat template on a conversation: what it may be given, and whose mistake it is when it fails."""

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
    """``guard`` breaks typed control tokens; ``end`` stands where the final message is to be
    continued."""

    guard: str
    end: str


def run_template(
    chosen: CompiledTemplate, variables: dict[str, Any], marks: Marks, has_kwargs: bool
) -> str:
    """Return the template's output. What it refuses is the caller's mistake, as is what goes wrong in a template, or
    with ``chat_template_kwargs``, that came with the request; else the template is at fault."""
    try:
        seconds = REQUEST_SECONDS if chosen.from_request else MAX_SECONDS
        return render_bounded(chosen.template, variables, seconds)
    except TemplateRefusal as error:
        raise InvalidRequestError(
            "The model's chat template refuses the conversation: "
            + _shown(f"{error.message}{_custom_roles(variables['messages'])}", marks),
            param="messages",
        ) from error
    except FAILURES as error:
        reason = f"{type(error).__name__}: {_shown(error, marks)[:300]}"
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


def _shown(text: object, marks: Marks) -> str:
    return unmark(unmark(str(text), marks.guard), marks.end)


def _custom_roles(messages: Sequence[Mapping[str, Any]]) -> str:
    """Name the first role that is none of the usual ones, which is likely what a template refuses."""
    for index, message in enumerate(messages):
        if message["role"] not in ROLES:
            near = suggestion(message["role"], list(ROLES))
            return f" (messages[{index}].role is {message['role']!r}.{near})"
    return ""


def check_custom_roles(messages: Sequence[Message], marked: str, marks: Marks) -> None:
    """Refuse messages of roles that the template does not know and therefore leaves out.

    Raises InvalidRequestError."""
    if all(message.role in ROLES for message in messages):
        return
    text = _shown(marked, marks)
    for index, message in enumerate(messages):
        if message.role in ROLES:
            continue
        word = max(re.findall(r"\w+", message.text), key=len, default="")
        if word not in text:
            near = suggestion(message.role, list(ROLES))
            raise InvalidRequestError(
                f"The model's chat template leaves out messages[{index}], whose role {message.role!r} it does not "
                f"know; use one that it knows.{near}",
                param=f"messages[{index}].role",
            )


def checked_kwargs(given: Mapping[str, Any], special: Mapping[str, str]) -> dict[str, Any]:
    """Return ``chat_template_kwargs`` as plain data. Raises InvalidRequestError for reserved names and for
    ``special``, the names of special tokens."""
    param = "chat_template_kwargs"
    plain = plain_data(dict(given), param)
    for name in plain:
        if name in RESERVED_KWARGS or name in special or name.startswith(("_", "sensorium")):
            raise InvalidRequestError(
                f"chat_template_kwargs may not set {name!r}, which has a meaning of its own.",
                param=f"{param}.{name}",
            )
    return dict(plain)
