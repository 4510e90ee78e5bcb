"""The knobs of one request, validated when built."""

from __future__ import annotations

import dataclasses
import enum
import math
import reprlib
from dataclasses import dataclass, field
from typing import Any, NoReturn

from sensorium.errors import InvalidRequestError

MAX_NUM_SAMPLES = 16384
MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_STOP_LENGTH = 1024
MAX_LIST_LENGTH = 65536
MAX_DIMENSIONS = 1 << 20

CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object")
"""The fields of ``StructuredOutputs`` that say what the text must be."""

WHITESPACE = ("compact", "none", "flexible")


class RequestOutputKind(enum.StrEnum):
    """What each output of ``AsyncLLM.generate`` holds: all so far, what is new, or all, once, at the end."""

    CUMULATIVE = "cumulative"
    DELTA = "delta"
    FINAL_ONLY = "final_only"


@dataclass(frozen=True, slots=True)
class StructuredOutputs:
    """A constraint on the generated text; exactly one of the first five fields is set.

    ``json`` is a JSON schema (dict or text), ``regex`` a regular expression, ``choice`` a list of texts, ``grammar`` a
    Lark grammar, ``json_object`` any JSON object. The others say how JSON is constrained. whitespace: "compact" (at
    most one blank after a colon or a comma), "none", or "flexible" (up to 40 blanks and line ends at every gap);
    whitespace_pattern: a regular expression for the gaps instead. unsupported: "relax" leaves out what a grammar cannot
    express and says so in ``RequestOutput.warnings``, "refuse" is an error. vLLM's disable_any_whitespace means
    whitespace "none"; its disable_additional_properties is accepted: objects that list properties are closed anyway.
    """

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool = False
    whitespace: str = "compact"
    whitespace_pattern: str | None = None
    unsupported: str = "relax"
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.choice, list):
            object.__setattr__(self, "choice", tuple(self.choice))
        self._check_options()
        given = [name for name in CONSTRAINTS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            _bad(
                "structured_outputs",
                f"needs exactly one of {', '.join(CONSTRAINTS)}; got {given or 'none'}",
            )
        if self.choice is not None and (
            not isinstance(self.choice, tuple)
            or not self.choice
            or not all(isinstance(c, str) and c for c in self.choice)
        ):
            _bad("structured_outputs.choice", "must be a non-empty list of non-empty strings")
        for choice in self.choice or ():
            _check_unicode("structured_outputs.choice", choice)
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                _bad(
                    f"structured_outputs.{name}", f"must be a non-empty string, got {_shown(value)}"
                )
            if value is not None:
                _check_unicode(f"structured_outputs.{name}", value)
        if self.json is not None and not isinstance(self.json, dict | str):
            _bad("structured_outputs.json", "must be a JSON schema as an object or a string")

    def _check_options(self) -> None:
        for name in ("json_object", "disable_any_whitespace", "disable_additional_properties"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                _bad(f"structured_outputs.{name}", f"must be true or false, got {_shown(value)}")
        for name, known in (("whitespace", WHITESPACE), ("unsupported", ("relax", "refuse"))):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                _bad(
                    f"structured_outputs.{name}",
                    f"must be one of {', '.join(known)}, got {_shown(value)}",
                )
        if self.disable_any_whitespace:
            object.__setattr__(self, "whitespace", "none")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    All values are checked on construction; a wrong one raises ``InvalidRequestError`` that names the field. Lists are
    kept as tuples, so an instance can be shared between requests.

    n: samples per prompt. temperature: 0 is greedy. top_k: 0 or -1 keeps all. seed: makes the tokens of the request a
    function of the seed alone, whatever else is in the batch. max_tokens: None generates up to the context's end.
    min_tokens: end-of-sequence, stop tokens and stop strings do not count before. logprobs / prompt_logprobs: how many
    alternatives to report (0: the chosen token only). logit_bias: token id → value added to its logit. output_kind:
    what each output of ``AsyncLLM`` holds, as ``RequestOutputKind`` or its value; ``LLM`` has whole ones.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputs | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        self._normalize()
        _check_int("n", self.n, 1, MAX_NUM_SAMPLES)
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_float("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_int("top_k", self.top_k, -1, 1 << 31)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _check_int("seed", self.seed, -(1 << 63), (1 << 64) - 1)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, 1 << 31)
        _check_int("min_tokens", self.min_tokens, 0, 1 << 31)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _bad("min_tokens", f"is {self.min_tokens}, more than max_tokens ({self.max_tokens})")
        _check_float("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_float("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_float("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _check_int(name, getattr(self, name), 0, MAX_LOGPROBS)
        self._check_lists()
        for name in (
            "ignore_eos",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "include_stop_str_in_output",
        ):
            if not isinstance(getattr(self, name), bool):
                _bad(name, f"must be true or false, got {_shown(getattr(self, name))}")

    def _normalize(self) -> None:
        """Lists become tuples, a single stop string a tuple of one, string keys of logit_bias integers."""
        put = object.__setattr__
        if isinstance(self.stop, str):
            put(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids", "bad_words"):
            value = getattr(self, name)
            if value is None:
                put(self, name, ())
            elif isinstance(value, list):
                put(self, name, tuple(value))
        if isinstance(self.allowed_token_ids, list):
            put(self, "allowed_token_ids", tuple(self.allowed_token_ids))
        if self.logit_bias is None:
            put(self, "logit_bias", {})
        if isinstance(self.logit_bias, dict):
            try:
                put(self, "logit_bias", {_token_id(k): v for k, v in self.logit_bias.items()})
            except (TypeError, ValueError) as error:
                _bad("logit_bias", f"has the key {error}; keys must be token ids (integers)")
        if isinstance(self.structured_outputs, dict):
            try:
                put(self, "structured_outputs", StructuredOutputs(**self.structured_outputs))
            except TypeError:
                names = [f.name for f in dataclasses.fields(StructuredOutputs)]
                _bad("structured_outputs", f"has an unknown field; known are {names}")

        try:
            put(self, "output_kind", RequestOutputKind(self.output_kind))
        except ValueError:
            kinds = [str(kind) for kind in RequestOutputKind]
            _bad("output_kind", f"must be one of {kinds}, got {_shown(self.output_kind)}")

    def _check_lists(self) -> None:
        _check_strings("stop", self.stop, MAX_STOPS, MAX_STOP_LENGTH)
        _check_strings("bad_words", self.bad_words, MAX_LIST_LENGTH, MAX_STOP_LENGTH)
        _check_ids("stop_token_ids", self.stop_token_ids)
        if self.allowed_token_ids is not None:
            _check_ids("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                _bad("allowed_token_ids", "is empty: no token could be generated")
        if not isinstance(self.logit_bias, dict):
            _bad(
                "logit_bias",
                f"must be a mapping of token id to number, got {_shown(self.logit_bias)}",
            )
        if len(self.logit_bias) > MAX_LIST_LENGTH:
            _bad(
                "logit_bias",
                f"has {len(self.logit_bias)} entries; at most {MAX_LIST_LENGTH} are allowed",
            )
        for key, value in self.logit_bias.items():
            if key < 0:
                _bad(f"logit_bias[{key}]", "is not for a token id, which is an integer from 0")
            _check_float(f"logit_bias[{key}]", value, -100.0, 100.0)
        if self.structured_outputs is not None and not isinstance(
            self.structured_outputs, StructuredOutputs
        ):
            _bad("structured_outputs", "must be a StructuredOutputs or a dict of its fields")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed, validated anew."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, slots=True)
class PoolingParams:
    """What vector is made of a prompt.

    All values are checked on construction; a wrong one raises ``InvalidRequestError`` that names the field.

    dimensions: keep this many of the first numbers, for models that were trained for it (Matryoshka); None keeps all.
    normalize: scale the vector, after it was cut, to length 1; None does as the model's files say (and to length 1
    where they say nothing).
    """

    dimensions: int | None = None
    normalize: bool | None = None

    def __post_init__(self) -> None:
        if self.dimensions is not None:
            _check_int("dimensions", self.dimensions, 1, MAX_DIMENSIONS)
        if self.normalize is not None and not isinstance(self.normalize, bool):
            _bad("normalize", f"must be true or false, got {_shown(self.normalize)}")

    def replace(self, **changes: Any) -> PoolingParams:
        """A copy with some fields changed, validated anew."""
        return dataclasses.replace(self, **changes)


def _bad(name: str, what: str) -> NoReturn:
    raise InvalidRequestError(f"{name} {what}.", param=name)


def _shown(value: object) -> str:
    """A value in an error message: what a caller sent may be of any size."""
    try:
        return reprlib.repr(value)
    except ValueError:  # an integer of more digits than Python writes out
        return f"a very large {type(value).__name__}"


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        _bad(name, f"must be an integer, got {_shown(value)}")
    if not low <= value <= high:
        _bad(name, f"must be between {low} and {high}, got {_shown(value)}")


def _check_float(
    name: str, value: object, low: float, high: float, *, low_open: bool = False
) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        _bad(name, f"must be a number, got {_shown(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        _bad(name, f"must be a finite number, got {value}")
    if not low <= value <= high or (low_open and value == low):
        _bad(
            name,
            f"must be {'above' if low_open else 'at least'} {low:g} and at most {high:g}, "
            f"got {_shown(value)}",
        )


def _check_strings(name: str, values: object, most: int, longest: int) -> None:
    if not isinstance(values, tuple) or not all(isinstance(v, str) for v in values):
        _bad(name, f"must be a string or a list of strings, got {_shown(values)}")
    if len(values) > most:
        _bad(name, f"has {len(values)} entries; at most {most} are allowed")
    for value in values:
        if not value:
            _bad(name, "has an empty string, which would match everywhere")
        if len(value) > longest:
            _bad(name, f"has an entry of {len(value)} characters; at most {longest} are allowed")
        _check_unicode(name, value)


def _check_unicode(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        _bad(name, "holds a lone surrogate, which is no valid Unicode")


def _token_id(key: object) -> int:
    """Read a key of ``logit_bias``. Raises ValueError with the key when it is no integer."""
    try:
        return int(key)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        raise ValueError(_shown(key)) from None


def _check_ids(name: str, values: object) -> None:
    if not isinstance(values, tuple):
        _bad(name, f"must be a list of token ids, got {_shown(values)}")
    if len(values) > MAX_LIST_LENGTH:
        _bad(name, f"has {len(values)} entries; at most {MAX_LIST_LENGTH} are allowed")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            _bad(name, f"must hold token ids (integers from 0), got {_shown(value)}")
