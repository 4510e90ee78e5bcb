"""Rewriting of arguments that argparse does not read by itself into flags that it does.

``--max_model_len``, ``-tp 2``, ``-O3``, ``--disable-x`` for ``--no-enable-x``,
``--limit-mm-per-prompt.image 2`` (a member of a flag that takes JSON).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Collection, Sequence
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


def spelled_out(arg: str, known: Collection[str]) -> str:
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


def members_joined(args: Sequence[str]) -> list[str]:
    """Return the arguments with the members of each flag as one JSON object.

    Raises:
        ConfigError: a member has no value.
    """
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
