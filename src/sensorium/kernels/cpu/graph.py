"""Steps of few rows, captured once and replayed as one launch.

A decode step runs the same two hundred small kernels for every token, and so does one that tries a
few tokens of each sequence. Launched one by one from
Python they cost more than a millisecond a step, in which the memory stands idle. So the launches
of a step are recorded, as CUDA graphs record theirs, and replayed in one parallel region whose
threads wait for each other after each kernel. The kernels, their tasks and so the bits of their
results are the same.

While a step is captured, every tensor that is allocated lies in an arena, so that the recorded
addresses stay valid; memory that is freed in the course of the step is used again, as it would be
otherwise. Only one step of a decoder runs at a time, so all graphs of a ``StepGraphs`` share one
memory, as large as the largest of them needs; a decoder has two, for its layers and for whole
steps. An operation that is neither one of our kernels, an allocation nor
a view ends the capture: such a step cannot be replayed and always runs launch by launch. Only what
``between_launches`` has wrapped may stand there, such as a sum over the ranks of a model: it runs
between two parallel regions, one for the launches before and one for those behind it.
"""

from __future__ import annotations

import bisect
import ctypes
import functools
import logging
import math
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from torch.utils._python_dispatch import TorchDispatchMode

from sensorium.kernels.batch import AttentionBatch, LayerCache
from sensorium.kernels.cpu import huge_pages
from sensorium.kernels.cpu.launch import (
    NUM_ARGS,
    Launch,
    Launcher,
    NotRecordable,
    compile_kernel,
    find_openmp,
    is_recording,
    pack,
    recording,
    run_behind_last,
)
from sensorium.kernels.cpu.linear.sharing import wait_for
from sensorium.kernels.cpu.numeric import LINE_BYTES, fetch_add, intrinsic, pointer, shifted

log = logging.getLogger(__name__)

MOST_ROWS = 64
"""Rows of the largest step that is captured; with more, launches cost little beside the work."""
MOST_QUERIES = 17
"""Rows of one sequence in a step that is captured; longer spans are prompts, and seldom alike."""
STEPS_BEFORE = 3
"""Steps of so many rows that run launch by launch before one is captured."""
MOST_GRAPHS = 4 * MOST_ROWS
"""Graphs that are kept, those used last: one of each kind of step. A kind is a number of rows, in
steps that try tokens or not, with adapters or without."""
MOST_BYTES = 128 * 1024 * 1024
"""Memory for the tensors of the graphs of a ``StepGraphs``; larger steps are not captured."""
COUNTERS = (0, 1, NUM_ARGS - 2, NUM_ARGS - 1)
"""Arguments that kernels count in; zero before each launch."""

Result = TypeVar("Result")
Run = Callable[[torch.Tensor, AttentionBatch], Result]
"""``run(rows, batch)``: a step from its rows (T, ...) to a tensor, or to several."""


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
    """Places of the tensors of one captured step, in memory that other steps use as well."""

    def __init__(self, memory: np.ndarray[Any, Any]) -> None:
        self._memory = memory
        self._used: list[tuple[int, int]] = []  # first byte and end, in order
        self.nbytes = 0
        """End of the memory that was ever used."""

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor in the arena, whose place is free again when it is dropped.

        Raises MemoryError.
        """
        num_bytes = math.prod(shape) * dtype.itemsize
        place = self._take(-(-max(num_bytes, 1) // LINE_BYTES) * LINE_BYTES)
        # torch holds this very array for as long as a tensor uses its memory.
        piece = self._memory[place[0] : place[1]]
        weakref.finalize(piece, self._used.remove, place).atexit = False
        return torch.from_numpy(piece)[:num_bytes].view(dtype).view(tuple(shape))

    def _take(self, size: int) -> tuple[int, int]:
        """Return the place of the first gap of ``size`` bytes, used from now on."""
        start = 0
        for first, end in self._used:
            if first - start >= size:
                break
            start = end
        if start + size > self._memory.nbytes:
            raise MemoryError(f"a step of more than {self._memory.nbytes} bytes")
        place = start, start + size
        bisect.insort(self._used, place)
        self.nbytes = max(self.nbytes, place[1])
        return place


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


InPlace = Callable[[torch.Tensor], torch.Tensor]
"""Overwrites a tensor and returns it."""


def between_launches(run: InPlace) -> InPlace:
    """Return ``run`` as a function that a captured step calls again each time."""

    def wrapped(x: torch.Tensor) -> torch.Tensor:
        if not is_recording():
            return run(x)
        run_behind_last(run, x)
        return x

    return wrapped


Region = tuple[Any, Callable[[], object] | None]
"""Arguments of ``replay_kernel``, and what runs behind it."""


class StepGraph(Generic[Result]):
    """One captured step, for any batch of its kind."""

    def __init__(
        self,
        run: Run[Result],
        rows: torch.Tensor,
        batch: AttentionBatch,
        memory: np.ndarray[Any, Any],
    ) -> None:
        """Capture ``run(rows, batch)``, which has run before with this batch.

        memory: bytes for its tensors, from a whole cache line on. Raises NotRecordable, or
        MemoryError if it needs more.
        """
        self.caches, self.num_threads = batch.caches, torch.get_num_threads()
        arena = _Arena(memory)
        self._input = arena.tensor(rows.shape, rows.dtype)
        with recording() as launches, _Capture(arena):
            self._output = run(self._input, batch)
        self._table = np.array([list(launch.args) for launch in launches], np.int64)
        self._table[:, COUNTERS] = 0
        self._kernels = np.array([launch.address for launch in launches], np.int64)
        self._renewed = _renewals(launches)
        self._regions = list(self._regions_of(launches))
        self.used_bytes = arena.nbytes
        """Bytes of the shared memory that the step uses."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory of its own: the arguments of its launches."""
        return self._kernels.nbytes + self._table.nbytes

    def renew(self, batch: AttentionBatch) -> None:
        """Take the arguments of a batch, for all its steps."""
        for plan, indexes, fields in self._renewed:
            self._table[indexes, fields] = np.frombuffer(plan(batch), np.int64)[fields]

    def replay(self, rows: torch.Tensor) -> Result:
        """Run the step. The result is overwritten by the next step of any graph."""
        rows = rows.contiguous()
        ctypes.memmove(self._input.data_ptr(), rows.data_ptr(), rows.nbytes)
        for args, then in self._regions:
            args[0] = args[1] = 0
            replay_kernel().released(args, self.num_threads)
            if then is not None:
                then()
        return self._output

    def _regions_of(self, launches: Sequence[Launch]) -> Iterator[Region]:
        """Yield the parallel regions, which end where something runs between launches."""
        kernels, table = self._kernels.ctypes.data, self._table.ctypes.data
        team_size, first = find_openmp("omp_get_num_threads") or 0, 0
        for index, launch in enumerate(launches):
            if launch.then is None and launch is not launches[-1]:
                continue
            own_kernels = kernels + first * self._kernels.itemsize
            own_table = table + first * self._table.strides[0]
            args = pack(index + 1 - first, own_kernels, own_table, team_size)
            yield args, launch.then
            first = index + 1


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


