"""Checks of processors, memory and limits.

Every check takes ``root``, the folder that holds ``proc`` and ``sys``, so that a machine can be
described by files.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path

from sensorium.cli.doctor.finding import Finding, note, ok, problem, warning
from sensorium.config import GIB
from sensorium.processes import cores
from sensorium.processes.cgroups import SYSTEM, group_folders

LEAST_MEMORY = 2 * GIB
LEAST_FILES = 4096
LEAST_PROCESSES = 512
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def processors(root: Path = SYSTEM, num_cpus: int | None = None) -> Iterator[Finding]:
    """Yield findings about cores: affinity, quota, hardware threads, slow cores.

    ``num_cpus``: of the system, by default of this one.
    """
    found = cores.find(root)
    total = num_cpus or os.cpu_count() or len(found.allowed)
    chosen = found.engine_threads()
    yield ok(
        "cores",
        f"{len(found.physical)} physical cores, {len(found.allowed)} CPUs; an engine takes "
        f"{chosen.number} threads ({chosen.reason})",
    )
    if len(found.allowed) < total:
        yield note(
            "affinity",
            f"this process may run on {len(found.allowed)} of {total} CPUs "
            f"({cores.cpu_list(found.allowed)})",
            "if that is not meant, look at taskset, at cpusets of the container and at AllowedCPUs",
        )
    if found.quota is not None and found.quota < len(found.physical):
        yield warning(
            "quota",
            f"the control group gives {found.quota:g} CPUs of time for {len(found.physical)} cores",
            "raise the limit (docker run --cpus, resources.limits.cpu, CPUQuota), best to a whole "
            "number: a quota that is used up stops all threads for the rest of each period",
        )
    if len(found.physical) == 1:
        yield note(
            "cores", "there is a single core", "media and HTTP take time from the model on it"
        )
    if len(found.nodes) > 1:
        yield note("nodes", f"{len(found.nodes)} memory nodes; an engine keeps to one of them")


def load(root: Path = SYSTEM) -> Iterator[Finding]:
    """Yield a finding when other programs keep the cores busy."""
    try:
        mean = float((root / "proc" / "loadavg").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return
    usable = cores.find(root).num_usable
    if mean > 0.5 * usable:
        yield warning(
            "load",
            f"{mean:.1f} threads wanted to run at a time in the last minute, on {usable} CPUs",
            "other programs take time from the model: an engine uses fewer threads then",
        )
    else:
        yield ok("load", f"{mean:.1f} threads ran at a time in the last minute")


def huge_pages(root: Path = SYSTEM) -> Iterator[Finding]:
    """Yield a finding about transparent huge pages, in which weights and KV cache lie."""
    path = root / "sys" / "kernel" / "mm" / "transparent_hugepage" / "enabled"
    try:
        text = path.read_text()
    except OSError:
        yield note("huge pages", "the kernel offers no transparent huge pages")
        return
    chosen = text.partition("[")[2].partition("]")[0]
    if chosen in ("always", "madvise"):
        yield ok("huge pages", f"transparent huge pages: {chosen}")
    else:
        yield warning(
            "huge pages",
            f"transparent huge pages: {chosen or text.strip()}",
            "decoding is up to a tenth faster with them: as root, echo madvise > "
            "/sys/kernel/mm/transparent_hugepage/enabled",
        )


def memory(root: Path = SYSTEM) -> Iterator[Finding]:
    """Yield findings about memory: size, what is free, swap, overcommitment."""
    facts = _meminfo(root)
    total, free = facts.get("MemTotal", 0), facts.get("MemAvailable", 0)
    limit, used = _group_memory(root)
    if limit is not None and limit < total:
        total, free = limit, min(free, max(0, limit - used))
    shown = f"{total / GIB:.1f} GiB, {free / GIB:.1f} GiB free"
    if limit is not None and total == limit:
        shown += ", by the limit of the control group"
    if free < LEAST_MEMORY:
        yield warning("memory", shown, "there is room for small models only: end other programs")
    else:
        yield ok("memory", shown)
    swapped = facts.get("SwapTotal", 0) - facts.get("SwapFree", 0)
    if swapped > 0.2 * GIB:
        yield warning(
            "swap",
            f"{swapped / GIB:.1f} GiB are swapped out",
            "weights that are swapped out make each token wait for the disk: free memory",
        )
    if _number(root / "proc" / "sys" / "vm" / "overcommit_memory") == 2:
        yield warning(
            "overcommit",
            "the kernel reserves no more memory than there is (vm.overcommit_memory = 2)",
            "a KV cache takes memory only as it is written: give it a size with "
            "--kv-cache-memory-bytes, or set vm.overcommit_memory to 0",
        )


def limits(root: Path = SYSTEM) -> Iterator[Finding]:
    """Yield findings about limits of this process: files, processes, address space."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files != resource.RLIM_INFINITY and files < LEAST_FILES:
        yield warning(
            "open files",
            f"at most {files} open files",
            "each connection takes one: ulimit -n 65536, LimitNOFILE=65536 or --ulimit nofile",
        )
    else:
        yield ok("open files", "unlimited" if files < 0 else f"at most {files}")
    counts = [resource.getrlimit(resource.RLIMIT_NPROC)[0]]
    counts += [_number(folder / "pids.max") for folder in group_folders("pids", root)]
    least = min((count for count in counts if count > 0), default=-1)
    if 0 < least < LEAST_PROCESSES:
        yield warning(
            "processes",
            f"at most {least} processes and threads",
            "raise it: ulimit -u, TasksMax, --pids-limit",
        )
    for name, kind in (("address space", resource.RLIMIT_AS), ("data", resource.RLIMIT_DATA)):
        most = resource.getrlimit(kind)[0]
        if most != resource.RLIM_INFINITY:
            yield warning(
                name,
                f"at most {most / GIB:.1f} GiB (ulimit)",
                "models and caches reserve more than they use: ulimit -v unlimited; ulimit -d "
                "unlimited",
            )


