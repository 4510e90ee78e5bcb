"""Folders with the files in which Linux describes the processors of a machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

V1_MOUNTS = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 {inner} /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
33 31 0:30 {inner} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
"""
V2_MOUNT = "30 23 0:26 {inner} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def write(root: Path, path: str, text: object) -> None:
    file = root / path.lstrip("/")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{text}\n")


def add_cores(
    root: Path,
    cores: Iterable[Sequence[int]],
    *,
    socket: int = 0,
    name: str = "core_cpus_list",
) -> None:
    """Describe physical cores of a socket by their hardware threads."""
    for core in cores:
        for cpu in core:
            topology = f"sys/devices/system/cpu/cpu{cpu}/topology"
            write(root, f"{topology}/{name}", ",".join(map(str, core)))
            write(root, f"{topology}/physical_package_id", socket)


def add_node(root: Path, number: int, cpus: str) -> None:
    write(root, f"sys/devices/system/node/node{number}/cpulist", cpus)


def add_v2(root: Path, group: str, *, inner: str = "/", **quotas: str) -> None:
    """Mount version 2 with this process in ``group``; quotas by group, ``_`` for a slash."""
    write(root, "proc/self/cgroup", f"0::{group}")
    write(root, "proc/self/mountinfo", V2_MOUNT.format(inner=inner).rstrip())
    for name, quota in quotas.items():
        write(root, f"sys/fs/cgroup/{name.replace('_', '/')}/cpu.max", quota)


def add_v1(root: Path, group: str, *, inner: str = "/", **quotas: tuple[int, int]) -> None:
    """The same with version 1, where quota and period are two files."""
    lines = (f"3:memory:{group}", f"2:cpu,cpuacct:{group}", "0::/")
    write(root, "proc/self/cgroup", "\n".join(lines))
    write(root, "proc/self/mountinfo", V1_MOUNTS.format(inner=inner).rstrip())
    for name, (quota, period) in quotas.items():
        folder = f"sys/fs/cgroup/cpu,cpuacct/{name.replace('_', '/')}"
        write(root, f"{folder}/cpu.cfs_quota_us", quota)
        write(root, f"{folder}/cpu.cfs_period_us", period)
