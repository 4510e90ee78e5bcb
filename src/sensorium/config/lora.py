"""Options of LoRA adapters."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from sensorium.config.fields import bad, check_fields, option

MOST_NAME = 256
"""Characters of an adapter's name."""


class LoraModule(NamedTuple):
    """An adapter: its name, and its folder or Hugging Face id."""

    name: str
    path: str


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """LoRA adapters beside the model."""

    enable_lora: bool = option(
        False,
        "Take LoRA adapters in PEFT's layout: those of --lora-modules, and others while the model "
        "runs.",
    )
    lora_modules: tuple[str, ...] = option(
        (),
        "Adapters that are loaded at the start, as NAME=PATH or "
        '{"name": NAME, "path": PATH}; PATH is a folder or a Hugging Face id. A request chooses '
        "one by its NAME as the model.",
    )
    max_loras: int = option(
        8, "Maximum number of adapters that are loaded at a time.", ge=1, le=1024
    )
    max_lora_rank: int = option(64, "Maximum rank of an adapter.", ge=1, le=512)
    max_lora_memory_gb: float = option(
        2.0,
        "GiB that the adapters that are loaded may take together; with --tensor-parallel-size in "
        "each of its processes.",
        ge=0.001,
        le=1 << 20,
    )

    def __post_init__(self) -> None:
        """Check the values. Raises ConfigError."""
        object.__setattr__(self, "lora_modules", _spelled(self.lora_modules))
        check_fields(self)
        modules = self.modules()
        if modules and not self.enable_lora:
            bad("lora_modules", "needs --enable-lora (in Python enable_lora=True)")
        if len(modules) > self.max_loras:
            bad(
                "lora_modules",
                f"names {len(modules)} adapters, but max_loras is {self.max_loras}: raise it",
            )
        names = [module.name for module in modules]
        for name in names:
            if names.count(name) > 1:
                bad("lora_modules", f"has the name {name!r:.80} twice")

    def modules(self) -> list[LoraModule]:
        """Return the adapters of ``lora_modules``. Raises ConfigError."""
        return [_parsed(text) for text in self.lora_modules]


def check_name(name: object, field: str) -> str:
    """Return a name that an adapter may have. Raises ConfigError for others."""
    if not isinstance(name, str) or not name.strip() or len(name) > MOST_NAME:
        bad(field, f"needs a name of 1 to {MOST_NAME} characters, got {name!r:.80}")
    if not name.isprintable():
        bad(field, f"needs a name without control characters, got {name!r:.80}")
    return name


def _spelled(value: object) -> object:
    """Return adapters as texts, of a mapping of names to paths or a list of texts and mappings."""
    if isinstance(value, Mapping):
        return tuple(f"{name}={path}" for name, path in value.items())
    if not isinstance(value, list | tuple):
        return value
    return tuple(json.dumps(dict(e), default=str) if isinstance(e, Mapping) else e for e in value)


def _parsed(text: str) -> LoraModule:
    """Parse ``NAME=PATH`` or a JSON object. Raises ConfigError."""
    if not text.startswith("{"):
        name, equals, path = text.partition("=")
        if not equals or not path:
            bad("lora_modules", f"needs NAME=PATH for each adapter, got {text!r:.200}")
        return LoraModule(check_name(name, "lora_modules"), path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    fields = {"name", "path", "base_model_name", "is_3d_lora_weight"}
    if not isinstance(found, dict) or not {"name", "path"} <= found.keys() <= fields:
        bad(
            "lora_modules",
            f'needs {{"name": …, "path": …}} for each adapter, got {text!r:.200}',
        )
    if not isinstance(found["path"], str) or not found["path"]:
        bad("lora_modules", f"needs a path for each adapter, got {found['path']!r:.80}")
    return LoraModule(check_name(found["name"], "lora_modules"), found["path"])
