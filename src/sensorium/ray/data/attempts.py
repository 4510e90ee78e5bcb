"""Attempts of rows and processes of a stage, as an actor counts them, and the sizes of rows.

Ray runs a task again when its process, or what it has made, is lost. It keeps what was handed on
before by its number: the second block is taken from the second attempt where the first block was
from the first. Ray divides rows into blocks by bytes. So rows must come in the same order, and have
as many bytes, in each attempt; else some are lost, and some come twice.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Any

MOST_SIZES = 1 << 20
"""Rows whose sizes are remembered, and tasks; those that were done first are forgotten first."""


class Attempts:
    """Actor that counts what was begun and not ended, as its process was lost.

    Ray runs rows again, and starts processes again, without a limit. A row that ends its process
    each time must not do so for ever, nor take those along that ran beside it.
    """

    def __init__(self) -> None:
        self._begun: Counter[str] = Counter()
        self._alone: Counter[str] = Counter()
        self._starts: Counter[str] = Counter()
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._totals: OrderedDict[str, int] = OrderedDict()

    def begin(self, keys: Sequence[str]) -> list[int]:
        """Count an attempt of each row; return how many there have been."""
        self._begun.update(keys)
        return [self._begun[key] for key in keys]

    def begin_alone(self, key: str) -> int:
        """Count an attempt of a row that runs alone; return how many there have been."""
        self._alone[key] += 1
        return self._alone[key]

    def end_alone(self, key: str) -> None:
        """Forget the attempts of a row that has run alone."""
        self._alone.pop(key, None)

    def end(self, keys: Sequence[str]) -> None:
        """Forget attempts of rows that are done."""
        for key in keys:
            self._begun.pop(key, None)
            self._alone.pop(key, None)

    def size(self, task: str, key: str, num_bytes: int, least_divided: float) -> int | None:
        """Return the bytes that a row of a task must have; None for as many as it likes.

        They are those of the first attempt, if all that the task had done by then is more than
        ``least_divided`` bytes, so that Ray may have divided it into blocks.
        """
        known = self._sizes.get(key)
        if known is None:
            self._sizes[key] = num_bytes
            self._totals[task] = self._totals.get(task, 0) + num_bytes
            for remembered in (self._sizes, self._totals):
                if len(remembered) > MOST_SIZES:
                    remembered.popitem(last=False)
            return num_bytes
        return known if self._totals.get(task, 0) > least_divided else None

    def begin_start(self, stage: str) -> int:
        """Count a process of a stage that starts; return how many have started and not got ready.

        Some may be starting now.
        """
        self._starts[stage] += 1
        return self._starts[stage]

    def end_start(self, stage: str) -> None:
        """Note that a process of a stage is ready: what was lost before does not count any more."""
        self._starts.pop(stage, None)


def counted_attempts() -> Any:
    """Start the actor, on the machine of the driver, without which there is no run. Returns it.

    It is not started again: one that has forgotten all would let rows be lost.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(Attempts).remote()
