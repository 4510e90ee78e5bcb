"""What the access log says of a request that was refused: the code, and the place in the body, never its content."""

from __future__ import annotations

import re

from starlette.types import Scope

from sensorium.compat.fields import FIELD_RULES
from sensorium.errors import SensoriumError
from sensorium.server.openai.protocol import (
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    JsonSchema,
    ResponseFormat,
    StreamOptions,
    TokenizeBody,
)

REFUSAL = "refusal"
"""Where the state of a request keeps (code, place) of its error."""

_BODIES = (
    *(ChatBody, CompletionBody, EmbeddingBody, TokenizeBody, DetokenizeBody),
    *(StreamOptions, ResponseFormat, JsonSchema),
)
_PARTS = """
    role content type text image_url input_image image_embeds image_pil video video_url audio_url input_audio
    audio_embeds video_embeds url detail data format uuid refusal tool_calls tool_call_id id function name arguments
    parameters strict schema json regex choice grammar json_object whitespace image audio num_frames fps file
""".split()
_KNOWN = {*FIELD_RULES, *_PARTS, *(name for body in _BODIES for name in body.model_fields)}
_STEP = re.compile(r"([A-Za-z_]\w*)((?:\[\d+\])*)", re.ASCII)
_DEEPEST = 8


def note_refusal(scope: Scope, error: SensoriumError) -> None:
    """Keep what the access log is to say of an error."""
    scope.setdefault("state", {})[REFUSAL] = (error.code, safe_place(error.param))


def refusal_of(scope: Scope) -> str:
    """Return the end of the request's line in the log; empty for one that was not refused."""
    code, place = scope.get("state", {}).get(REFUSAL, (None, None))
    words = ([f"code={code}"] if code else []) + ([f"param={place}"] if place else [])
    return "".join(f" {word}" for word in words)


def safe_place(param: str | None) -> str | None:
    """Return a place in a body with names that the API has; names that a client made up become ``*``."""
    if param is None:
        return None
    steps = param.split(".")
    shown = [_safe_step(step) for step in steps[:_DEEPEST]]
    return ".".join([*shown, "*"] if len(steps) > _DEEPEST else shown)


def _safe_step(step: str) -> str:
    found = _STEP.fullmatch(step)
    return step if found is not None and found[1] in _KNOWN and len(step) <= 64 else "*"
