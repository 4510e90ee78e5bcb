"""Adapters that are loaded: each in a lane of the model's layers, found by its digest."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from sensorium.errors import ConfigError
from sensorium.kernels.adapters import LowRank, PackedPart, RowAdapters, Run
from sensorium.models.interface import Family, LoadableModel
from sensorium.models.lora.read import Adapter, Module, OpenAdapter, open_adapter
from sensorium.models.lora.targets import Target
from sensorium.runtime.lanes import Lanes

NO_LANE = -1
FULL = "max_lora_memory_gb"
"""``param`` of the error of an adapter for which others that are loaded leave no memory."""


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter in its lane. The other fields are those of ``models.lora.read.Adapter``."""

    lane: int
    digest: bytes
    rank: int
    in_encoder: bool
    nbytes: int


class OtherRanks(Protocol):
    """Lanes of the other processes that share a model."""

    def put(self, lane: int, adapter: Adapter) -> None:
        """Set the adapter of a lane in all of them.

        Raises UnavailableError where one could not take it; then it may be there in others.
        """
        ...

    def clear(self, lane: int) -> None:
        """Leave a lane empty in all of them."""
        ...


class AdapterSet:
    """The adapters of one model, at most ``max_loras`` and ``most_bytes``. Not thread-safe.

    Every layer that adapters may change is prepared for them when this is made. Two adapters of
    equal content share a lane. ``others``: where each is set, too.
    """

    def __init__(
        self,
        model: LoadableModel,
        family: Family,
        *,
        max_loras: int,
        max_rank: int,
        most_bytes: int,
        others: OtherRanks | None = None,
    ) -> None:
        self.max_loras, self.most_bytes = max_loras, most_bytes
        self._max_rank, self._others = max_rank, others
        self._dtype = model.dtype
        self._lanes = Lanes(model, max_loras)
        renames = [family.renames, *(part.renames for part in family.parts)]
        self._rules = [[(re.compile(old), new) for old, new in rules] for rules in renames]
        self._unused = re.compile("|".join(f"(?:{p})" for p in model.ignored_weights) or r"(?!)")
        self._free = list(range(max_loras))
        self._loaded: dict[bytes, LoadedAdapter] = {}
        self._holders: dict[bytes, int] = {}
        self._nbytes = 0

    @property
    def rows(self) -> RowAdapters:
        """Lanes of the rows that layers compute now."""
        return self._lanes.rows

    @property
    def version(self) -> int:
        """Number of changes so far: what was captured for another one does not fit."""
        return self._lanes.version

    @property
    def nbytes(self) -> int:
        """Bytes of all adapters."""
        return self._nbytes

    def lane(self, digest: bytes) -> int | None:
        """Return the lane of an adapter, ``NO_LANE`` for none; None for one that is not loaded."""
        if not digest:
            return NO_LANE
        found = self._loaded.get(digest)
        return None if found is None else found.lane

    def encoder_lane(self, digest: bytes) -> int:
        """Return the lane of an adapter that changes towers or projectors, else ``NO_LANE``.

        Raises KeyError for one that is not loaded.
        """
        if not digest:
            return NO_LANE
        found = self._loaded[digest]
        return found.lane if found.in_encoder else NO_LANE

    def load(self, folder: Path) -> LoadedAdapter:
        """Read an adapter and put it into a lane; raises as ``read`` and ``add``."""
        return self.add(self.read(folder))

    def read(self, folder: Path, progress: Callable[[], object] | None = None) -> Adapter:
        """Read an adapter. Another thread may call it while this one runs the model.

        progress: called after each of its modules. Raises ConfigError when it does not fit the
        model, or what is left of the memory.
        """
        opened = self._opened(folder)
        self._check_room(self._num_bytes(opened))
        whole: list[tuple[Target, LowRank]] = []

        def pack(target: Target, part: LowRank) -> PackedPart:
            if self._others is not None:
                whole.append((target, part))
            return self._lanes.pack(target, part)

        return replace(opened.read(self._dtype, pack, progress), whole=whole)

    def bytes_of(self, folder: Path) -> int:
        """Return the memory that an adapter will take. Raises ConfigError for one that cannot fit.

        Little of it is read for that.
        """
        return self._num_bytes(self._opened(folder))

    def _opened(self, folder: Path) -> OpenAdapter:
        return open_adapter(
            folder,
            self._lanes.targets,
            self._rules,
            unused=self._unused,
            max_rank=self._max_rank,
        )

    def _num_bytes(self, opened: OpenAdapter) -> int:
        return sum(self._packed_bytes(module) for module in opened.modules)

    def add(self, adapter: Adapter) -> LoadedAdapter:
        """Put an adapter into a lane. Raises ConfigError when there is no room for it."""
        found = self._loaded.get(adapter.digest) or self._put(adapter)
        self._holders[found.digest] = self._holders.get(found.digest, 0) + 1
        return found

    def _packed_bytes(self, module: Module) -> int:
        is_affine = "magnitude" in module.pair.names
        return self._lanes.packed_bytes(module.target, module.rank, is_affine)

    def _check_room(self, num_bytes: int) -> None:
        """Raise ConfigError where so many bytes more are beyond the limit.

        Its ``param`` is ``FULL`` where others may make room.
        """
        if num_bytes > self.most_bytes:
            raise ConfigError(
                f"It takes {_mib(num_bytes)}, and all adapters together may take "
                f"{_mib(self.most_bytes)}: start with a larger --max-lora-memory-gb (in Python "
                "max_lora_memory_gb).",
                param="lora_modules",
            )
        if self._nbytes + num_bytes > self.most_bytes:
            raise ConfigError(
                f"It takes {_mib(num_bytes)}, beside {_mib(self._nbytes)} of those that are "
                f"loaded, and all adapters together may take {_mib(self.most_bytes)}: unload "
                "others, or start with a larger --max-lora-memory-gb (in Python "
                "max_lora_memory_gb).",
                param=FULL,
            )

    def _put(self, adapter: Adapter) -> LoadedAdapter:
        """Put an adapter into a lane. Raises ConfigError when there is no room for it."""
        if not self._free:
            raise ConfigError(
                f"{len(self._loaded)} adapters are loaded, as many as --max-loras (in Python "
                "max_loras) allows: unload one, or start with a larger limit.",
                param="max_loras",
            )
        self._check_room(adapter.nbytes)
        lane = self._free[0]
        self._lanes.put(lane, adapter.parts)
        if self._others is not None:
            try:
                self._others.put(lane, adapter)
            except BaseException:
                self._clear(lane)
                raise
        del self._free[0]
        self._nbytes += adapter.nbytes
        found = LoadedAdapter(
            lane, adapter.digest, adapter.rank, adapter.in_encoder, adapter.nbytes
        )
        self._loaded[adapter.digest] = found
        return found

    def _clear(self, lane: int) -> None:
        self._lanes.clear(lane)
        if self._others is not None:
            self._others.clear(lane)

    def unload(self, digest: bytes) -> None:
        """Forget an adapter that was loaded, once for each time that it was.

        No sequence that uses it may be left. Raises KeyError when it is not there.
        """
        self._holders[digest] -= 1
        if self._holders[digest]:
            return
        del self._holders[digest]
        found = self._loaded.pop(digest)
        self._clear(found.lane)
        self._nbytes -= found.nbytes
        self._free.append(found.lane)

    def using(self, lanes: Sequence[tuple[int, int]]) -> AbstractContextManager[None]:
        """Give the rows of a step their lanes within the block.

        lanes: (lane or ``NO_LANE``, number of rows) of consecutive sequences.
        """
        runs: list[Run] = []
        row = 0
        for lane, num_rows in lanes:
            if lane != NO_LANE:
                if runs and runs[-1].lane == lane and runs[-1].stop == row:
                    runs[-1] = Run(lane, runs[-1].start, row + num_rows)
                else:
                    runs.append(Run(lane, row, row + num_rows))
            row += num_rows
        return self.rows.using(runs, row)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):.1f} MiB"
