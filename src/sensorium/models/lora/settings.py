"""``adapter_config.json`` of PEFT, as far as LoRA adapters need it.

Facts of the format: PEFT's ``LoraConfig``. The scale of a module is ``lora_alpha / r``, with
``use_rslora`` ``lora_alpha / sqrt(r)``; ``rank_pattern`` and ``alpha_pattern`` give other values to
the modules whose names end as one of their keys says, the first that matches. Which modules are
adapted is read from the tensors: PEFT stores those of no others.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from sensorium.errors import ConfigError

NAME = "adapter_config.json"
MOST_BYTES = 1 << 20
MOST_PATTERNS = 256
"""Keys of ``rank_pattern`` and of ``alpha_pattern``."""
MOST_ALPHA = 1e6
_WILDCARDS = 3
"""Most wildcards of a key. Between two of them is a character that is given, or a match could take
as long as the name is to the power of their number."""
_MOST_KEY = 512
_KEY = re.compile(r"\^?(?:[\w-]|\\?\.(?![*+?{])|\.\*|\\d\+|\[0-9\]\+)+\$?", re.ASCII)
_WILDCARD = re.compile(r"\.\*|\\d\+|\[0-9\]\+")
_W = rf"(?:{_WILDCARD.pattern})"
_ADJACENT = re.compile(rf"{_W}{_W}|{_W}\.+\.\*|\.\*\.+{_W}")
_KNOWN_STARTS = ("gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the base model as it is, besides true and false."""
_KNOWN_USES = ("use_rslora", "use_dora")
_REFUSED = {
    "modules_to_save": "it brings weights of whole modules: merge the adapter into its base model",
    "layer_replication": "it stacks layers of the base model several times",
    "lora_bias": "its B has a bias",
    "trainable_token_indices": "it changes rows of the embedding: merge the adapter into its base "
    "model",
    "target_parameters": "it changes parameters that are no linear layers, such as experts",
    "alora_invocation_tokens": "it begins to act in the middle of a prompt",
}
"""Options that are refused when they are set, and why."""


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The part of an adapter's configuration that its numbers need."""

    rank: int
    alpha: float
    use_rslora: bool = False
    use_dora: bool = False
    ranks: tuple[tuple[re.Pattern[str], int], ...] = field(default=())
    alphas: tuple[tuple[re.Pattern[str], float], ...] = field(default=())

    def of(self, module: str) -> tuple[int, float]:
        """Return the rank of a module, named as in its base model, and the factor of x A^T B^T."""
        rank = next((rank for key, rank in self.ranks if key.fullmatch(module)), self.rank)
        alpha = next((alpha for key, alpha in self.alphas if key.fullmatch(module)), self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_settings(folder: Path) -> LoraSettings:
    """Read ``adapter_config.json``. Raises ConfigError for what is missing, wrong or not done."""
    values = _read(folder / NAME)
    kind = values.get("peft_type")
    if kind != "LORA":
        _refuse(f"peft_type is {kind!r:.60}, not 'LORA': other kinds of adapters are not supported")
    for name, reason in _REFUSED.items():
        if values.get(name):
            _refuse(f"{name} is set: {reason}")
    for name, value in values.items():
        if name.startswith("use_") and name not in _KNOWN_USES and value:
            _refuse(f"{name} is set, which is not supported")
    if values.get("bias", "none") != "none":
        _refuse(
            f"bias is {values['bias']!r:.60}, so it changes biases of the base model: merge the "
            "adapter into it"
        )
    _check_start(values.get("init_lora_weights"))
    _check_targets(values.get("target_modules"))
    use_rslora, use_dora = (_flag(name, values.get(name)) for name in _KNOWN_USES)
    return LoraSettings(
        rank=_rank("r", values.get("r")),
        alpha=_alpha("lora_alpha", values.get("lora_alpha", 8)),
        use_rslora=use_rslora,
        use_dora=use_dora,
        ranks=tuple((key, _rank(n, v)) for key, n, v in _patterns(values, "rank_pattern")),
        alphas=tuple((key, _alpha(n, v)) for key, n, v in _patterns(values, "alpha_pattern")),
    )


def _read(path: Path) -> Mapping[str, Any]:
    try:
        data = _bytes(path)
    except FileNotFoundError:
        raise ConfigError(
            f"The adapter's folder has no {NAME}: it is no adapter in PEFT's layout.",
            param="lora_modules",
        ) from None
    except OSError as error:
        _refuse(f"it cannot be read ({error.strerror})")
    if len(data) > MOST_BYTES:
        _refuse(f"it has more than {MOST_BYTES} bytes")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        _refuse("it is not valid JSON")
    if not isinstance(values, dict):
        _refuse("it is not a JSON object")
    return values


def _bytes(path: Path) -> bytes:
    """Return the beginning of a file. Raises ConfigError for what is none, such as a pipe."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            _refuse("it is no regular file")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(MOST_BYTES + 1)
    finally:
        os.close(descriptor)


def _check_start(value: object) -> None:
    """Refuse starts of training that change the weights of the base model."""
    if value is None or isinstance(value, bool) or value in _KNOWN_STARTS:
        return
    _refuse(
        f"init_lora_weights is {value!r:.60}: such an adapter belongs to a base model whose "
        "weights were changed. Convert it to a plain one when it is saved (peft: save_pretrained "
        "with path_initial_model_for_weight_conversion)"
    )


def _check_targets(value: object) -> None:
    """Check the form of ``target_modules``: names, or a pattern, which is not run."""
    names = value if isinstance(value, list) else [value]
    if value is not None and not all(isinstance(name, str) for name in names):
        _refuse("target_modules must be a list of names or a pattern")


def _patterns(values: Mapping[str, Any], name: str) -> list[tuple[re.Pattern[str], str, object]]:
    """Return the keys of a mapping as patterns of whole names, with their places and values."""
    found = values.get(name) or {}
    if not isinstance(found, dict) or len(found) > MOST_PATTERNS:
        _refuse(f"{name} must be an object of at most {MOST_PATTERNS} entries")
    patterns = []
    for key, value in found.items():
        if len(key) > _MOST_KEY or not _KEY.fullmatch(key) or _is_slow(key):
            _refuse(
                f"the key {key!r:.80} of {name} is neither a name nor a name with at most "
                f"{_WILDCARDS} of '.*' and '\\d+', with other characters than dots between"
            )
        begin = "" if key.startswith(("^", ".*")) else r"(?:.*\.)?"
        # As PEFT does: the end of a name, from a dot on.
        pattern = re.compile(begin + key.removeprefix("^").removesuffix("$"))
        patterns.append((pattern, f"{name}[{key!r:.80}]", value))
    return patterns


def _is_slow(key: str) -> bool:
    """Return True for a key whose match may take long."""
    return len(_WILDCARD.findall(key)) > _WILDCARDS or _ADJACENT.search(key) is not None


def _flag(name: str, value: object) -> bool:
    if value is not None and not isinstance(value, bool):
        _refuse(f"{name} must be true or false, got {value!r:.60}")
    return bool(value)


def _rank(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 20:
        _refuse(f"{name} must be a whole number from 1 on, got {value!r:.60}")
    return value


def _alpha(name: str, value: object) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not abs(value) <= MOST_ALPHA:  # type: ignore[arg-type]
        _refuse(f"{name} must be a number of at most {MOST_ALPHA:g}, got {value!r:.60}")
    return float(value)  # type: ignore[arg-type]


def _refuse(problem: str) -> NoReturn:
    raise ConfigError(f"{NAME} of the adapter: {problem}.", param="lora_modules")
