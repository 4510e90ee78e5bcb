"""Lines of a batch's input as rows of Ray Data, read on the machine of the driver."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata
from ray.data.context import DataContext

from sensorium.ray.data.stages import Row, table_of
from sensorium.server.batches.lines import Line, TooLong, parse_line, raw_lines

BLOCK_BYTES = 8 << 20
"""Bytes of lines from which on a block of rows is handed over, so that images in lines do not
gather."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some consecutive lines of a file: where they begin, and numbers of those that are to run.

    ``first``: number of the line at ``offset``.
    """

    offset: int
    first: int
    numbers: frozenset[int]


class LinesDatasource(Datasource):
    """Rows of the lines of a local file, one read task for each part.

    ``is_made``: this program has written the lines.
    """

    def __init__(
        self, path: Path, parts: Sequence[Part], most_bytes: int, *, is_made: bool = False
    ) -> None:
        super().__init__()
        self._is_made = is_made
        self._path = path
        self._parts = parts
        self._most_bytes = most_bytes

    @property
    def supports_distributed_reads(self) -> bool:
        """Return False: other machines may not have the file."""
        return False

    def estimate_inmemory_data_size(self) -> int | None:
        """Return nothing: images may lie in the lines."""
        return None

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: DataContext | None = None,
    ) -> list[ReadTask]:
        """Return a task for each part."""
        return [
            ReadTask(
                functools.partial(
                    read_part, self._path, part, self._most_bytes, is_made=self._is_made
                ),
                BlockMetadata(len(part.numbers), None, None, None),
            )
            for part in self._parts
        ]


def read_part(
    path: Path, part: Part, most_bytes: int, *, is_made: bool = False
) -> Iterable[pyarrow.Table]:
    """Yield the lines of a part that are to run, as tables."""
    rows: list[Row] = []
    size = 0
    for line in _wanted(path, part, most_bytes, is_made):
        rows.append(Row(line, key=str(line.number)))
        size += len(line.body)
        if size >= BLOCK_BYTES:
            yield table_of(rows)
            rows, size = [], 0
    if rows:
        yield table_of(rows)


def _wanted(path: Path, part: Part, most_bytes: int, is_made: bool) -> Iterator[Line]:
    last = max(part.numbers)
    with path.open("rb") as file:
        file.seek(part.offset)
        for index, raw in raw_lines(file, most_bytes):
            number = part.first + index - 1
            if number in part.numbers and not isinstance(raw, TooLong):
                line = parse_line(raw, number, is_made=is_made)
                if isinstance(line, Line):
                    yield line
            if number >= last:
                return