def threads(environ: Mapping[str, str] = os.environ, root: Path = SYSTEM) -> Iterator[Finding]:
    """Yield findings about variables that set the number of threads."""
    wanted = cores.find(root).engine_threads().number
    for name in _THREAD_VARIABLES:
        if name in environ:
            yield note(
                "threads",
                f"{name} is {environ[name]!r}; an engine takes {wanted} threads, or --num-threads",
                f"unset {name} unless other programs need it",
            )
    if environ.get("OMP_WAIT_POLICY", "").lower() == "active":
        yield warning(
            "threads",
            "OMP_WAIT_POLICY is active: waiting threads keep their cores busy",
            "unset it: a server's other processes wait for these cores",
        )


def architecture(machine: str, flags: frozenset[str]) -> Iterator[Finding]:
    """Yield a finding about the instruction set of the processor."""
    if machine not in ("x86_64", "AMD64"):
        yield note("instructions", f"{machine}: kernels for x86 are not used, torch's are")
    elif "avx2" not in flags:
        yield problem(
            "instructions",
            "the processor has no AVX2",
            "models run many times slower: in a virtual machine, pass the host's CPU model through",
        )
    elif "avx512f" not in flags:
        yield note("instructions", "AVX2, without AVX-512")
    else:
        names = [name for name in ("avx512_bf16", "avx512_vnni", "amx_bf16") if name in flags]
        yield ok("instructions", " ".join(["AVX-512", *names]))


def cpu_flags(root: Path = SYSTEM) -> frozenset[str]:
    """Return the flags of the first processor; none where the system does not tell."""
    try:
        text = (root / "proc" / "cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = [line for line in text.splitlines() if line.startswith("flags")]
    return frozenset(lines[0].partition(":")[2].split()) if lines else frozenset()


def _meminfo(root: Path) -> dict[str, int]:
    """Return the entries of /proc/meminfo in bytes."""
    try:
        lines = (root / "proc" / "meminfo").read_text().splitlines()
    except OSError:
        return {}
    found = {}
    for line in lines:
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdecimal():
            found[name] = int(words[0]) * 1024
    return found


def _group_memory(root: Path) -> tuple[int | None, int]:
    """Return limit and use of the control group that leaves least, None without a limit."""
    best: tuple[int | None, int] = (None, 0)
    for folder in group_folders("memory", root):
        limit = _number(folder / "memory.max", folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current", folder / "memory.usage_in_bytes")
        if limit > 0 and (best[0] is None or limit < best[0]):
            best = limit, max(0, used)
    return best


def _number(*paths: Path) -> int:
    """Return the number in the first of these files that has one; -1 if there is none."""
    for path in paths:
        try:
            return int(path.read_text())
        except (OSError, ValueError):
            continue
    return -1
