"""Parameters of one request: sampling, structured outputs, pooling. Validated on construction."""

from __future__ import annotations

import dataclasses
import enum
import os
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

from sensorium.bounds import Bounds, abbreviate, bounded, wrong_number
from sensorium.errors import InvalidRequestError

MAX_NUM_SAMPLES = 16384
MAX_LOGPROBS = 20
MAX_STOPS = 64
MAX_STOP_LENGTH = 1024
MAX_LIST_LENGTH = 65536
MAX_DIMENSIONS = 1 << 20
LOGIT_BIAS = Bounds(ge=-100.0, le=100.0)

CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
"""The fields of ``StructuredOutputs`` that say what the text must be."""

WHITESPACE = ("compact", "none", "flexible")


class RequestOutputKind(enum.StrEnum):
    """Content of each output of ``AsyncLLM.generate``.

    Attributes:
        CUMULATIVE: everything so far.
        DELTA: what is new.
        FINAL_ONLY: everything, once, at the end.
    """

    CUMULATIVE = "cumulative"
    DELTA = "delta"
    FINAL_ONLY = "final_only"


@dataclass(frozen=True, slots=True)
class StructuredOutputs:
    """A constraint on the generated text; exactly one of the first six attributes is set.

    Attributes:
        json: JSON schema, as an object or a string.
        regex: regular expression.
        choice: list of the possible texts.
        grammar: Lark grammar.
        json_object: any JSON object.
        structural_tag: fixed text, JSON and free text in an order, as an object or a string of JSON
            (xgrammar's and vLLM's structural tags).
        whitespace: "compact" (at most one blank after a colon or a comma), "none", or "flexible"
            (up to 40 blanks and line ends at every gap).
        whitespace_pattern: regular expression for the gaps, instead of ``whitespace``.
        unsupported: what to do with parts of a schema that a grammar cannot express: "relax" leaves
            them out and reports them in ``RequestOutput.warnings``; "refuse" is an error.
        disable_any_whitespace: vLLM's spelling of ``whitespace="none"``.
        disable_additional_properties: vLLM's; accepted, as objects that list properties are closed
            in any case.
    """

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: tuple[str, ...] | None = None
    grammar: str | None = None
    json_object: bool = False
    structural_tag: dict[str, Any] | str | None = None
    whitespace: str = "compact"
    whitespace_pattern: str | None = None
    unsupported: str = "relax"
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False

    def __post_init__(self) -> None:
        """Normalize and check the values. Raises InvalidRequestError."""
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
                    f"structured_outputs.{name}",
                    f"must be a non-empty string, got {abbreviate(value)}",
                )
            if value is not None:
                _check_unicode(f"structured_outputs.{name}", value)
        if self.json is not None and not isinstance(self.json, dict | str):
            _bad("structured_outputs.json", "must be a JSON schema as an object or a string")
        if self.structural_tag is not None and not isinstance(self.structural_tag, dict | str):
            _bad(
                "structured_outputs.structural_tag",
                "must be a structural tag as an object or a string of JSON",
            )

    def _check_options(self) -> None:
        for name in ("json_object", "disable_any_whitespace", "disable_additional_properties"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                _bad(
                    f"structured_outputs.{name}", f"must be true or false, got {abbreviate(value)}"
                )
        for name, known in (("whitespace", WHITESPACE), ("unsupported", ("relax", "refuse"))):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in known:
                _bad(
                    f"structured_outputs.{name}",
                    f"must be one of {', '.join(known)}, got {abbreviate(value)}",
                )
        if self.disable_any_whitespace:
            object.__setattr__(self, "whitespace", "none")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling and stopping of one request.

    Lists are kept as tuples, so an instance can be shared between requests.

    Attributes:
        n: number of samples per prompt.
        temperature: 0 is greedy.
        top_p: keep the most likely tokens whose probabilities add up to this.
        top_k: keep this many of the most likely tokens; 0 or -1 keeps all.
        min_p: keep tokens at least this likely, relative to the most likely one.
        seed: makes the tokens of the request a function of the seed alone, whatever else is in the
            batch.
        max_tokens: maximum number of generated tokens; None generates up to the end of the context.
        min_tokens: end-of-sequence, stop tokens and stop strings do not count before.
        stop: a string, or at most 64, that end the text; they are not part of it.
        stop_token_ids: token ids that end the text.
        ignore_eos: continue after the end-of-sequence token.
        presence_penalty: subtracted from the logits of generated tokens.
        frequency_penalty: the same, times the number of occurrences.
        repetition_penalty: divides positive logits of tokens of the prompt and the text, and
            multiplies negative ones.
        logit_bias: added to the logits of token ids, -100 to 100.
        allowed_token_ids: the only token ids that may be generated.
        bad_words: texts that must not be generated.
        logprobs: number of alternatives to report per token; 0: the chosen token only.
        prompt_logprobs: the same for the tokens of the prompt.
        skip_special_tokens: leave special tokens out of the text.
        spaces_between_special_tokens: put spaces between special tokens that are part of the text.
        include_stop_str_in_output: keep the stop string at the end of the text.
        structured_outputs: constraint on the text, as an object or a dict of its fields.
        output_kind: content of each output of ``AsyncLLM``, as ``RequestOutputKind`` or its value;
            ``LLM`` always returns everything.
        prediction: a text that much of the answer is expected to repeat, such as the file that is
            edited; with ``speculative`` its tokens are tried. The answer is the same without it.

    Raises:
        InvalidRequestError: a value is wrong; ``param`` names the attribute.
    """

    n: int = bounded(1, ge=1, le=MAX_NUM_SAMPLES)
    temperature: float = bounded(1.0, ge=0.0, le=100.0)
    top_p: float = bounded(1.0, gt=0.0, le=1.0)
    top_k: int = bounded(0, ge=-1, le=1 << 31)
    min_p: float = bounded(0.0, ge=0.0, le=1.0)
    seed: int | None = bounded(None, ge=-(1 << 63), le=(1 << 64) - 1)
    max_tokens: int | None = bounded(16, ge=1, le=1 << 31)
    min_tokens: int = bounded(0, ge=0, le=1 << 31)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = bounded(0.0, ge=-2.0, le=2.0)
    frequency_penalty: float = bounded(0.0, ge=-2.0, le=2.0)
    repetition_penalty: float = bounded(1.0, ge=0.01, le=100.0)
    logit_bias: dict[int, float] = field(default_factory=dict)
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    logprobs: int | None = bounded(None, ge=0, le=MAX_LOGPROBS)
    prompt_logprobs: int | None = bounded(None, ge=0, le=MAX_LOGPROBS)
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    structured_outputs: StructuredOutputs | None = None
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    prediction: str | None = None

    def __post_init__(self) -> None:
        """Normalize and check the values. Raises InvalidRequestError."""
        self._normalize()
        _check_numbers(self)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            _bad("min_tokens", f"is {self.min_tokens}, more than max_tokens ({self.max_tokens})")
        self._check_lists()
        for name in (
            "ignore_eos",
            "skip_special_tokens",
            "spaces_between_special_tokens",
            "include_stop_str_in_output",
        ):
            if not isinstance(getattr(self, name), bool):
                _bad(name, f"must be true or false, got {abbreviate(getattr(self, name))}")

    def _normalize(self) -> None:
        """Turn lists into tuples, a stop string into a tuple, keys of logit_bias into integers."""
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
            _bad("output_kind", f"must be one of {kinds}, got {abbreviate(self.output_kind)}")

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
                f"must be a mapping of token id to number, got {abbreviate(self.logit_bias)}",
            )
        if len(self.logit_bias) > MAX_LIST_LENGTH:
            _bad(
                "logit_bias",
                f"has {len(self.logit_bias)} entries; at most {MAX_LIST_LENGTH} are allowed",
            )
        for key, value in self.logit_bias.items():
            if key < 0:
                _bad(f"logit_bias[{key}]", "is not for a token id, which is an integer from 0")
            problem = LOGIT_BIAS.problem(value)
            if problem is not None:
                _bad(f"logit_bias[{key}]", problem)
        if self.prediction is not None:
            if not isinstance(self.prediction, str):
                _bad("prediction", f"must be a text, got {abbreviate(self.prediction)}")
            _check_unicode("prediction", self.prediction)
        if self.structured_outputs is not None and not isinstance(
            self.structured_outputs, StructuredOutputs
        ):
            _bad("structured_outputs", "must be a StructuredOutputs or a dict of its fields")

    @property
    def greedy(self) -> bool:
        """True if the most likely token is always chosen."""
        return self.temperature == 0.0

    def replace(self, **changes: Any) -> SamplingParams:
        """Return a copy with some attributes changed. Raises InvalidRequestError."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, slots=True)
class PoolingParams:
    """The embedding of one prompt.

    Attributes:
        dimensions: length of the embedding, for models that were trained for shorter ones
            (Matryoshka); None is the full length.
        normalize: scale the embedding, after it was cut, to length 1; None follows the model's
            files, and scales where they do not say.

    Raises:
        InvalidRequestError: a value is wrong; ``param`` names the attribute.
    """

    dimensions: int | None = bounded(None, ge=1, le=MAX_DIMENSIONS)
    normalize: bool | None = None

    def __post_init__(self) -> None:
        """Normalize and check the values. Raises InvalidRequestError."""
        _check_numbers(self)
        if self.normalize is not None and not isinstance(self.normalize, bool):
            _bad("normalize", f"must be true or false, got {abbreviate(self.normalize)}")

    def replace(self, **changes: Any) -> PoolingParams:
        """Return a copy with some attributes changed. Raises InvalidRequestError."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """The LoRA adapter that a prompt runs with.

    Attributes:
        lora_name: Its name; two adapters have different names.
        lora_int_id: vLLM's number of it; accepted and not used.
        lora_path: Folder in PEFT's layout, or a Hugging Face id. It is loaded at its first use;
            empty for one that is loaded already (``lora_modules``).

    Raises:
        InvalidRequestError: a value is wrong; ``param`` names the attribute.
    """

    lora_name: str
    lora_int_id: int | None = None
    lora_path: str = ""

    def __post_init__(self) -> None:
        """Check the values. Raises InvalidRequestError."""
        if not isinstance(self.lora_name, str) or not self.lora_name.strip():
            _bad("lora_name", f"must be a non-empty string, got {abbreviate(self.lora_name)}")
        path = self.lora_path
        if not isinstance(path, str | os.PathLike):
            _bad("lora_path", f"must be a path, got {abbreviate(path)}")
        object.__setattr__(self, "lora_path", os.fspath(path))


def _bad(name: str, what: str) -> NoReturn:
    raise InvalidRequestError(f"{name} {what}.", param=name)


def _check_numbers(params: SamplingParams | PoolingParams) -> None:
    wrong = wrong_number(params)
    if wrong is not None:
        _bad(*wrong)


def _check_strings(name: str, values: object, most: int, longest: int) -> None:
    if not isinstance(values, tuple) or not all(isinstance(v, str) for v in values):
        _bad(name, f"must be a string or a list of strings, got {abbreviate(values)}")
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
        _bad(name, "contains a lone surrogate, which is not valid Unicode")


def _token_id(key: object) -> int:
    """Return a key of ``logit_bias`` as an integer. Raises ValueError with the key."""
    try:
        return int(cast(Any, key))
    except (TypeError, ValueError):
        raise ValueError(abbreviate(key)) from None


def _check_ids(name: str, values: object) -> None:
    if not isinstance(values, tuple):
        _bad(name, f"must be a list of token ids, got {abbreviate(values)}")
    if len(values) > MAX_LIST_LENGTH:
        _bad(name, f"has {len(values)} entries; at most {MAX_LIST_LENGTH} are allowed")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            _bad(name, f"must hold token ids (integers from 0), got {abbreviate(value)}")
