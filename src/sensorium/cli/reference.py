"""docs/configuration.md, generated from the same fields as the flags."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, Literal

from sensorium.bounds import bounds_of
from sensorium.cli.flags import TITLES, default_text, fields_of, flag_of, without_none
from sensorium.config import ENGINE_SECTIONS, ServerConfig

_INTRODUCTION = """# Configuration

Every option is a keyword of `LLM(...)` and a flag of `sensorium serve`; those of the server are
flags only. This page is generated from the fields of `sensorium.config` by
`scripts/configuration_docs`; edit the fields, not the page.

A flag that takes several values may be repeated. Flags that are on or off have a `--no-` form.
Underscores in flags are read as hyphens. JSON is given in quotes:
`--mm-processor-kwargs '{"max_pixels": 1003520}'`. `--config FILE.yaml` reads flags from a file
([Command line](cli.md#flags-in-a-file)).

## Environment

| variable | meaning |
| --- | --- |
| `SENSORIUM_API_KEY` | An API key of the server, and the one that `chat` and `bench serve` send. |
| `SENSORIUM_LOG_LEVEL` | Log level of commands and of the engine: debug, info, warning or error. |
| `SENSORIUM_PROGRESS` | 0 hides the progress of long tasks, as `--no-progress` does. |
| `XDG_CACHE_HOME` | Folder of caches, compiled CPU kernels among them; `~/.cache` when unset. \
Where it cannot be written, each start compiles them again, with a warning. |
| `SENSORIUM_IMAGE_FETCH_TIMEOUT` | Seconds for the whole download of an image. |
| `SENSORIUM_VIDEO_FETCH_TIMEOUT` | Seconds for the whole download of a video. |
| `SENSORIUM_AUDIO_FETCH_TIMEOUT` | Seconds for the whole download of an audio file. |
| `SENSORIUM_MEDIA_URL_ALLOW_REDIRECTS` | 0 forbids redirects of media URLs, 1 allows them. |

`SENSORIUM_API_KEY` and the last four are also read under their `VLLM_` names, and then their
`APHRODITE_` names, where ours are unset (or, for the key, empty). Flags override all of these, and
these override a file of flags; the key is accepted in addition to those of `--api-key`. The log of
each start says whether a key is needed.
"""


def configuration_markdown() -> str:
    """Return the page."""
    sections = [*ENGINE_SECTIONS.items(), ("server", ServerConfig)]
    return "\n".join([_INTRODUCTION, *(_section(TITLES[name], cls) for name, cls in sections)])


def _section(title: str, cls: type) -> str:
    rows = [_row(field, kind) for field, kind in fields_of(cls)]
    lines = [
        f"## {title.capitalize()}",
        "",
        (cls.__doc__ or "").splitlines()[0],
        "",
        "| flag | takes | default | meaning |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
    ]
    return "\n".join(lines)


def _row(field: dataclasses.Field[Any], kind: Any) -> str:
    default = default_text(field)
    cells = (
        f"`{flag_of(field.name)}`",
        _takes(field, kind),
        f"`{default}`" if default else "",
        field.metadata["help"],
    )
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _takes(field: dataclasses.Field[Any], kind: Any) -> str:
    """Return the type of a field and its range, such as "integer, 1 to 1024"."""
    kind = without_none(kind)
    origin = typing.get_origin(kind)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(kind))
    names = {bool: "on or off", int: "integer", float: "number", str: "string"}
    name = names.get(kind) or {tuple: "strings", dict: "JSON"}.get(origin, "string")
    bounds = str(bounds_of(field))
    return f"{name}, {bounds}" if bounds else name
