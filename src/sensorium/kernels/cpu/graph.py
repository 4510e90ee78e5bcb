"""Steps of few rows, captured once and replayed as one launch.

A decode step runs the same two hundred small kernels for every token. Launched one by one from
Python they cost more than a millisecond a step, in which the memory stands idle. So the launches
of a step are recorded, as CUDA graphs record theirs, and replayed in one parallel region whose
threads wait for each other after each kernel. The kernels, their tasks and so the bits of their
results are the same.

While a step is captured, every tensor that is allocated lies in an arena that the graph owns, so
that the recorded addresses stay valid; memory that is freed in the course of the step is used
again, as it would be otherwise. An operation that is neither one of our kernels, an allocation nor
a view ends the capture: such a step cannot be replayed and always runs launch by launch.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import math
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from torch.utils._python_dispatch import TorchDispatchMode

from sensorium.kernels.batch import AttentionBatch, LayerCache
from sensorium.kernels.cpu.launch import (
    NUM_ARGS,
    Launch,
    Launcher,
    NotRecordable,
    compile_kernel,
    find_openmp,
    pack,
    recording,
)
from sensorium.kernels.cpu.linear.integers import wait_for
from sensorium.kernels.cpu.numeric import fetch_add, intrinsic, pointer, shifted

log = logging.getLogger(__name__)

MOST_ROWS = 64
"""Rows of the largest step that is captured; with more, launches cost little beside the work."""
STEPS_BEFORE = 3
"""Steps of so many rows that run launch by launch before one is captured."""
MOST_GRAPHS = 64
"""Graphs that are kept, those used last."""
MOST_BYTES = 128 * 1024 * 1024
"""Memory of all graphs of a decoder."""
COUNTERS = (0, 1, NUM_ARGS - 2, NUM_ARGS - 1)
"""Arguments that kernels count in; zero before each launch."""

Run = Callable[[torch.Tensor, AttentionBatch], torch.Tensor]


# -- kernel ---------------------------------------------------------------------------------------


@intrinsic
def call_kernel(typingctx: Any, address: Any, args: Any) -> Any:
    """Call the kernel at an address with its arguments."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        kind = ir.FunctionType(ir.VoidType(), [values[1].type])
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), [values[1]])
        return context.get_dummy_value()

    return types.void(types.int64, args), codegen


