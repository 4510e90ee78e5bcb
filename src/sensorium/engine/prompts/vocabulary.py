"""Checks token ids against the embedding table: a tokenizer may have tokens without a row."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from sensorium.config import ModelConfig
from sensorium.core.request import ItemSpan
from sensorium.errors import InvalidRequestError
from sensorium.models import loader
from sensorium.models.interface import Family, LoadedConfig
from sensorium.multimodal.processor import Processor
from sensorium.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MOST_NAMED = 3
"""Most tokens that the warning at start names."""
MOST_CHARS = 60
"""Most characters of a token in messages."""
_MARK = re.compile(r"\[[A-Z_/]+\]")


class Vocabulary:
    """The ids that prompts may contain: rows of the embedding table, and placeholders.

    ``num_rows`` is the size of the table. Ids of placeholders may be beyond it, because their
    embeddings are never looked up.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        num_rows: int,
        processor: Processor | None,
        placeholder_texts: Collection[str] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._num_rows = num_rows
        modalities = processor.modalities if processor is not None else ()
        self._placeholders = frozenset(
            token_id
            for modality in modalities
            for token_id in (processor.placeholder(modality) if processor is not None else ())
        )
        self._placeholder_texts = frozenset(placeholder_texts)

    def check(self, token_ids: Sequence[int], param: str | None = None) -> None:
        """Raise InvalidRequestError naming the first token that the model has no embedding for."""
        if not token_ids or (min(token_ids) >= 0 and max(token_ids) < self._num_rows):
            return
        for token_id in token_ids:
            if not 0 <= token_id < self._num_rows and token_id not in self._placeholders:
                raise InvalidRequestError(self._refusal(token_id), param=param)

    def check_expanded(
        self, token_ids: Sequence[int], spans: Sequence[ItemSpan], param: str | None = None
    ) -> None:
        """Raise as ``check`` for a prompt with expanded placeholders.

        Tokens that a processor adds around and between embeddings are checked, too.
        """
        if not token_ids or (min(token_ids) >= 0 and max(token_ids) < self._num_rows):
            return
        filled = {
            place
            for span in spans
            for start, length in span.runs
            for place in range(start, start + length)
        }
        for place, token_id in enumerate(token_ids):
            if not 0 <= token_id < self._num_rows and place not in filled:
                raise InvalidRequestError(self._refusal(token_id), param=param)

    def warn(self) -> None:
        """Log a warning if the tokenizer has tokens that the model lacks."""
        missing = [
            (token_id, text)
            for token_id in range(self._num_rows, self._tokenizer.max_token_id + 1)
            if token_id not in self._placeholders
            and (text := self._tokenizer.token_text(token_id))
            and text not in self._placeholder_texts
        ]
        if not missing:
            return
        named = ", ".join(f"{text[:MOST_CHARS]!r} ({i})" for i, text in missing[:MOST_NAMED])
        more = " …" if len(missing) > MOST_NAMED else ""
        logger.warning(
            "the tokenizer has %d token%s that the model's embedding table of %d rows has not: "
            "%s%s; prompts with such a token are refused. Is it this model's tokenizer, and was "
            "the model resized after tokens were added?",
            len(missing),
            "" if len(missing) == 1 else "s",
            self._num_rows,
            named,
            more,
        )

    def _refusal(self, token_id: int) -> str:
        known = 0 <= token_id <= self._tokenizer.max_token_id
        text = self._tokenizer.token_text(token_id) if known else ""
        if not text:
            return (
                f"Token id {token_id} is outside the model's vocabulary of {self._num_rows}: give "
                f"ids from 0 to {self._num_rows - 1}."
            )
        return (
            f"The prompt holds the token {text[:MOST_CHARS]!r} (id {token_id}), which the "
            f"tokenizer has, but not the model, whose vocabulary is of {self._num_rows}. Leave it "
            "out, or use a model that was resized for it."
        )


def end_tokens(tokenizer: Tokenizer, stop_tokens: Sequence[str]) -> tuple[int, ...]:
    """Return the ids that end an answer: the configuration's, then the family's, each once."""
    extra = (tokenizer.token_id(text) for text in stop_tokens)
    known = (*tokenizer.eos_token_ids, *(i for i in extra if i is not None))
    return tuple(dict.fromkeys(known))


def transcription_prompt(
    tokenizer: Tokenizer, family: Family
) -> Callable[[str | None], str] | None:
    """Return the family's own transcription prompt where the tokenizer has all tokens of it."""
    if family.transcription is None:
        return None
    known = (tokenizer.token_id(mark) for mark in _MARK.findall(family.transcription(None)))
    return None if None in known else family.transcription


def tokenizer_folder(model: ModelConfig, loaded: LoadedConfig) -> Path:
    """Return the folder of the tokenizer's files: the model's, unless another is configured."""
    if model.tokenizer is None:
        return Path(loaded.folder)
    return Path(loader.read_config(model.tokenizer, download_dir=model.download_dir).folder)
