"""Rewriting of arguments that argparse does not read by itself into flags that it does.

``--max_model_len``, ``-tp 2``, ``-O3``, ``--disable-x`` for ``--no-enable-x``,
``--limit-mm-per-prompt.image 2`` (a member of a flag that takes JSON), and ``--config FILE.yaml``,
whose keys are flags.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sensorium.errors import ConfigError

SHORT = {
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-dp": "--data-parallel-size",
    "-dcp": "--decode-context-parallel-size",
    "-pcp": "--prefill-context-parallel-size",
    "-dpn": "--data-parallel-rank",
    "-dpr": "--data-parallel-start-rank",
    "-dpl": "--data-parallel-size-local",
    "-dpa": "--data-parallel-address",
    "-dpp": "--data-parallel-rpc-port",
    "-dpb": "--data-parallel-backend",
    "-dph": "--data-parallel-hybrid-lb",
    "-dpe": "--data-parallel-external-lb",
    "-dpm": "--data-parallel-multi-port-external-lb",
    "-asc": "--api-server-count",
    "-ep": "--enable-expert-parallel",
    "-q": "--quantization",
    "-n": "--nnodes",
    "-r": "--node-rank",
    "-ac": "--attention-config",
    "-cc": "--compilation-config",
    "-dc": "--diffusion-config",
    "-sc": "--speculative-config",
}
"""vLLM's short flags and what they stand for."""

_OPTIMIZATION = re.compile(r"-O(?:=?(\w+))?")
_FLAG = re.compile(r"(--?[A-Za-z0-9_-]+)((?:\.[^=\s.]+)*)(=.*)?", re.DOTALL)
_OPPOSITES = {"--enable-": "--disable-", "--disable-": "--enable-"}


def rewritten(args: Sequence[str], known: Collection[str], *, has_model: bool) -> list[str]:
    """Return the arguments with only flags that argparse reads.

    Args:
        args: as given on the command line.
        known: flags of the parser.
        has_model: the first argument may be a model, without a flag.

    Raises:
        ConfigError: a file of flags cannot be read, or a member has no value.
    """
    plain = [_spelled_out(arg, known) for arg in args]
    plain = _with_file(plain, known, has_model=has_model)
    return _members_joined(plain)


def _spelled_out(arg: str, known: Collection[str]) -> str:
    """Return one argument with hyphens, the long name, and an opposite as the ``--no-`` form."""
    level = _OPTIMIZATION.fullmatch(arg)
    if level is not None:
        return f"--optimization-level={level[1]}" if level[1] else "--optimization-level"
    found = _FLAG.fullmatch(arg)
    if found is None or not arg.startswith("-"):
        return arg
    name, members, value = found[1], found[2], found[3] or ""
    if not name.startswith("--"):
        return arg if name in known else f"{SHORT.get(name, name)}{members}{value}"
    name = name.replace("_", "-")
    for prefix, opposite in _OPPOSITES.items():
        turned = f"--no-{opposite[2:]}{name.removeprefix(prefix)}"
        if name.startswith(prefix) and name not in known and turned in known:
            name = turned
    return f"{name}{members}{value}"


def _members_joined(args: Sequence[str]) -> list[str]:
    """Return the arguments with the members of each flag as one JSON object."""
    kept: list[str] = []
    objects: dict[str, Any] = {}
    rest = iter(args)
    for arg in rest:
        found = _FLAG.fullmatch(arg)
        if found is None or not found[2] or not arg.startswith("--"):
            kept.append(arg)
            continue
        text = found[3][1:] if found[3] else next(rest, None)
        if text is None:
            raise ConfigError(f"{arg} needs a value.")
        _put(objects.setdefault(found[1], {}), found[2][1:].split("."), text)
    for flag, value in objects.items():
        kept += [flag, json.dumps({**_object_given(flag, kept), **value})]
    return kept


def _object_given(flag: str, args: Sequence[str]) -> dict[str, Any]:
    """Return the whole JSON object that a flag has besides its members, or an empty one."""
    texts = [text for name, text in itertools.pairwise(args) if name == flag]
    texts += [arg.removeprefix(f"{flag}=") for arg in args if arg.startswith(f"{flag}=")]
    try:
        value = json.loads(texts[-1]) if texts else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _put(into: dict[str, Any], path: Sequence[str], text: str) -> None:
    """Set the member at ``path``; ``name+`` takes a comma-separated list of strings."""
    *outer, last = path
    for name in outer:
        into = into.setdefault(name, {})
    if last.endswith("+"):
        into[last[:-1]] = text.split(",")
        return
    try:
        into[last] = json.loads(text)
    except ValueError:
        into[last] = text


def _with_file(args: Sequence[str], known: Collection[str], *, has_model: bool) -> list[str]:
    """Append the flags of ``--config FILE`` to the arguments; given flags win over the file."""
    kept, path = list(args), None
    for place, arg in enumerate(args):
        if arg == "--config" or arg.startswith("--config="):
            following = args[place + 1 : place + 2]
            path = arg.partition("=")[2] or next(iter(following), None)
            del kept[place : place + (1 if "=" in arg else 2)]
            break
    else:
        return kept
    if path is None or "--config" in kept:
        raise ConfigError("--config takes one YAML file of flags.")
    given = {_base(arg) for arg in kept if arg.startswith("--")}
    if has_model and kept and not kept[0].startswith("-"):
        given.add("--model")
    for key, value in read_flags(path).items():
        flag = _spelled_out(f"--{key}", known)
        if _base(flag) not in given:
            kept += _as_arguments("--model" if flag == "--model-tag" else flag, value)
    return kept


def _base(arg: str) -> str:
    """Return the flag that an argument sets, without ``--no-`` and value."""
    name = arg.partition("=")[0]
    return f"--{name.removeprefix('--no-').removeprefix('--')}"


def _as_arguments(flag: str, value: Any) -> list[str]:
    """Return a key of a file as command-line arguments."""
    if value is None or value == []:
        return []
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag.removeprefix('--no-').removeprefix('--')}"]
    if isinstance(value, list):
        return [flag, *(json.dumps(v) if isinstance(v, dict) else str(v) for v in value)]
    return [flag, json.dumps(value) if isinstance(value, dict) else str(value)]


def read_flags(path: str) -> Mapping[str, Any]:
    """Read a YAML file of flags and their values. Raises ConfigError."""
    import yaml

    try:
        flags = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path!r} cannot be read: {_reason(error)}.") from error
    if flags is None:
        return {}
    if not isinstance(flags, dict) or not all(isinstance(key, str) for key in flags):
        raise ConfigError(
            f"--config {path!r} must hold flags and their values, such as port: 8000."
        )
    return flags


def _reason(error: Exception) -> str:
    """Return the reason of an error, without text of the file, which may contain API keys."""
    place = getattr(error, "problem_mark", None)
    if place is not None:
        return f"line {place.line + 1}: {getattr(error, 'problem', None)}"
    return " ".join(str(error).split())