@intrinsic
def team_size(typingctx: Any, address: Any) -> Any:
    """Return the number of threads of this parallel region; address: ``omp_get_num_threads``."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, values: Any) -> ir.Value:
        kind = ir.FunctionType(ir.IntType(32), [])
        size = builder.call(builder.inttoptr(values[0], kind.as_pointer()), [])
        return builder.sext(size, cgutils.intp_t)

    return types.int64(types.int64), codegen


def build_replay() -> Callable[[Any], None]:
    """Build the kernel that runs recorded launches in order.

    args: addresses of kernels, their arguments (a row of ``NUM_ARGS`` each), address of
    ``omp_get_num_threads`` (0: one thread). ``args[2]`` is the number of launches; ``args[0]``
    counts arrivals, of each thread after each launch.
    """

    def replay(args: Any) -> None:
        kernels, table = pointer(args[3], types.int64), pointer(args[4], types.int64)
        team = team_size(args[5]) if args[5] != 0 else 1
        is_first = fetch_add(args, 1, 1) == 0
        for index in range(args[2]):
            own = shifted(table, index * NUM_ARGS)
            call_kernel(kernels[index], own)
            fetch_add(args, 0, 1)
            wait_for(args, 0, (index + 1) * team)
            if is_first:
                own[0], own[1], own[NUM_ARGS - 2], own[NUM_ARGS - 1] = 0, 0, 0, 0

    return replay


@functools.cache
def replay_kernel() -> Launcher:
    """Return the kernel that runs recorded launches, compiled or loaded at first use."""
    return compile_kernel(build_replay(), "any")


# -- capture --------------------------------------------------------------------------------------


class _Arena:
    """Memory of a captured step: what is freed is used again for the same size."""

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray[Any, Any]]] = defaultdict(list)
        self._blocks: list[np.ndarray[Any, Any]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all memory of the arena."""
        return sum(block.nbytes for block in self._blocks)

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor in the arena, whose memory is free again when it is dropped."""
        size = -(-max(math.prod(shape) * dtype.itemsize, 1) // 64) * 64
        if self._free[size]:
            block = self._free[size].pop()
        else:
            block = np.zeros(size + 64, np.uint8)
            self._blocks.append(block)
        start = -block.ctypes.data % 64
        # torch holds this very array for as long as a tensor uses its memory.
        piece = block[start : start + max(math.prod(shape) * dtype.itemsize, 1)]
        weakref.finalize(piece, self._free[size].append, block).atexit = False
        found = torch.from_numpy(piece)
        return found[: math.prod(shape) * dtype.itemsize].view(dtype).view(tuple(shape))


_ATEN = torch.ops.aten
_VIEWS = frozenset(
    {
        _ATEN.view.default,
        _ATEN._unsafe_view.default,
        _ATEN.slice.Tensor,
        _ATEN.select.int,
        _ATEN.unsqueeze.default,
        _ATEN.squeeze.dim,
        _ATEN.alias.default,
        _ATEN.detach.default,
    }
)


class _Capture(TorchDispatchMode):
    """Allocations in an arena; anything else than views is refused."""

    def __init__(self, arena: _Arena) -> None:
        super().__init__()
        self._arena = arena

    def _allocate(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        if func in _VIEWS:
            return func(*args, **options)
        if func is _ATEN.empty.memory_format:
            return self._arena.tensor(args[0], options.get("dtype") or torch.get_default_dtype())
        if func is _ATEN.new_empty.default:
            return self._arena.tensor(args[1], options.get("dtype") or args[0].dtype)
        if func is _ATEN.empty_like.default and args[0].is_contiguous():
            return self._arena.tensor(args[0].shape, options.get("dtype") or args[0].dtype)
        raise NotRecordable(str(func))


# A method that the body of the class defines would import torch's compiler at its first call: more
# than a second, in the first answer of a process.
_Capture.__torch_dispatch__ = _Capture._allocate  # type: ignore[method-assign, assignment]


class StepGraph:
    """One captured step, for any batch of as many sequences with one row each."""

    def __init__(self, run: Run, embeds: torch.Tensor, batch: AttentionBatch) -> None:
        """Capture ``run(embeds, batch)``, which has run before with this batch.

        Raises NotRecordable.
        """
        self.caches, self.num_threads = batch.caches, torch.get_num_threads()
        self._arena = _Arena()
        self._input = self._arena.tensor(embeds.shape, embeds.dtype)
        with recording() as launches, _Capture(self._arena):
            self._output = run(self._input, batch)
        self._table = np.array([list(launch.args) for launch in launches], np.int64)
        self._table[:, COUNTERS] = 0
        self._kernels = np.array([launch.address for launch in launches], np.int64)
        self._renewed = _renewals(launches)
        team_size = find_openmp("omp_get_num_threads") or 0
        addresses = (self._kernels.ctypes.data, self._table.ctypes.data)
        self._args = pack(len(launches), *addresses, team_size)

    @property
    def nbytes(self) -> int:
        """Bytes of the step's intermediate results and of its arguments."""
        return self._arena.nbytes + self._table.nbytes

    def replay(self, embeds: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        """Run the step. The result is overwritten by the next."""
        embeds = embeds.contiguous()
        ctypes.memmove(self._input.data_ptr(), embeds.data_ptr(), embeds.nbytes)
        for plan, rows, fields in self._renewed:
            self._table[rows, fields] = np.frombuffer(plan(batch), np.int64)[fields]
        self._args[0] = self._args[1] = 0
        replay_kernel().released(self._args, self.num_threads)
        return self._output


Renewal = tuple[Callable[[AttentionBatch], Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]


def _renewals(launches: Sequence[Launch]) -> list[Renewal]:
    """Return for each kind of arguments of a batch: how they are made, and where they belong."""
    rows: dict[Any, list[int]] = defaultdict(list)
    for index, launch in enumerate(launches):
        if launch.plan is not None:
            rows[launch.key].append(index)
    found: list[Renewal] = []
    for indexes in rows.values():
        first = launches[indexes[0]]
        assert first.plan is not None
        fields = np.array([field for field in first.fields if field not in COUNTERS])
        found.append((first.plan, np.array(indexes)[:, None], fields))
    return found


class StepGraphs:
    """The graphs of one decoder, by the number of rows. Used by one thread."""

    def __init__(self, run: Run) -> None:
        """Keep graphs of ``run(embeds, batch)``: (T, H) -> (T, H), which overwrites embeds."""
        self._run = run
        self._seen: dict[int, int] = {}
        self.captured: OrderedDict[int, StepGraph] = OrderedDict()
        """Graphs by their number of rows, the one used last at the end."""
        self._refused = False
        self._caches: list[LayerCache] | None = None
        self._num_threads = 0

    def __call__(self, embeds: torch.Tensor, batch: AttentionBatch) -> torch.Tensor:
        """Run a step, by its graph where there is one. The result lives until the next step."""
        if not self._may_capture(embeds, batch):
            return self._run(embeds, batch)
        self._check_places(batch)
        num_rows = embeds.shape[0]
        graph = self.captured.get(num_rows)
        if graph is not None:
            self.captured.move_to_end(num_rows)
            return graph.replay(embeds, batch)
        self._seen[num_rows] = self._seen.get(num_rows, 0) + 1
        hidden = self._run(embeds, batch)
        if self._seen[num_rows] > STEPS_BEFORE:
            self._capture(embeds, batch)
        return hidden

    def _may_capture(self, embeds: torch.Tensor, batch: AttentionBatch) -> bool:
        num_rows = embeds.shape[0]
        single = batch.num_decodes == num_rows == len(batch.query_lens)
        return not self._refused and single and 0 < num_rows <= MOST_ROWS and embeds.is_cpu

    def _check_places(self, batch: AttentionBatch) -> None:
        """Drop the graphs when the cache lies elsewhere or the number of threads has changed."""
        threads = torch.get_num_threads()
        if self._caches is not batch.caches or self._num_threads != threads:
            self.captured.clear()
            self._seen.clear()
            self._caches, self._num_threads = batch.caches, threads

    def _capture(self, embeds: torch.Tensor, batch: AttentionBatch) -> None:
        try:
            graph = StepGraph(self._run, embeds, batch)
        except (NotRecordable, MemoryError) as error:
            self._refused = True
            log.debug("decode steps are not captured: %s", error or "out of memory")
            return
        self.captured[embeds.shape[0]] = graph
        while len(self.captured) > MOST_GRAPHS or self._num_bytes() > MOST_BYTES:
            num_rows, _ = self.captured.popitem(last=False)
            self._seen[num_rows] = 0

    def _num_bytes(self) -> int:
        return sum(graph.nbytes for graph in self.captured.values())
