"""Compilation of kernels, their cache on disk, and their launch on torch's own threads.

A kernel is a C function ``void kernel(int64_t *args)`` that Numba compiles without Python objects.
``args[0]`` counts the tasks taken, ``args[1]`` the threads that entered, ``args[2]`` is the number
of tasks, the rest are addresses and sizes. Every thread runs the same function and takes tasks
until none is left.

The threads are those of the OpenMP library that torch has loaded: ``GOMP_parallel`` is what
compiled OpenMP code calls to open a parallel region. So kernels and torch share one pool and one
thread count, no second pool spins against it, and a region costs about 3 microseconds, where
Numba's own launcher would bring a second OpenMP library.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import struct
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from numba import types
from numba.core import ccallback

from sensorium.kernels.cpu.compiler.cache import NO_CACHE, KernelCache, cache_folder, warn_not_kept

log = logging.getLogger(__name__)

# Not part of Numba's public interface, and without types.
CFunc: Any = ccallback.CFunc

NUM_ARGS = 32
MOST_THREADS = 1 << 16
"""More threads than any machine runs: no limit."""
SERIAL_WEIGHT = 256 * 1024
"""Multiply-adds below which a kernel that does little else runs on one thread."""
RELEASE_WEIGHT = 256 * 1024 * 1024
"""Multiply-adds from which it runs without the GIL: some milliseconds."""
Kernel = Callable[[Any], None]

Args = ctypes.c_int64 * NUM_ARGS
"""The array of arguments; ``pack`` fills it."""


def pack(num_tasks: int, *values: int) -> Any:
    """Pack the arguments of one launch.

    They are zeroed counters, the number of tasks, then addresses and integers.
    """
    return Args(0, 0, num_tasks, *values)


@functools.lru_cache(maxsize=256)
def float_bits(value: float) -> int:
    """Return the bits of a float32 as an integer, the form in which arguments carry floats."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


@functools.cache
def find_openmp(name: str = "GOMP_parallel") -> int | None:
    """Return the address of a function of torch's OpenMP library, None if it has none."""
    if not sys.platform.startswith("linux"):
        return None
    path = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so")
    try:
        return ctypes.cast(getattr(ctypes.CDLL(path), name), ctypes.c_void_p).value
    except (OSError, AttributeError):
        log.warning("torch's OpenMP library was not found: CPU kernels run on one thread")
        return None


