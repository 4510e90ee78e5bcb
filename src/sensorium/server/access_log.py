"""Code and parameter of an error in the access log, without any content of the request."""

from __future__ import annotations

import re

from starlette.types import Scope

from sensorium.compat.fields import FIELD_RULES
from sensorium.errors import SensoriumError
from sensorium.server.anthropic.protocol import (
    ChatChoice,
    CountBody,
    MessagesBody,
    OutputConfig,
    OutputFormat,
    Thinking,
)
from sensorium.server.openai.protocol import (
    BatchBody,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    JsonSchema,
    RerankBody,
    ResponseFormat,
    ScoreBody,
    StreamOptions,
    TokenizeBody,
    TranscriptionBody,
)
from sensorium.server.responses.protocol import (
    InputTokensBody,
    Reasoning,
    ResponsesBody,
    TextConfig,
    TextFormat,
)

LOGGED_ERROR = "logged_error"
"""Key of a request's state: code and parameter of its error."""

_BODIES = (
    *(ChatBody, CompletionBody, EmbeddingBody, TokenizeBody, DetokenizeBody, BatchBody),
    *(StreamOptions, ResponseFormat, JsonSchema, ScoreBody, RerankBody, TranscriptionBody),
    *(ResponsesBody, InputTokensBody, TextConfig, TextFormat, Reasoning),
    *(MessagesBody, CountBody, ChatChoice, OutputConfig, OutputFormat, Thinking),
)
_PARTS = """
    role content type text image_url input_image image_embeds image_pil video video_url
    audio_url input_audio
    audio_embeds video_embeds url detail data format uuid refusal tool_calls tool_call_id
    id function name arguments
    parameters strict schema json regex choice grammar json_object whitespace image audio num_frames
    fps file allowed_tools mode
    output call_id summary source media_type input_schema tool_use_id thinking
    limit order after response_id
    file_id file_data file_url filename input_file purpose expires_after
""".split()
_KNOWN = {*FIELD_RULES, *_PARTS, *(name for body in _BODIES for name in body.model_fields)}
_STEP = re.compile(r"([A-Za-z_]\w*)((?:\[\d+\])*)", re.ASCII)
_DEEPEST = 8


def record_error(scope: Scope, error: SensoriumError) -> None:
    """Keep the code and the parameter of an error for the access log."""
    scope.setdefault("state", {})[LOGGED_ERROR] = (error.code, redacted_param(error.param))


def error_of(scope: Scope) -> str:
    """Return the end of a line of the access log: ``code=`` and ``param=`` of an error, if any."""
    code, place = scope.get("state", {}).get(LOGGED_ERROR, (None, None))
    words = ([f"code={code}"] if code else []) + ([f"param={place}"] if place else [])
    return "".join(f" {word}" for word in words)


def redacted_param(param: str | None) -> str | None:
    """Return a parameter with ``*`` in place of names that are not the API's."""
    if param is None:
        return None
    steps = param.split(".")
    known = [_safe_step(step) for step in steps[:_DEEPEST]]
    return ".".join([*known, "*"] if len(steps) > _DEEPEST else known)


def _safe_step(step: str) -> str:
    found = _STEP.fullmatch(step)
    return step if found is not None and found[1] in _KNOWN and len(step) <= 64 else "*"
