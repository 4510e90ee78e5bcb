"""The sandbox that chat templates run in: Jinja's immutable one, with bounds on loops, sizes and
numbers.

A template comes with a model or, where the operator allows it, with a request. It may neither
reach Python objects (Jinja's sandbox sees to that) nor run or grow without end, which Jinja does
not prevent."""

from __future__ import annotations

import datetime
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import jinja2
from jinja2 import ext, nodes
from jinja2.filters import do_format
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

MAX_TEMPLATE_CHARS = 1 << 20
MAX_OUTPUT_CHARS = 1 << 25
MAX_LOOP_STEPS = 2_000_000
MAX_SECONDS = 10.0
MAX_NUMBER = 1 << 24  # widths, repetitions and exponents beyond this have no honest use

_WIDE = re.compile(r"%[^a-zA-Z%]*(?:[0-9]{5}|\*)|:[^}]*(?:[0-9]{5}|\{)")
_STEPS = "sensorium_steps"
_JOIN = "sensorium_join"


class TemplateRefusal(jinja2.TemplateError):
    """The template itself refused the conversation, through ``raise_exception``."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, with the names that templates in the field use and bounds on what
    they may do."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, ext.loopcontrols]
        )
        self.filters = {name: _bounded(run) for name, run in self.filters.items()}
        self.filters["tojson"] = _bounded(_to_json)
        self.filters["format"] = _bounded(_format)
        self.filters[_STEPS] = _count_steps
        self.filters[_JOIN] = _join
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = _strftime_now
        self.globals["namespace"] = Namespace
        self.globals.pop("lipsum", None)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        return _Bounds().visit(tree)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Arithmetic, refused where the result would be huge."""
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
        """A call, with bounds on its numbers and its result (``ljust(10 ** 12)``, repeated
        ``replace``)."""
        _check_numbers(args, kwargs)
        return _checked(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Jinja's safe ``str.format``, without huge or computed widths."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_widths(value.__self__)
        return wrapped


class Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_name(name)
        jinja2.utils.Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class GenerationBlock(ext.Extension):
    """``{% generation %} … {% endgeneration %}``, which marks the assistant's text for training;
    here it renders its body."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        """The body in place of the block."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Bounds(NodeTransformer):
    """Counts the steps of all loops and bounds what ``~`` makes."""

    def visit_For(self, node: nodes.For, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node, *args, **kwargs)
        node.iter = _filter(cast(nodes.Expr, node.iter), _STEPS)
        return node

    def visit_Concat(self, node: nodes.Concat, *args: Any, **kwargs: Any) -> nodes.Node:
        self.generic_visit(node, *args, **kwargs)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), _JOIN)


def _filter(node: nodes.Expr, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


@jinja2.pass_context
def _count_steps(context: Any, values: Iterable[Any]) -> Iterable[Any]:
    """``values``, counted against the render's budget. Things with a length stay as they are, for
    ``loop.length``."""
    budget: StepBudget = context.parent[_STEPS]  # not resolve(): a template could shadow the name
    if isinstance(values, jinja2.Undefined) or not isinstance(values, list | tuple | dict | str):
        return _each(values, budget)
    budget.take(len(values))
    return values


def _each(values: Iterable[Any], budget: StepBudget) -> Iterator[Any]:
    for value in values:
        budget.take(1)
        yield value


class StepBudget:
    """How many loop steps, and how much time, one rendering may still take."""

    def __init__(self, num_steps: int = MAX_LOOP_STEPS, seconds: float = MAX_SECONDS) -> None:
        self._left = num_steps
        self._deadline = time.monotonic() + seconds

    def take(self, num_steps: int) -> None:
        """Use up steps; SecurityError when none are left. An empty loop costs one too."""
        self._left -= num_steps + 1
        if self._left < 0 or time.monotonic() > self._deadline:
            raise SecurityError("the loops of the chat template take too many steps")

    @property
    def variables(self) -> dict[str, Any]:
        """What a rendering must be given."""
        return {_STEPS: self}


def render_bounded(
    template: jinja2.Template, variables: dict[str, Any], budget: StepBudget | None = None
) -> str:
    """Render ``template``. Raises SecurityError past the bounds (those of ``budget``, where one is given), and
    whatever the template raises."""
    size = 0
    pieces = []
    for piece in template.generate({**variables, **(budget or StepBudget()).variables}):
        size += len(piece)
        if size > MAX_OUTPUT_CHARS:
            raise SecurityError("the output of the chat template is too long")
        pieces.append(piece)
    return "".join(pieces)


def _bounded(run: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(run)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check_numbers(args, kwargs)
        return _checked(run(*args, **kwargs))

    return bounded


def _check_numbers(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if not all(_small(v) for v in (*args, *kwargs.values()) if isinstance(v, int)):
        raise SecurityError(
            f"numbers above {MAX_NUMBER} are not allowed in a chat template's calls"
        )


def _checked(value: Any) -> Any:
    if isinstance(value, str | list | tuple | dict) and len(value) > MAX_OUTPUT_CHARS:
        raise SecurityError("a text or list in the chat template grew too long")
    if isinstance(value, int) and value.bit_length() > 4096:
        raise SecurityError("a number in the chat template grew too long")
    return value


def _small(value: Any, limit: int = MAX_NUMBER) -> bool:
    return not isinstance(value, int | float) or abs(value) <= limit


def _join(parts: list[Any]) -> str:
    return str(_checked("".join(map(str, parts))))


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


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace in a chat template cannot hold {name!r}")
