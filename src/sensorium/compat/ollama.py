"""Request fields of Ollama, which front ends such as Open WebUI send to every server.

They are options of a model in their pages; without these rules a value that somebody has set there
once would be an unknown field in each request.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sensorium.compat.rule import Rule, ignored, refused, same
from sensorium.errors import InvalidRequestError


def _thinking(value: Any) -> Mapping[str, Any]:
    """Return our fields for ``think``: a switch, or how much."""
    if isinstance(value, bool):
        return {"chat_template_kwargs": {"enable_thinking": value}}
    return {"reasoning_effort": value}


def _length(value: Any) -> Mapping[str, Any]:
    """Return our field for ``num_predict``, in which -1 and -2 stand for no limit."""
    return {} if value in (-1, -2) else {"max_tokens": value}


def _form(value: Any) -> Mapping[str, Any]:
    """Return our field for ``format``: ``json``, or a JSON schema. Raises InvalidRequestError."""
    if value == "json":
        return {"response_format": {"type": "json_object"}}
    if isinstance(value, dict):
        named = {"name": "format", "schema": value}
        return {"response_format": {"type": "json_schema", "json_schema": named}}
    if value == "":
        return {}
    raise InvalidRequestError(
        f"format must be 'json' or a JSON schema, got {value!r:.80}.", param="format"
    )


OLLAMA_RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        same(
            "repeat_penalty",
            "repetition_penalty",
            lambda value: {"repetition_penalty": value},
            "tokens that were there are less likely",
        ),
        same("num_predict", "max_tokens", _length, "most tokens of the answer"),
        same(
            "think",
            "chat_template_kwargs.enable_thinking",
            _thinking,
            "thinks or not; reasoning_effort for low, medium and high",
        ),
        same("format", "response_format", _form, "the answer is JSON"),
        *ignored(
            "how long a context is, how it is computed and what stays in memory is decided at start",
            num_ctx=None,
            num_keep=None,
            num_batch=None,
            num_thread=None,
            num_gpu=None,
            use_mmap=None,
            use_mlock=None,
            keep_alive=None,
        ),
        *ignored("repetition_penalty looks at the prompt and the whole answer", repeat_last_n=None),
        *ignored("mirostat itself is refused", mirostat_eta=None, mirostat_tau=None),
        *refused("use temperature, top_p and min_p", mirostat=0, tfs_z=1.0),
    )
}
