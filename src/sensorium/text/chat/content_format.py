"""Trial of a chat template on a plain message, to find the form of content that it takes.

Its source alone can mislead: a template may loop over the content of tool results, but expect that
of users to be a string. So the form found in the source is tried once, at compilation.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, Literal

import jinja2

from sensorium.text.chat.sandbox import TemplateRefusal, render_bounded

logger = logging.getLogger("sensorium.text")

ContentFormat = Literal["string", "openai"]
FAILURES = (
    *(jinja2.TemplateError, ArithmeticError, LookupError, RuntimeError),
    *(AttributeError, MemoryError, TypeError, ValueError),
)
"""Exceptions of a template that fails: of Jinja, of its bounds, and of Python expressions."""

_TEXT = "sensorium tries this template"
_PART_AS_TEXT = re.compile(rf"""['"]text['"]\s*:\s*['"]{_TEXT}""")
"""A part that a template wrote as a Python literal instead of its text."""

_SECONDS = 2.0


def working_format(
    template: jinja2.Template, found: ContentFormat, variables: Mapping[str, Any]
) -> ContentFormat:
    """Return ``found``, or the other form when a plain message renders in that form only.

    ``variables`` are the special tokens that templates write. A template that renders a plain
    message in neither form keeps ``found``.
    """
    other: ContentFormat = "string" if found == "openai" else "openai"
    for candidate in (found, other):
        if _renders(template, candidate, variables):
            return candidate
    return found


def warn_if_broken(
    template: jinja2.Template, content_format: ContentFormat, variables: Mapping[str, Any]
) -> None:
    """Log a warning for a template that fails, rather than refuses, on a plain message."""
    try:
        _rendered(template, content_format, variables)
    except TemplateRefusal:
        pass
    except FAILURES as error:
        logger.warning(
            "the chat template fails on a plain user message (%s: %.200s); chat requests will fail "
            "with 422 until it is replaced with --chat-template",
            type(error).__name__,
            error,
        )


def _renders(
    template: jinja2.Template, content_format: ContentFormat, variables: Mapping[str, Any]
) -> bool:
    try:
        text = _rendered(template, content_format, variables)
    except FAILURES:
        return False
    return _TEXT in text and _PART_AS_TEXT.search(text) is None


def _rendered(
    template: jinja2.Template, content_format: ContentFormat, variables: Mapping[str, Any]
) -> str:
    parts = [{"type": "text", "text": _TEXT}]
    content = parts if content_format == "openai" else _TEXT
    values = {
        **variables,
        "documents": None,
        "messages": [{"role": "user", "content": content}],
        "tools": None,
        "add_generation_prompt": True,
    }
    return render_bounded(template, values, _SECONDS)
