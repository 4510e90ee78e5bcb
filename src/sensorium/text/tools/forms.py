"""Forms of calls and of reasoning by the families that write them, and how to know a family's.

Names are vLLM's where it has one (``--tool-call-parser``, ``--reasoning-parser``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from sensorium.config import suggestion
from sensorium.errors import ConfigError
from sensorium.text.tokenizer import Tokenizer
from sensorium.text.tools.deltas import CallSink, short_call_id
from sensorium.text.tools.json_calls import json_calls, named_call
from sensorium.text.tools.marked_calls import (
    DEEPSEEK_BEGIN,
    DEEPSEEK_END,
    KIMI_BEGIN,
    KIMI_END,
    deepseek_calls,
    kimi_calls,
)
from sensorium.text.tools.pythonic import python_calls
from sensorium.text.tools.reader import Body, CallSyntax
from sensorium.text.tools.source import Reading, Source
from sensorium.text.tools.xml_calls import function_call, keyed_call

AUTO, NONE = "auto", "none"


def _tool_call(source: Source, sink: CallSink, *, is_bare: bool) -> Reading[bool]:
    """Read what follows ``<tool_call>``: JSON, ``<function=…>``, or a name with keys and values."""
    yield from source.blanks()
    char = yield from source.peek()
    if char in ("{", "["):
        return (yield from json_calls(source, sink, is_bare=is_bare))
    if char == "<":
        return (yield from function_call(source, sink, opened=False))
    return (yield from keyed_call(source, sink))


def _mistral(source: Source, sink: CallSink, *, is_bare: bool) -> Reading[bool]:
    yield from source.blanks()
    if (yield from source.peek()) in ("{", "["):
        return (yield from json_calls(source, sink, is_bare=is_bare))
    return (yield from named_call(source, sink, is_bare=is_bare))


def _function(source: Source, sink: CallSink, *, is_bare: bool) -> Reading[bool]:
    return (yield from function_call(source, sink, opened=True))


def _listed(source: Source, sink: CallSink, *, is_bare: bool) -> Reading[bool]:
    """Read what follows ``functools``: a list."""
    if (yield from source.peek()) != "[":
        return False
    return (yield from json_calls(source, sink, is_bare=is_bare))


def _deepseek(source: Source, sink: CallSink, *, is_bare: bool) -> Reading[bool]:
    return (yield from deepseek_calls(source, sink))


def _kimi(source: Source, sink: CallSink, *, is_bare: bool) -> Reading[bool]:
    return (yield from kimi_calls(source, sink))


_HERMES: dict[str, Body] = {"<tool_call>": _tool_call, "<tool_calls>": json_calls}
_LLAMA: dict[str, Body] = {"<|python_tag|>": json_calls}
_MISTRAL: dict[str, Body] = {"[TOOL_CALLS]": _mistral}
_PHI: dict[str, Body] = {"<|tool_call|>": json_calls, "functools": _listed}
_PYTHON: dict[str, Body] = {"<|python_start|>": python_calls}
_XML: dict[str, Body] = {"<tool_call>": _tool_call, "<function=": _function}
_DEEPSEEK: dict[str, Body] = {DEEPSEEK_BEGIN: _deepseek}
_KIMI: dict[str, Body] = {KIMI_BEGIN: _kimi}
_INTERNLM: dict[str, Body] = {"<|action_start|><|plugin|>": json_calls}
_JSON_CALL = '{"name": "NAME", "arguments": '
_HERMES_ENDS = ("</tool_call>", "</tool_calls>")


@dataclass(frozen=True, slots=True)
class CallWriting:
    """Texts around the arguments of demanded calls.

    ``opening`` and ``closing`` stand around all calls, ``begin`` (with ``NAME`` for the name of the
    tool) and ``end`` around the arguments of each, ``separator`` between calls. ``tag``: the text
    that tells a call from other text; empty where none does. ``needs``: a text in the template or
    the vocabulary without which the model writes another form.
    """

    begin: str
    end: str
    separator: str = ""
    opening: str = ""
    closing: str = ""
    tag: str = ""
    needs: str = ""


@dataclass(frozen=True, slots=True)
class CallForm:
    """A form of calls.

    ``names``: its name, and others that mean the same. ``marks``: texts in a chat template, or
    tokens of the vocabulary, that show that the model writes it. ``writings``: the spellings of
    demanded calls, the first that fits; without any these are JSON.
    """

    names: tuple[str, ...]
    syntax: CallSyntax
    marks: tuple[str, ...] = ()
    writings: tuple[CallWriting, ...] = ()

    @property
    def name(self) -> str:
        """Return the name of the form."""
        return self.names[0]


ANY = CallForm(
    ("any",),
    CallSyntax(
        {**_XML, **_HERMES, **_LLAMA, **_MISTRAL, **_PHI, **_DEEPSEEK, **_KIMI, **_INTERNLM},
        (*_HERMES_ENDS, "</function>", "<|/tool_call|>", "<|action_end|>", DEEPSEEK_END),
        (json_calls, named_call),
    ),
)
"""All forms with tags, and JSON without: of a model whose own form is not known."""

CALL_FORMS: tuple[CallForm, ...] = (
    CallForm(
        ("qwen3_coder", "qwen3_xml", "step3p5"),
        CallSyntax(_XML, (*_HERMES_ENDS, "</function>")),
        ("<function=",),
    ),
    CallForm(
        ("glm45", "glm47"), CallSyntax({"<tool_call>": _tool_call}, _HERMES_ENDS), ("<arg_key>",)
    ),
    CallForm(
        ("deepseek_v3", "deepseek_v31"),
        CallSyntax(_DEEPSEEK, (DEEPSEEK_END,)),
        ("<｜tool▁calls▁begin｜>",),
        (
            CallWriting(
                "<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\n```json\n",
                "\n```<｜tool▁call▁end｜>",
                "\n",
                DEEPSEEK_BEGIN,
                DEEPSEEK_END,
                needs="```json",
            ),
            CallWriting(
                "<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>",
                "<｜tool▁call▁end｜>",
                "",
                DEEPSEEK_BEGIN,
                DEEPSEEK_END,
            ),
        ),
    ),
    CallForm(("kimi_k2",), CallSyntax(_KIMI, (KIMI_END,)), (KIMI_BEGIN,)),
    CallForm(
        ("mistral",),
        CallSyntax(_MISTRAL, (), (json_calls, named_call), short_call_id),
        ("[TOOL_CALLS]",),
        (
            CallWriting("[TOOL_CALLS]NAME[ARGS]", "", needs="[ARGS]"),
            CallWriting(_JSON_CALL, "}", ", ", "[TOOL_CALLS] [", "]", needs="[TOOL_CALLS] ["),
            CallWriting(_JSON_CALL, "}", ", ", "[TOOL_CALLS][", "]"),
        ),
    ),
    CallForm(
        ("llama4_pythonic", "pythonic"),
        CallSyntax(_PYTHON, ("<|python_end|>",), (python_calls,)),
        ("<|python_start|>", "[func_name1(params_name1=params_value1"),
    ),
    CallForm(
        ("hermes", "hunyuan_a13b", "jamba", "longcat"),
        CallSyntax(_HERMES, _HERMES_ENDS, (json_calls,)),
        ("<tool_call>", "<tool_calls>"),
        (
            CallWriting(
                f"<tool_call>\n{_JSON_CALL}",
                "}\n</tool_call>",
                "\n",
                tag="<tool_call>",
                needs="<tool_call>",
            ),
            CallWriting(_JSON_CALL, "}", ", ", "<tool_calls>[", "]</tool_calls>"),
        ),
    ),
    CallForm(
        ("phi4_mini_json", "granite"),
        CallSyntax(_PHI, ("<|/tool_call|>",), (json_calls,)),
        ("<|tool_call|>", "functools["),
        (
            CallWriting(_JSON_CALL, "}", ", ", "functools[", "]", needs="functools["),
            CallWriting(
                *(_JSON_CALL, "}", ", ", "<|tool_call|>[", "]<|/tool_call|>"),
                needs="<|/tool_call|>",
            ),
            CallWriting(_JSON_CALL, "}", ", ", "<|tool_call|>[", "]"),
        ),
    ),
    CallForm(
        ("internlm",), CallSyntax(_INTERNLM, ("<|action_end|>",), (json_calls,)), ("<|plugin|>",)
    ),
    CallForm(
        ("llama3_json", "llama4_json", "xlam"),
        CallSyntax(_LLAMA, (), (json_calls,)),
        ("<|python_tag|>", '"parameters": dictionary of argument name'),
        (CallWriting('{"name": "NAME", "parameters": ', "}", "; "),),
    ),
)
"""All forms that a name can choose; in this order a template or vocabulary is searched for them."""


@dataclass(frozen=True, slots=True)
class ReasoningForm:
    """Tags around reasoning.

    ``opened``: the model may leave out the first one without a template that writes it. ``marks``:
    texts in a chat template, besides the tags, that show that the model writes them.
    """

    names: tuple[str, ...]
    begin: str
    end: str
    opened: bool = False
    marks: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Return the name of the form."""
        return self.names[0]


