"""The sandbox that chat templates run in: Jinja's immutable sandbox, with bounds on time and size.

A template comes with a model or, where the operator allows it, with a request. Jinja's sandbox
keeps it from Python objects. It does not keep it from running or growing without end; here every
loop iteration, call, filter and intercepted operator looks at the clock. One operation of C cannot
be interrupted, so those with a huge result (a repetition, a width, a replacement, the text of lists
that hold one list many times) are refused before they run, and the sum of all results is bounded.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from types import BuiltinMethodType
from typing import Any, cast

import jinja2
from jinja2 import ext, nodes
from jinja2.exceptions import SecurityError
from jinja2.filters import do_format, do_indent
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_TEMPLATE_CHARS = 1 << 20
MAX_OUTPUT_CHARS = 1 << 25
MAX_TOTAL_CHARS = 1 << 29
"""The size of all texts and lists that one rendering makes, kept or not."""
MAX_SECONDS = 10.0
MAX_NUMBER = 1 << 24  # widths, repetitions and exponents beyond this have no honest use

_WIDE = re.compile(r"%[^a-zA-Z%]*(?:[0-9]{5}|\*)|:[^}]*(?:[0-9]{5}|\{)")
_LOOP, _JOIN, _SIZED = "sensorium_loop", "sensorium_join", "sensorium_sized"
_CHEAP = frozenset(
    (
        *("count", "length", "first", "last", "default", "d", "attr", "items", "map", "select"),
        *("selectattr", "reject", "rejectattr", "batch", "slice", _LOOP),
    )
)
"""Filters that do not look into the elements of their value."""
_deadline: ContextVar[float] = ContextVar("deadline of the rendering", default=float("inf"))
_made: ContextVar[list[int]] = ContextVar("size of all that the rendering made")


class TemplateRefusal(jinja2.TemplateError):
    """The template itself refused the conversation, through ``raise_exception``."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with bounds, and with the names that published templates use."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationBlock, ext.loopcontrols],
            finalize=_output,
        )
        own = {"tojson": _to_json, "format": _format, _LOOP: _each, _JOIN: _join}
        self.filters = {
            name: _bounded(run, name not in _CHEAP) for name, run in {**self.filters, **own}.items()
        }
        self.filters |= {_SIZED: _sized, "replace": _bounded(_replace), "indent": _bounded(_indent)}
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = _strftime_now
        self.globals.pop("lipsum", None)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return cast(nodes.Template, _Bounds().visit(super()._parse(source, name, filename)))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute ``left operator right``. Raises SecurityError where the result would be huge."""
        if operator == "**" and (not _small(left) or not _small(right, 64)):
            raise SecurityError("exponents above 64 are not allowed in a chat template")
        if operator == "*":
            sizes = [len(v) if hasattr(v, "__len__") else abs(v) for v in (left, right)]
            if sizes[0] * sizes[1] > MAX_OUTPUT_CHARS and not all(
                isinstance(v, int | float) for v in (left, right)
            ):
                raise SecurityError("a repetition in the chat template is too long")
        if operator == "%" and isinstance(left, str):
            _check_form(left, right)
        return _checked(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call an object. Methods of C take no huge numbers and make no huge texts."""
        if isinstance(__obj, BuiltinMethodType):
            _check_numbers(args, kwargs)
            if __obj.__name__ == "join" and args and isinstance(args[0], Iterator):
                args = (list(args[0]),)
            _check_method(__obj.__self__, __obj.__name__, args)
        return _checked(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return Jinja's safe ``str.format``, without huge or computed widths."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None
        format_text = wrapped

        def bounded(*args: Any, **kwargs: Any) -> str:
            _check_form(value.__self__, (args, kwargs))
            return format_text(*args, **kwargs)

        return bounded


class GenerationBlock(ext.Extension):
    """``{% generation %} … {% endgeneration %}``, which marks the assistant's text for training.

    Here it renders its body.
    """

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        """Return the body in place of the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Bounds(NodeTransformer):
    """Puts filters of ours into loops and into ``~``, which Jinja does not let us intercept."""

    def visit_For(self, node: nodes.For, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node, *args, **kwargs)
        chars = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
        node.iter = _filter(cast(nodes.Expr, node.iter), _LOOP)
        node.iter.args = [nodes.Const(chars, lineno=node.lineno)]
        return node

    def visit_Compare(self, node: nodes.Compare, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node, *args, **kwargs)
        if not isinstance(node.expr, nodes.Const):
            node.expr = _filter(node.expr, _SIZED)
        for operand in node.ops:
            if not isinstance(operand.expr, nodes.Const):
                operand.expr = _filter(operand.expr, _SIZED)
        return node

    def visit_Concat(self, node: nodes.Concat, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node, *args, **kwargs)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), _JOIN)


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def render_bounded(
    template: jinja2.Template, variables: dict[str, Any], seconds: float = MAX_SECONDS
) -> str:
    """Render ``template`` within ``seconds``.

    Raises SecurityError past the bounds, and whatever the template raises.
    """
    size = 0
    pieces = []
    token, made = _deadline.set(time.monotonic() + seconds), _made.set([0])
    try:
        for piece in template.generate(variables):
            size += len(piece)
            if size > MAX_OUTPUT_CHARS:
                raise SecurityError("the output of the chat template is too long")
            pieces.append(piece)
    finally:
        _deadline.reset(token)
        _made.reset(made)
    return "".join(pieces)


def _check_time() -> None:
    if time.monotonic() > _deadline.get():
        raise SecurityError("the chat template takes too long")


def _count(size: int) -> None:
    made = _made.get(None)
    if made is not None:  # None while Jinja computes constants at compilation
        made[0] += size
        if made[0] > MAX_TOTAL_CHARS:
            raise SecurityError("the chat template makes too many texts or lists")


def _each(values: Iterable[Any], chars: int) -> Iterator[Any]:
    """Yield ``values``; each iteration writes ``chars`` of plain text at most once per loop."""
    for value in values:
        _check_time()
        _count(chars)
        yield value


def _output(value: Any) -> Any:
    """Count a value that the template writes; Jinja turns it to text."""
    _count(len(value) if isinstance(value, str) else _check_size(value))
    return value


def _sized(value: Any) -> Any:
    """Return an operand of a comparison, which looks at all of its elements."""
    _check_size(value)
    return value


def _check_size(value: Any) -> int:
    size = _size(value, {})
    if size > MAX_OUTPUT_CHARS:
        raise SecurityError("a text or list in the chat template grew too long")
    return size


def _size(value: Any, known: dict[int, int]) -> int:
    """Return about the length of the text of a value, in which an element counts wherever it is."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Namespace):
        value = getattr(value, "_Namespace__attrs")  # noqa: B009  (Jinja lets no other name through)
    if not isinstance(value, list | tuple | dict):
        return 8
    if id(value) not in known:
        known[id(value)] = 0  # a namespace may hold itself
        parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 8 + sum(8 + _size(part, known) for part in parts)
    return known[id(value)]


def _check_method(text: object, name: str, args: tuple[Any, ...]) -> None:
    """Raise SecurityError for a method of a text whose result would be huge."""
    if not isinstance(text, str) or not args:
        return
    size = 0
    if name == "join" and isinstance(args[0], list | tuple | dict):
        size = len(text) * len(args[0]) + _size(args[0], {})
    elif name == "replace" and len(args) > 1 and all(isinstance(v, str) for v in args[:2]):
        size = len(text) + (text.count(args[0]) * len(args[1]) if len(args[1]) else 0)
    elif name == "expandtabs" and isinstance(args[0], int):
        size = len(text) + text.count("\t") * args[0]
    elif name == "translate":
        size = len(text) * _size(args[0], {})
    _check_chars(size)


def _check_chars(num_chars: int) -> None:
    if num_chars > MAX_OUTPUT_CHARS:
        raise SecurityError("a text in the chat template grew too long")


def _bounded(run: Callable[..., Any], sized: bool = True) -> Callable[..., Any]:
    first = 2 if hasattr(run, "jinja_pass_arg") else 1  # behind the context and the value

    @functools.wraps(run)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check_numbers(args[first:], kwargs)
        if sized and isinstance(args[first - 1], Iterator):
            args = (*args[: first - 1], list(args[first - 1]), *args[first:])
        for value in (*args[first - 1 if sized else first :], *kwargs.values()):
            _check_size(value)
        return _checked(run(*args, **kwargs))

    return bounded


def _check_numbers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not all(_small(v) for v in (*args, *kwargs.values()) if isinstance(v, int)):
        raise SecurityError(
            f"numbers above {MAX_NUMBER} are not allowed in a chat template's calls"
        )


def _checked(value: Any) -> Any:
    _check_time()
    if isinstance(value, str | list | tuple | dict):
        if len(value) > MAX_OUTPUT_CHARS:
            raise SecurityError("a text or list in the chat template grew too long")
        _count(len(value) if isinstance(value, str) else 8 * len(value))
    if isinstance(value, int) and value.bit_length() > 4096:
        raise SecurityError("a number in the chat template grew too long")
    return value


def _small(value: Any, limit: int = MAX_NUMBER) -> bool:
    return not isinstance(value, int | float) or abs(value) <= limit


def _join(parts: list[Any]) -> str:
    return "".join(map(str, parts))


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without escapes for HTML, unlike Jinja's own filter; templates rely on it."""
    spaces = indent if isinstance(indent, int) else len(indent or "")
    for more in (spaces, *map(len, separators or ())):
        _check_chars(_size(value, {}) * more)
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _format(value: str, *args: Any, **kwargs: Any) -> str:
    """Jinja's ``format`` filter, without huge or computed widths."""
    _check_form(value, (args, kwargs))
    return str(do_format(value, *args, **kwargs))


def _replace(value: Any, old: str, new: str, count: int | None = None) -> str:
    """Jinja's ``replace`` filter, which escapes nothing here."""
    text, old, new = str(value), str(old), str(new)
    _check_method(text, "replace", (old, new))
    return text.replace(old, new, -1 if count is None else count)


def _indent(value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """Jinja's ``indent`` filter, which adds the width to every line."""
    text = str(value)
    num_added = width if isinstance(width, int) else len(width)
    _check_chars((text.count("\n") + 1) * num_added)
    return do_indent(text, width, first, blank)


def _check_form(form: str, values: Any) -> None:
    _check_chars(max(form.count("%"), form.count("{")) * _size(values, {}))
    if _WIDE.search(form):
        raise SecurityError("wide or computed formatting widths are not allowed in a chat template")


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _refuse(message: str) -> None:
    raise TemplateRefusal(str(message))
