"""Checks that try something: ports, and the first kernel."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

from sensorium.cli.doctor.finding import Finding, ok, problem, warning

SLOW_IMPORT = 15.0
SLOW_KERNEL = 20.0


def port(host: str, number: int) -> Iterator[Finding]:
    """Yield a finding about a port that a server is to listen on."""
    where = f"{host}:{number}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, number, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        yield warning(
            "port",
            f"{where} cannot be used: {error.strerror}",
            "another server listens there, perhaps: take another port with --port",
        )
        return
    yield ok("port", f"{where} is free")


def first_kernel() -> Iterator[Finding]:
    """Yield findings about the time until a first kernel has run, and about its threads."""
    start = time.perf_counter()
    try:
        import torch

        from sensorium.kernels import ops
        from sensorium.kernels.cpu.compiler.cache import cache_folder
        from sensorium.kernels.cpu.launch import find_openmp

        imported = time.perf_counter()
        folder = cache_folder()
        before = 0 if folder is None else len(list(folder.iterdir()))
        ops.silu_mul(torch.ones(2, 64))
        ended = time.perf_counter()
    except Exception as error:  # any failure is a finding, whatever library it comes from
        yield problem(
            "first kernel",
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}",
            "reinstall torch, numba and llvmlite at the versions of constraints.txt",
        )
        return
    is_new = folder is None or len(list(folder.iterdir())) > before
    how = "compiled" if is_new else "from the cache"
    facts = (
        f"{ended - start:.1f} s: {imported - start:.1f} s for importing libraries, "
        f"{ended - imported:.2f} s for the kernel ({how})"
    )
    if imported - start > SLOW_IMPORT:
        yield warning(
            "first kernel", facts, "imports are slow: put the installation on a local disk"
        )
    elif ended - imported > SLOW_KERNEL:
        yield warning("first kernel", facts, "compiling is slow: other programs use the cores")
    else:
        yield ok("first kernel", facts)
    if find_openmp() is None:
        yield warning(
            "threads",
            "torch's OpenMP library was not found: kernels run on one thread",
            "install torch from PyPI or its own index, not from another distribution",
        )
