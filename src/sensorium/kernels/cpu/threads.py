"""Process-wide settings of CPU threads: their number, spinning, huge pages and cached shapes.

This is the only module that sets them.

Threads: torch's OpenMP library runs everything, the CPU kernels included (``launch``). Between two
parallel regions its threads first spin, so that the next region starts at once, then sleep. By
default they spin for some 10 milliseconds, which is right on an idle machine. But when another
process needs the core (a server's HTTP process, media decoders), a spinning thread takes it from
the thread that all others wait for: steps become many times slower. The gaps between regions of a
step are tens of microseconds, so half a millisecond of spinning serves both.

Shapes: oneDNN compiles a primitive for each shape and keeps a thousand of them, hundreds of
megabytes. Prompts of the same length are rare, so few of these are used again; the shapes of
decoding, which are, are few. So few are kept, and memory does not grow with the number of shapes.

Pages: decoding reads every weight once a token, and with pages of 4 KiB a tenth of that time goes
into address translation. glibc uses huge pages for its allocations when its tunables say so; it
reads them when a process starts, so this works for the child processes that are started from here,
such as a server's engine.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator

from sensorium.processes import cores
from sensorium.processes.cores import EngineThreads

log = logging.getLogger(__name__)

SPIN_COUNT = 10_000
"""Polls of the flag before a waiting thread sleeps; each takes some 50 nanoseconds."""
HUGE_PAGES = "glibc.malloc.hugetlb"
KEPT_PRIMITIVES = 32
"""Compiled matrix multiplications, one for each shape, that oneDNN and torch keep. Each takes two
thirds of a megabyte and is compiled in half a millisecond, once a step for all layers of a shape.
Products of few rows have few shapes (``linear.onednn.ROW_STEPS``)."""
_PRIMITIVE_CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


def prepare() -> bool:
    """Set the OpenMP waiting policy and the huge pages of child processes.

    What the environment already sets is kept. Must come before torch is imported, as its OpenMP
    library reads the environment when it is loaded; returns whether it came in time.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
    for name in _PRIMITIVE_CACHES:
        os.environ.setdefault(name, str(KEPT_PRIMITIVES))
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if HUGE_PAGES not in tunables:
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, f"{HUGE_PAGES}=1")))
    return "torch" not in sys.modules


def configure(num_threads: int | None = None) -> EngineThreads:
    """Use ``num_threads`` threads, or as many as are right for this machine, and return the choice.

    Call ``prepare`` first, before torch is imported anywhere.
    """
    prepare()
    import torch

    chosen = cores.find().engine_threads(num_threads)
    torch.set_num_threads(chosen.number)
    return chosen


@contextlib.contextmanager
def single() -> Iterator[None]:
    """Run torch on one thread for the block: for bits that do not depend on how many there are."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bind(num_threads: int | None = None) -> None:
    """Keep this process on the CPUs of one memory node, where ``cores`` says so.

    For a process that does nothing else. It must come before the first parallel region, as the
    threads inherit it; memory then comes from that node as long as it has some.
    """
    cpus = cores.find().engine_threads(num_threads).cpus
    if cpus is not None:
        with contextlib.suppress(OSError):  # a cpuset that changed meanwhile
            os.sched_setaffinity(0, cpus)
            log.info("the engine keeps to one memory node: CPUs %s", cores.cpu_list(cpus))


def share(rank: int, size: int, num_threads: int | None = None, *, keeps: bool) -> int:
    """Return the number of threads of one of ``size`` processes that share a model.

    ``num_threads``: those of all together, if somebody asked. ``keeps``: this process stays on its
    rank's CPUs from now on, as in ``bind``.
    """
    chosen = cores.find().rank_threads(rank, size, num_threads)
    if keeps and chosen.cpus is not None:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, chosen.cpus)
            log.info("rank %d keeps to the CPUs %s", rank, cores.cpu_list(chosen.cpus))
    return chosen.number
