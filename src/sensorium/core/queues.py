"""Queues of sequences in the order in which they run, and a check of them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping
from typing import Any

from sensorium.core.blocks import IntegrityError
from sensorium.core.request import Sequence, Status


def queue_order(seq: Sequence) -> tuple[int, int]:
    """Sort key of queues: lower priority values first, then order of arrival."""
    return seq.request.priority, seq.seq_id


def put(queue: list[Sequence], seq: Sequence) -> None:
    """Insert a sequence at its place."""
    insort(queue, seq, key=queue_order)


def remove(queue: list[Sequence], seq: Sequence) -> None:
    """Remove a sequence that is in the queue."""
    del queue[bisect_left(queue, queue_order(seq), key=queue_order)]


def check_queues(
    running: list[Sequence],
    waiting: list[Sequence],
    live: Mapping[int, Sequence],
    seq_ids: Mapping[str, int],
) -> None:
    """Raise ``IntegrityError`` when the queues and the records of sequences contradict."""
    for queue in (running, waiting):
        if queue != sorted(queue, key=queue_order):
            raise IntegrityError("a queue is out of order")
    queued = {seq.seq_id: seq for seq in (*running, *waiting)}
    if queued != live or sorted(seq_ids.values()) != sorted(queued):
        raise IntegrityError("queues and records differ")
    for seq in waiting:
        if seq.block_ids or seq.num_computed or seq.status is Status.RUNNING:
            raise IntegrityError(f"sequence {seq.seq_id} waits, but holds blocks")
    for seq in running:
        if seq.status is not Status.RUNNING or seq.num_uncomputed < 1:
            raise IntegrityError(f"sequence {seq.seq_id} runs, but has nothing to compute")


def queue_gauges(running: list[Sequence], waiting: list[Sequence]) -> dict[str, Any]:
    """Return those of the gauges in ``SchedulerStats`` that describe the two queues."""
    return {
        "num_running": len(running),
        "num_waiting": len(waiting),
        "num_waiting_tokens": sum(
            _prompt_left(seq) for queue in (running, waiting) for seq in queue
        ),
        "running_adapters": _adapters(running),
        "waiting_adapters": _adapters(waiting),
    }


def _prompt_left(seq: Sequence) -> int:
    return max(0, seq.num_prompt_tokens - seq.num_computed)


def _adapters(sequences: list[Sequence]) -> frozenset[bytes]:
    """Return the digests of the adapters of sequences."""
    return frozenset(seq.request.adapter for seq in sequences if seq.request.adapter)