REASONING_FORMS: tuple[ReasoningForm, ...] = (
    ReasoningForm(("mistral",), "[THINK]", "[/THINK]"),
    ReasoningForm(("kimi_vl",), "◁think▷", "◁/think▷"),
    ReasoningForm(("seed_oss",), "<seed:think>", "</seed:think>"),
    ReasoningForm(
        ("qwen3", "glm45", "hunyuan_a13b", "deepseek_v3", "ernie45", "holo2", "step3", "kimi_k2"),
        "<think>",
        "</think>",
        marks=("enable_thinking",),
    ),
    ReasoningForm(("deepseek_r1", "olmo3", "minimax_m2"), "<think>", "</think>", opened=True),
)
"""All forms of reasoning; in this order a template is searched for their tags."""

CALL_PARSERS = (AUTO, NONE, ANY.name, *(name for form in CALL_FORMS for name in form.names))
REASONING_PARSERS = (AUTO, NONE, *(name for form in REASONING_FORMS for name in form.names))


@dataclass(frozen=True, slots=True)
class AnswerForms:
    """The forms in which a model writes calls and reasoning; None where it is not looked for.

    ``call_ids`` and ``reasoning_ids``: special tokens that belong to them, shown in the text.
    ``begin_id`` and ``end_id``: the tokens around reasoning, where each tag is one. ``writing``:
    : the spelling of demanded calls.
    """

    calls: CallForm | None = ANY
    reasoning: ReasoningForm | None = None
    call_ids: frozenset[int] = frozenset()
    reasoning_ids: frozenset[int] = frozenset()
    begin_id: int | None = None
    end_id: int | None = None
    writing: CallWriting | None = None

    @classmethod
    def of(
        cls, template: str, tokenizer: Tokenizer, *, calls: str = AUTO, reasoning: str = AUTO
    ) -> AnswerForms:
        """Return the forms of a model.

        Args:
            template: The text of its chat templates.
            tokenizer: Its tokenizer, whose tokens tell where the template does not.
            calls: Name of the form of calls; ``auto`` looks for it, ``none`` reads no calls.
            reasoning: Name of the form of reasoning, likewise.

        Raises:
            ConfigError: A name is unknown.
        """
        check_parsers(calls, reasoning)
        form = _call_form(calls, template, tokenizer)
        thinking = _reasoning_form(reasoning, template)
        tags = () if form is None else _tags_of(form)
        ends = () if thinking is None else (thinking.begin, thinking.end)
        ids = [_token_id(tokenizer, tag) for tag in ends]
        return cls(
            form,
            thinking,
            call_ids=_special_ids(tokenizer, tags),
            reasoning_ids=_special_ids(tokenizer, ends),
            begin_id=ids[0] if ids else None,
            end_id=ids[1] if ids else None,
            writing=_writing(form, template, tokenizer),
        )

    def spelled(self, *, with_calls: bool) -> frozenset[int]:
        """Return the special tokens that an answer shows. ``with_calls``: it may call tools."""
        return self.reasoning_ids | self.call_ids if with_calls else self.reasoning_ids


