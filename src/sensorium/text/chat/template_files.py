"""Chat templates: their files, their compilation, and the form of content that they take."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
from jinja2 import nodes

from sensorium.errors import ConfigError, InvalidRequestError, SensoriumError
from sensorium.text.chat.content_format import ContentFormat, warn_if_broken, working_format
from sensorium.text.chat.sandbox import MAX_TEMPLATE_CHARS, BoundedEnvironment
from sensorium.text.tokenizer import read_json

MAX_REQUEST_TEMPLATE_CHARS = 1 << 16

_ENVIRONMENT = BoundedEnvironment()
_SHORT_IDS = re.compile(r"\|\s*length\s*[!=]=\s*9\b")


@dataclass(frozen=True, slots=True)
class CompiledTemplate:
    """A template ready to run.

    ``content_format``: the form in which it takes the content of a message, a string or a list of
    parts. ``tests_string``: it tests for strings, so that content given as a string may stay one.
    ``from_request``: it came with a request. ``short_ids``: it takes ids of tool calls of nine
    letters and digits only, as Mistral's do.
    """

    template: jinja2.Template
    content_format: ContentFormat
    tests_string: bool
    from_request: bool = False
    short_ids: bool = False


def compile_template(
    source: str,
    *,
    content_format: ContentFormat | Literal["auto"] = "auto",
    request: bool = False,
    variables: Mapping[str, Any] | None = None,
    plain: bool = True,
) -> CompiledTemplate:
    """Compile ``source``.

    Args:
        source: The text of the template.
        content_format: With ``auto``, the form of content found in the source is tried on a plain
            message; where it fails and the other form works, the other form is taken.
        request: The template came with a request, so its mistakes are the caller's.
        variables: The special tokens of the tokenizer, by name.
        plain: The template is for plain messages: log a warning if it fails on them.

    Raises:
        ConfigError: The template is too long or malformed.
        InvalidRequestError: The same, of a template of a request.
    """
    limit = MAX_REQUEST_TEMPLATE_CHARS if request else MAX_TEMPLATE_CHARS
    if len(source) > limit:
        raise _error(f"has {len(source)} characters; at most {limit} are allowed.", request)
    try:
        tree = _ENVIRONMENT.parse(source)
        template = _ENVIRONMENT.from_string(source)
    except (jinja2.TemplateSyntaxError, RecursionError, SyntaxError, MemoryError) as error:
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        reason = str(error) or type(error).__name__
        raise _error(f"cannot be compiled{line}: {reason}", request) from error
    if content_format == "auto":
        content_format = working_format(template, detect_content_format(tree), variables or {})
    if plain and not request:
        warn_if_broken(template, content_format, variables or {})
    short_ids = _SHORT_IDS.search(source) is not None
    return CompiledTemplate(template, content_format, _tests_string(tree), request, short_ids)


def _error(what: str, request: bool) -> SensoriumError:
    if request:
        return InvalidRequestError(f"The chat template {what}", param="chat_template")
    return ConfigError(f"The chat template {what}")


def find_templates(
    folder: str | Path | None, *, override: str | None = None, fallback: str | None = None
) -> dict[str, str]:
    """Return the templates of a model by name; empty when there is none.

    ``default`` is the usual one. ``override``, a file or the text of a template, wins; ``fallback``
    is used when the folder has none. Raises ConfigError when ``override`` is neither.
    """
    if override is not None:
        return {"default": _file_or_text(override)}
    found = _folder_templates(Path(folder)) if folder is not None else {}
    if "default" not in found and fallback is not None:
        found["default"] = fallback
    return found


def _file_or_text(value: str) -> str:
    if "{" not in value and "\n" not in value:
        path = Path(value).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"--chat-template {value!r} is neither a file nor the text of a Jinja template."
            )
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"--chat-template {value!r} cannot be read: {type(error).__name__}."
            ) from error
    return value


def _folder_templates(folder: Path) -> dict[str, str]:
    """Return the templates of a model folder; template files win over entries in configurations."""
    found: dict[str, str] = {}
    for name in ("tokenizer_config.json", "processor_config.json", "chat_template.json"):
        found |= _named(read_json(folder / name).get("chat_template"))
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[path.stem] = path.read_text(encoding="utf-8")
    own = folder / "chat_template.jinja"
    if own.is_file():
        found["default"] = own.read_text(encoding="utf-8")
    return found


def _named(value: Any) -> dict[str, str]:
    """Return the templates of a configuration's ``chat_template`` by name.

    It is one text, a mapping of names, or a list of ``{"name": ..., "template": ...}``.
    """
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, Mapping):
        return {str(k): v for k, v in value.items() if isinstance(v, str)}
    if isinstance(value, list):
        return {
            str(entry["name"]): str(entry["template"])
            for entry in value
            if isinstance(entry, Mapping) and "name" in entry and "template" in entry
        }
    return {}


def detect_content_format(tree: nodes.Template) -> ContentFormat:
    """Return ``openai`` when the template loops over the content of a message, else ``string``."""
    aliases = _content_names(tree)
    for loop in tree.find_all(nodes.For):
        if any(_is_content(node, aliases) for node in _filtered(loop.iter)):
            return "openai"
    for node in tree.find_all(nodes.Filter):  # content | map(…), content | selectattr(…)
        if node.name in _LIST_FILTERS and _is_content(node.node, aliases):
            return "openai"
    return "string"


def _content_names(tree: nodes.Template) -> set[str]:
    """Return names bound to the content of a message.

    Such are targets of assignments, names unpacked by loops over pairs, and parameters of macros.
    """
    aliases = {"content"} & _loop_targets(tree)
    others = _names_of_other_fields(tree)
    size = -1
    while size != len(aliases):
        size = len(aliases)
        for assign in tree.find_all(nodes.Assign):
            if isinstance(assign.target, nodes.Name) and _is_content(assign.node, aliases):
                aliases |= {assign.target.name} - others
        aliases |= _macro_parameters(tree, aliases)
    return aliases


def _names_of_other_fields(tree: nodes.Template) -> set[str]:
    """Return names bound to other fields of a message, as in ``set calls = message.tool_calls``.

    A loop over one of them need not be a loop over content.
    """
    return {
        assign.target.name
        for assign in tree.find_all(nodes.Assign)
        if isinstance(assign.target, nodes.Name) and _field(assign.node) not in (None, "content")
    }


def _field(node: nodes.Node) -> str | None:
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return node.arg.value if isinstance(node.arg.value, str) else None
    return None


_LIST_FILTERS = ("selectattr", "rejectattr", "select", "reject", "map", "groupby")


def _loop_targets(tree: nodes.Template) -> set[str]:
    """Return names that loops unpack, as in ``for role, content in …``."""
    return {
        name.name
        for loop in tree.find_all(nodes.For)
        if isinstance(loop.target, nodes.Tuple)
        for name in loop.target.find_all(nodes.Name)
    }


def _filtered(node: nodes.Node | None) -> Iterator[nodes.Node]:
    """Yield the expression and the operands of its filters and slices."""
    while node is not None:
        yield node
        if isinstance(node, nodes.Filter):
            node = node.node
        elif isinstance(node, nodes.Getitem):
            node = node.node if isinstance(node.arg, nodes.Slice) else None
        else:
            node = None


def _is_content(node: nodes.Node | None, aliases: set[str]) -> bool:
    """Return true for the ``content`` of something, or a name bound to it."""
    if isinstance(node, nodes.Name):
        return node.name in aliases
    if isinstance(node, nodes.Getattr):
        return node.attr == "content"
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "content"
    if isinstance(node, nodes.CondExpr):
        return _is_content(node.expr1, aliases) or _is_content(node.expr2, aliases)
    if isinstance(node, nodes.Or):
        return _is_content(node.left, aliases) or _is_content(node.right, aliases)
    return False


def _macro_parameters(tree: nodes.Template, aliases: set[str]) -> set[str]:
    """Return parameters of macros that some call passes content to."""
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    found = set()
    for call in tree.find_all(nodes.Call):
        macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
        if macro is None:
            continue
        for parameter, value in zip(macro.args, call.args, strict=False):
            if _is_content(value, aliases):
                found.add(parameter.name)
        found |= {k.key for k in call.kwargs if _is_content(k.value, aliases)}
    return found


def _tests_string(tree: nodes.Template) -> bool:
    aliases = _content_names(tree)
    tests = (test for test in tree.find_all(nodes.Test) if test.name == "string")
    return any(_is_content(test.node, aliases) for test in tests)