Key = int | tuple[int, int]
"""Kind of a step: its number of rows, negative if ``num_decodes`` is 0; with adapters, also their
version."""


def _key(num_rows: int, batch: AttentionBatch) -> Key:
    rows = num_rows if batch.num_decodes else -num_rows
    return (rows, batch.adapters) if batch.adapters else rows


class StepGraphs(Generic[Result]):
    """The graphs of a decoder's layers, or of its whole steps, by the kind of step.

    Used by one thread.

    Steps are of one kind if they have as many rows, each of a sequence of its own, or none of them
    counted as such (``num_decodes`` 0), as in steps that try tokens.
    """

    def __init__(self, run: Run[Result]) -> None:
        """Keep graphs of ``run(rows, batch)``, which may overwrite its rows (T, ...)."""
        self._run = run
        self._seen: dict[Key, int] = {}
        self.captured: OrderedDict[Key, StepGraph[Result]] = OrderedDict()
        """Graphs by their kind of step, the one used last at the end."""
        self._renewed: tuple[StepGraph[Result], AttentionBatch] | None = None
        """The graph replayed last, and the batch whose arguments it has."""
        self._memory: np.ndarray[Any, Any] | None = None
        self._most_rows = MOST_ROWS
        self._caches: list[LayerCache] | None = None
        self._num_threads = 0
        self._adapters = 0

    def takes(self, num_rows: int) -> bool:
        """Return whether steps of so many rows may be captured, as far as is known."""
        return 0 < num_rows <= self._most_rows

    def __call__(self, rows: torch.Tensor, batch: AttentionBatch) -> Result:
        """Run a step, by its graph where there is one. The result lives until the next step.

        The batch of the step before may come again, moved on by ``ops.advance``: the arguments of
        the launches are the same then.
        """
        if not self._may_capture(rows, batch):
            return self._run(rows, batch)
        self._check_places(batch)
        key = _key(rows.shape[0], batch)
        graph = self.captured.get(key)
        if graph is not None:
            self.captured.move_to_end(key)
            known = self._renewed
            if known is None or known[0] is not graph or known[1] is not batch:
                graph.renew(batch)
                self._renewed = graph, batch
            return graph.replay(rows)
        self._seen[key] = self._seen.get(key, 0) + 1
        result = self._run(rows, batch)
        if self._seen[key] > STEPS_BEFORE:
            self._capture(key, rows, batch)
        return result

    def _may_capture(self, rows: torch.Tensor, batch: AttentionBatch) -> bool:
        num_rows, num_decodes = rows.shape[0], batch.num_decodes
        if not (self.takes(num_rows) and rows.is_cpu):
            return False
        if num_decodes == 0:
            return batch.max_query_len <= MOST_QUERIES
        return num_decodes == num_rows == len(batch.query_lens)

    def _check_places(self, batch: AttentionBatch) -> None:
        """Drop the graphs that do not fit any more.

        These are all when the cache lies elsewhere or the number of threads has changed, and those
        with adapters when others have been loaded.
        """
        threads = torch.get_num_threads()
        if self._caches is not batch.caches or self._num_threads != threads:
            self.captured.clear()
            self._seen.clear()
            self._renewed = None
            self._caches, self._num_threads = batch.caches, threads
        if batch.adapters and batch.adapters != self._adapters:
            self._adapters = batch.adapters
            for key in [key for key in self._seen if isinstance(key, tuple)]:
                self.captured.pop(key, None)
                del self._seen[key]

    def _capture(self, key: Key, rows: torch.Tensor, batch: AttentionBatch) -> None:
        num_rows = rows.shape[0]
        try:
            if self._memory is None:
                self._memory = huge_pages.zeros((MOST_BYTES,), torch.uint8).numpy()
            graph = StepGraph(self._run, rows, batch, self._memory)
        except (NotRecordable, MemoryError) as error:
            too_large = isinstance(error, MemoryError)
            self._most_rows = num_rows - 1 if too_large else 0
            log.debug("steps of %d rows and more are not captured: %s", self._most_rows + 1, error)
            return
        self.captured[key] = graph
        while len(self.captured) > MOST_GRAPHS:
            oldest, _ = self.captured.popitem(last=False)
            self._seen[oldest] = STEPS_BEFORE  # captured again at its next step