_INNER_TAGS = (
    *("[ARGS]", "[CALL_ID]", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    *("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    *("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    *("<|action_start|>", "<|plugin|>"),
)


def _tags_of(form: CallForm) -> tuple[str, ...]:
    return (*form.syntax.openers, *form.syntax.closers, *form.marks, *_INNER_TAGS)


def check_parsers(calls: str, reasoning: str) -> None:
    """Raise ConfigError for a name that is no form of calls or of reasoning."""
    for flag, name, known in (
        ("tool_call_parser", calls, CALL_PARSERS),
        ("reasoning_parser", reasoning, REASONING_PARSERS),
    ):
        if name not in known:
            near = suggestion(name, list(known))
            raise ConfigError(
                f"{flag} must be one of {', '.join(dict.fromkeys(known))}; got {name!r:.80}.{near}",
                param=flag,
            )


def _call_form(name: str, template: str, tokenizer: Tokenizer) -> CallForm | None:
    if name == NONE:
        return None
    if name == ANY.name:
        return ANY
    if name != AUTO:
        return next(form for form in CALL_FORMS if name in form.names)
    for form in CALL_FORMS:
        if any(mark in template for mark in form.marks):
            return form
    for form in CALL_FORMS:
        if any(_token_id(tokenizer, mark) is not None for mark in form.marks):
            return form
    return ANY


def _reasoning_form(name: str, template: str) -> ReasoningForm | None:
    if name == NONE:
        return None
    if name != AUTO:
        return next(form for form in REASONING_FORMS if name in form.names)
    for form in REASONING_FORMS:
        if any(mark in template for mark in (form.begin, form.end, *form.marks)):
            return form
    return None


def _token_id(tokenizer: Tokenizer, text: str) -> int | None:
    token_id = tokenizer.backend.token_to_id(text)
    return token_id if token_id is not None and tokenizer.is_added(token_id) else None


def _special_ids(tokenizer: Tokenizer, texts: Iterable[str]) -> frozenset[int]:
    """Return the ids of those texts that are special tokens, which texts are without."""
    ids = (_token_id(tokenizer, text) for text in texts)
    return frozenset(i for i in ids if i is not None and tokenizer.is_special(i))


def _writing(form: CallForm | None, template: str, tokenizer: Tokenizer) -> CallWriting | None:
    """Return the first spelling of demanded calls that the template or the vocabulary knows."""
    for writing in () if form is None else form.writings:
        needs = writing.needs
        if not needs or needs in template or _token_id(tokenizer, needs) is not None:
            return writing
    return None
