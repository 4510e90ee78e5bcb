"""Token ids of expanded placeholders, looked up in the checkpoint's own tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from sensorium.errors import ConfigError
from sensorium.multimodal.processor import Replacement

_SPELLINGS = {
    "image_start": ("im_start", "<image>"),
    "image_end": ("im_end", "</image>"),
    "slice_start": ("slice_start", "<slice>"),
    "slice_end": ("slice_end", "</slice>"),
    "id_start": ("im_id_start", "<image_id>"),
    "id_end": ("im_id_end", "</image_id>"),
    "pad": ("unk", "<unk>"),
}
"""Field of ``Vocabulary``: name in preprocessor_config.json, usual text."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Ids of single tokens; ``digits`` those of 0 to 9, ``newline`` of a line break."""

    image_start: int
    image_end: int
    slice_start: int
    slice_end: int
    id_start: int
    id_end: int
    pad: int
    newline: int
    digits: tuple[int, ...]

    def views(self, num_queries: int, grid: tuple[int, int], index: int | None) -> Replacement:
        """Return the tokens of one image: its number, its source view, its cells row by row.

        The number is left out if ``index`` is None. Embeddings replace the ``num_queries`` pads
        within each pair of start and end.
        """
        columns, rows = grid
        ids: list[int] = []
        runs: list[tuple[int, int]] = []
        if index is not None:
            ids += [self.id_start, *(self.digits[int(digit)] for digit in str(index)), self.id_end]
        pads = [self.pad] * num_queries
        bounds = [(self.image_start, self.image_end)] + [(self.slice_start, self.slice_end)] * (
            columns * rows
        )
        for number, (start, end) in enumerate(bounds):
            if number > columns and (number - 1) % columns == 0:
                ids.append(self.newline)
            runs.append((len(ids) + 1, num_queries))
            ids += [start, *pads, end]
        return Replacement(tuple(ids), tuple(runs))


def read_vocabulary(folder: str, preprocessor: Mapping[str, Any]) -> Vocabulary:
    """Look up the ids in a checkpoint's tokenizer. Raises ConfigError when it lacks one."""
    spellings = tuple(str(preprocessor.get(key, usual)) for key, usual in _SPELLINGS.values())
    file = Path(folder) / "tokenizer.json"
    stamp = file.stat().st_mtime_ns if file.is_file() else 0
    singles, newline, digits = _lookup(folder, stamp, spellings)
    return Vocabulary(**dict(zip(_SPELLINGS, singles, strict=True)), newline=newline, digits=digits)


@lru_cache(maxsize=4)
def _lookup(
    folder: str, stamp: int, spellings: tuple[str, ...]
) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
    """Return the ids of the spellings, of the newline and of the digits.

    Reading a tokenizer takes a second, and is needed twice where the engine shares the process;
    ``stamp`` changes with the file.
    """
    from sensorium.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(folder)
    ids = [tokenizer.token_id(text) for text in spellings]
    absent = [text for text, token_id in zip(spellings, ids, strict=True) if token_id is None]
    if absent:
        raise ConfigError(
            f"The model's tokenizer lacks {', '.join(absent)}, which its images are marked with.",
            param="model",
        )
    newline = tokenizer.encode("\n", add_special_tokens=False)
    digits = tokenizer.encode("0123456789", add_special_tokens=False)
    if len(newline) != 1 or len(digits) != 10:
        raise ConfigError(
            "The model's tokenizer must have a token for a line break and one for each digit.",
            param="model",
        )
    return tuple(i for i in ids if i is not None), newline[0], tuple(digits)
