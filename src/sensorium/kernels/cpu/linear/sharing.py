"""Tasks of a product, shared by threads so that each reads weights as one stream.

A core's prefetchers follow a stream of memory. Where a thread jumps they start again, which costs
about a microsecond, as much as reading twenty kilobytes. So each thread has a *share*, neighbouring
tasks, and takes them in order. One whose share is done helps the others, from the ends of theirs,
as threads may start late or lose their processor.

What is left of a share is counted in an integer in a cache line of its own: in the lower half the
tasks that were taken from the front, in the upper half those from the back.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
from numba import types
from numba.core import cgutils

from sensorium.kernels.cpu.linear import levels
from sensorium.kernels.cpu.numeric import INLINE, LINE_BYTES, _call, fetch_add, intrinsic, njit

I32, I64 = ir.IntType(32), ir.IntType(64)
FRONT, BACK = 1, 1 << 32
LINE = LINE_BYTES // 8


def counter_bytes(shares: int) -> int:
    """Return the bytes of the counters of so many shares."""
    return shares * LINE_BYTES


@njit(**INLINE)
def clear_counters(counters: Any, shares: Any) -> None:
    """Set the counters (int64) of all shares to none taken."""
    for share in range(shares):
        counters[share * LINE] = 0


@njit(**INLINE)
def share_start(share: Any, tasks: Any, shares: Any) -> Any:
    """Return the first task of a share, or with ``share == shares`` the number of tasks."""
    return share * tasks // shares


@njit(**INLINE)
def next_task(counters: Any, thread: Any, passed: Any, tasks: Any, shares: Any) -> Any:
    """Take a task for a thread, -1 if none is left, and return it with the number of shares passed.

    passed: what the thread's last call returned, at first 0.
    """
    while passed < shares:
        share = (thread + passed) % shares
        first, end = share_start(share, tasks, shares), share_start(share + 1, tasks, shares)
        taken = fetch_add(counters, share * LINE, FRONT if passed == 0 else BACK)
        front, back = taken & (BACK - 1), taken >> 32
        if front + back < end - first:
            return (first + front if passed == 0 else end - 1 - back), passed
        passed += 1
    return -1, passed


@intrinsic
def wait_for(typingctx: Any, ptr: Any, index: Any, value: Any) -> Any:
    """Wait until element ``index`` of an array has reached ``value``; orders memory.

    Gives its time slice away while it waits for long, as the other thread may need the processor.
    """

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        place = builder.gep(args[0], [args[1]])
        turns = cgutils.alloca_once_value(builder, I64(0))
        test, turn, rest, again, done = (
            builder.append_basic_block(f"wait.{name}")
            for name in ("test", "turn", "rest", "again", "done")
        )
        builder.branch(test)
        builder.position_at_end(test)
        reached = builder.load_atomic(place, "acquire", 8)
        builder.cbranch(builder.icmp_signed(">=", reached, args[2]), done, turn)
        builder.position_at_end(turn)
        if levels.is_x86():
            _call(builder, "llvm.x86.sse2.pause", ir.VoidType(), [])
        count = builder.add(builder.load(turns), I64(1))
        builder.store(count, turns)
        often = builder.icmp_unsigned("==", builder.and_(count, I64(1023)), I64(0))
        builder.cbranch(often, rest, again)
        builder.position_at_end(rest)
        _call(builder, "sched_yield", I32, [])
        builder.branch(again)
        builder.position_at_end(again)
        builder.branch(test)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(ptr, types.int64, types.int64), codegen
