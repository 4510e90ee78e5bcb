"""Tokens of a GGUF file's vocabulary and their types. No torch, no tokenizers."""

from __future__ import annotations

from collections.abc import Sequence

from sensorium.errors import ConfigError
from sensorium.models.gguf.reader import GgufFile, integers

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens in files."""


def tokens_of(file: GgufFile) -> list[str]:
    """Return the texts of all tokens, by id. Raises ConfigError for a file without vocabulary."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ConfigError(
            f"{file.path.name} has no vocabulary (tokenizer.ggml.tokens).", param="model"
        )
    return tokens


def types_of(file: GgufFile, size: int) -> Sequence[int]:
    """Return the type of each token, NORMAL where a file does not say.

    Raises ConfigError where there is no integer for each of ``size`` tokens.
    """
    stored = file.metadata.get("tokenizer.ggml.token_type")
    if stored is None:
        return [NORMAL] * size
    types = integers(stored)
    if types is None or len(types) != size:
        raise ConfigError(
            f"{file.path.name} has no type (an integer of tokenizer.ggml.token_type) for each "
            "token.",
            param="model",
        )
    return types


def acting_tokens(file: GgufFile, names: Sequence[str]) -> dict[str, int]:
    """Return the ids of those of some texts that are control or user-defined tokens.

    These are found in a text as a whole, before it is split.
    """
    tokens = tokens_of(file)
    types = types_of(file, len(tokens))
    places = {token: place for place, token in enumerate(tokens)}
    acting = (CONTROL, USER_DEFINED)
    return {
        name: places[name] for name in names if name in places and types[places[name]] in acting
    }