class Launcher:
    """One compiled kernel.

    ``serial`` runs it on the calling thread, ``parallel`` on ``torch.get_num_threads()``. Both keep
    the GIL, as taking it back from a busy thread costs more than a small kernel; ``released`` is
    for kernels that run for milliseconds. Within ``recording`` none of them runs anything.
    """

    __slots__ = ("_region", "_released", "_serial", "address")

    def __init__(self, address: int, region: int | None) -> None:
        """Wrap the kernel at ``address``; ``region``: what ``find_openmp`` returns."""
        self.address = address
        self._serial: Kernel = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(address)
        signature = (None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        self._region = None if region is None else ctypes.PYFUNCTYPE(*signature)(region)
        self._released = None if region is None else ctypes.CFUNCTYPE(*signature)(region)

    def serial(self, args: Any) -> None:
        """Run on the calling thread, holding the GIL."""
        if _RECORDING.launches is not None:
            record(self.address, args)
        else:
            self._serial(args)

    def parallel(self, args: Any, most: int = MOST_THREADS) -> None:
        """Run on all threads, but at most ``most``, holding the GIL."""
        if _RECORDING.launches is not None:
            record(self.address, args)
        elif self._region is None:
            self._serial(args)
        else:
            self._region(self.address, args, min(torch.get_num_threads(), most), 0)

    def for_weight(self, weight: int, most: int = MOST_THREADS) -> Kernel:
        """Return the way to launch a kernel of so many multiply-adds.

        That is on one thread or all, with or without the GIL. most: threads that its scratch is
        made for. The number of threads may have grown since then.
        """
        if weight < SERIAL_WEIGHT:
            return self.serial
        launch = self.parallel if weight < RELEASE_WEIGHT else self.released
        return launch if most >= MOST_THREADS else functools.partial(launch, most=most)

    def on(self, threads: int, weight: int, serial_weight: int = SERIAL_WEIGHT) -> Kernel:
        """Return the way to launch a kernel of so many multiply-adds on a number of threads.

        Below ``serial_weight`` that is the calling thread alone. Not for ``recording``.
        """
        region = self._region if weight < RELEASE_WEIGHT else self._released
        if region is None or weight < serial_weight:
            return self._serial
        address = self.address
        return lambda args: region(address, args, threads, 0)

    def released(self, args: Any, most: int = MOST_THREADS) -> None:
        """Run on all threads, but at most ``most``, without the GIL."""
        if _RECORDING.launches is not None:
            record(self.address, args)
        elif self._released is None:
            self._serial(args)
        else:
            self._released(self.address, args, min(torch.get_num_threads(), most), 0)


# -- recording ----------------------------------------------------------------------------------


@dataclass(slots=True)
class Launch:
    """One recorded launch.

    Attributes:
        address: The kernel.
        args: A copy of its arguments.
        plan: Returns arguments for another batch of the same shape, where some of them belong to
            the batch; launches with equal ``key`` share them. ``fields`` are their indexes.
        then: What runs behind it, each time; None for nothing.
    """

    address: int
    args: Any
    key: Hashable = None
    plan: Callable[[Any], Any] | None = None
    fields: Sequence[int] = ()
    then: Callable[[], object] | None = None


class NotRecordable(RuntimeError):
    """Launches that, repeated alone, would not repeat what ran between them."""


class _Recording(threading.local):
    launches: list[Launch] | None = None


_RECORDING = _Recording()


def is_recording() -> bool:
    """Return whether launches of this thread are recorded and not run."""
    return _RECORDING.launches is not None


def record(address: int, args: Any) -> None:
    """Append a launch to those that are recorded."""
    assert _RECORDING.launches is not None
    _RECORDING.launches.append(Launch(address, Args.from_buffer_copy(args)))


def renew_last(key: Hashable, plan: Callable[[Any], Any], fields: Sequence[int]) -> None:
    """Let some arguments of the launch recorded last follow from a batch, see ``Launch``."""
    assert _RECORDING.launches is not None
    last = _RECORDING.launches[-1]
    last.key, last.plan, last.fields = key, plan, fields


def run_behind_last(run: Callable[[torch.Tensor], object], x: torch.Tensor) -> None:
    """Let ``run(x)`` follow the launch recorded last, see ``Launch``.

    Only the place of ``x`` (contiguous) is kept: ``run`` gets what lies there when it is called.
    Raises NotRecordable where there is no launch, or one that something follows already.
    """
    if not _RECORDING.launches or _RECORDING.launches[-1].then is not None:
        raise NotRecordable("nothing was launched before")
    shape, dtype = x.shape, x.dtype
    bytes_there = (ctypes.c_char * x.nbytes).from_address(x.data_ptr())

    def then() -> None:
        run(torch.frombuffer(bytes_there, dtype=dtype).view(shape))

    _RECORDING.launches[-1].then = then


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect the launches of this thread within the context, instead of running them."""
    assert _RECORDING.launches is None
    launches: list[Launch] = []
    _RECORDING.launches = launches
    try:
        yield launches
    finally:
        _RECORDING.launches = None


# -- compiling ----------------------------------------------------------------------------------


def compile_kernel(function: Callable[[Any], None], variant: str) -> Launcher:
    """Compile ``function(args: int64*)``, or load it from the cache.

    ``variant`` names the element type. Compiling takes 0.2 to 3 seconds the first time on a
    machine, loading milliseconds. Works, uncached, where no cache folder can be written.
    """
    start = time.perf_counter()
    function.variant = variant  # type: ignore[attr-defined]
    function.__qualname__ += (
        f"_{variant}"  # machine code is linked by name, see ``numeric.outlined``
    )
    signature = ((types.CPointer(types.int64),), types.void)
    options = {"error_model": "numpy", "boundscheck": False, "nopython": True, "nogil": True}
    compiled = CFunc(function, signature, locals={}, options=options)
    cache = None if cache_folder() is None or _NOT_KEPT else KernelCache(function)
    if cache is not None:
        compiled._cache = cache
    try:
        compiled.compile()
    except OSError as error:
        warn_not_kept(str(cache_folder()), error.strerror)
        _NOT_KEPT.append(error)
        compiled._cache = NO_CACHE
        compiled.compile()
    finally:
        if cache is not None:
            cache.release()
    launcher = Launcher(compiled.address, find_openmp())
    _KEPT.append(compiled)
    log.debug("kernel %s (%s): %.2f s", function.__name__, variant, time.perf_counter() - start)
    return launcher


_NOT_KEPT: list[OSError] = []
"""Reason why a kernel could not be written, such as a full disk; later kernels are then not
written either."""


def assembly(launcher: Launcher) -> str:
    """Return the assembly of a kernel that this process has compiled, not loaded."""
    (own,) = (compiled for compiled in _KEPT if compiled.address == launcher.address)
    return str(own._library.get_asm_str())


_KEPT: list[Any] = []
"""Compiled functions, whose machine code must outlive every launcher."""
