"""The sandbox that chat templates run in: Jinja's immutable sandbox, with bounds on time and size.

A template comes with a model or, where the operator allows it, with a request. Jinja's sandbox
keeps it from Python objects. It does not keep it from running or growing without end; here every
loop iteration, call, filter and intercepted operator looks at the clock, and what one operation of
C could take for ever (a huge repetition, exponent or width) is refused before it runs.
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
from jinja2.filters import do_format
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_TEMPLATE_CHARS = 1 << 20
MAX_OUTPUT_CHARS = 1 << 25
MAX_SECONDS = 10.0
MAX_NUMBER = 1 << 24  # widths, repetitions and exponents beyond this have no honest use

_WIDE = re.compile(r"%[^a-zA-Z%]*(?:[0-9]{5}|\*)|:[^}]*(?:[0-9]{5}|\{)")
_LOOP, _JOIN = "sensorium_loop", "sensorium_join"
_deadline: ContextVar[float] = ContextVar("deadline of the rendering", default=float("inf"))


class TemplateRefusal(jinja2.TemplateError):
    """The template itself refused the conversation, through ``raise_exception``."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with bounds, and with the names that published templates use."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, ext.loopcontrols]
        )
        own = {"tojson": _to_json, "format": _format, _LOOP: _each, _JOIN: _join}
        self.filters = {name: _bounded(run) for name, run in {**self.filters, **own}.items()}
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
            _check_widths(left)
        return _checked(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call an object. Methods of C take no huge numbers (``ljust(10 ** 12)``)."""
        if isinstance(__obj, BuiltinMethodType):
            _check_numbers(args, kwargs)
        return _checked(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return Jinja's safe ``str.format``, without huge or computed widths."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_widths(value.__self__)
        return wrapped


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
        node.iter = _filter(cast(nodes.Expr, node.iter), _LOOP)
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
    token = _deadline.set(time.monotonic() + seconds)
    try:
        for piece in template.generate(variables):
            size += len(piece)
            if size > MAX_OUTPUT_CHARS:
                raise SecurityError("the output of the chat template is too long")
            pieces.append(piece)
    finally:
        _deadline.reset(token)
    return "".join(pieces)


def _check_time() -> None:
    if time.monotonic() > _deadline.get():
        raise SecurityError("the chat template takes too long")


def _each(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _check_time()
        yield value


def _bounded(run: Callable[..., Any]) -> Callable[..., Any]:
    first = 2 if hasattr(run, "jinja_pass_arg") else 1  # behind the context and the value

    @functools.wraps(run)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check_numbers(args[first:], kwargs)
        return _checked(run(*args, **kwargs))

    return bounded


def _check_numbers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not all(_small(v) for v in (*args, *kwargs.values()) if isinstance(v, int)):
        raise SecurityError(
            f"numbers above {MAX_NUMBER} are not allowed in a chat template's calls"
        )


def _checked(value: Any) -> Any:
    _check_time()
    if isinstance(value, str | list | tuple | dict) and len(value) > MAX_OUTPUT_CHARS:
        raise SecurityError("a text or list in the chat template grew too long")
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
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _format(value: str, *args: Any, **kwargs: Any) -> str:
    """Jinja's ``format`` filter, without huge or computed widths."""
    _check_widths(value)
    return str(do_format(value, *args, **kwargs))


def _check_widths(form: str) -> None:
    if _WIDE.search(form):
        raise SecurityError("wide or computed formatting widths are not allowed in a chat template")


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _refuse(message: str) -> None:
    raise TemplateRefusal(str(message))
