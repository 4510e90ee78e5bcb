"""Machines with other numbers of cores than this one, for the processes that a test starts.

A small C library, compiled when it is first wanted and loaded before all others, answers in place
of the C library when FFmpeg, OpenBLAS, OpenMP or Python ask how many processors there are.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static int cores(void) { const char *text = getenv("EMULATED_CORES"); return text ? atoi(text) : 1; }

/* As the kernel does it: EINVAL for a set that is too small. */
static int fill(size_t size, cpu_set_t *set) {
    if (8 * size < (size_t) cores()) return EINVAL;
    memset(set, 0, size);
    for (int core = 0; core < cores(); core++) CPU_SET_S(core, size, set);
    return 0;
}

int sched_getaffinity(pid_t process, size_t size, cpu_set_t *set) {
    errno = fill(size, set);
    return errno ? -1 : 0;
}
int pthread_getaffinity_np(pthread_t thread, size_t size, cpu_set_t *set) { return fill(size, set); }
int sched_setaffinity(pid_t process, size_t size, const cpu_set_t *set) { return 0; }
int pthread_setaffinity_np(pthread_t thread, size_t size, const cpu_set_t *set) { return 0; }
int get_nprocs(void) { return cores(); }
int get_nprocs_conf(void) { return cores(); }

int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *argument) {
    static int (*next)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    if (getenv("NO_THREADS")) return EAGAIN;
    if (!next) next = (int (*)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *))
        dlsym(RTLD_NEXT, "pthread_create");
    return next(thread, attributes, run, argument);
}

long sysconf(int name) {
    static long (*next)(int);
    if (name == _SC_NPROCESSORS_ONLN || name == _SC_NPROCESSORS_CONF) return cores();
    if (!next) next = (long (*)(int)) dlsym(RTLD_NEXT, "sysconf");
    return next(name);
}
"""


@functools.cache
def _library() -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler to build the library that emulates cores")
    folder = Path(tempfile.mkdtemp(prefix="sensorium-cores-"))
    source, library = folder / "cores.c", folder / "cores.so"
    source.write_text(_SOURCE)
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    return library


def environment(num_cores: int, *, threads: bool = True) -> dict[str, str]:
    """What a process has to find in its environment to see so many cores; its children do as well.

    Without ``threads`` the system has none for them, as where a limit on processes has been
    reached.

    Variables that would bound the threads of libraries are emptied: users set none.
    """
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
    kept = {name: value for name, value in os.environ.items() if name not in names}
    more = {"LD_PRELOAD": str(_library()), "EMULATED_CORES": str(num_cores)}
    return kept | more | ({} if threads else {"NO_THREADS": "1"})
