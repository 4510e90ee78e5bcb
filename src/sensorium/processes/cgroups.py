"""Control groups of this process: the folders in which the kernel shows their limits.

Version 1 has a tree of groups for each controller, version 2 one for all; some systems have both.
A container often sees only a part of the tree, mounted as if it were the whole
(https://docs.kernel.org/admin-guide/cgroup-v2.html, namespaces; ``man 5 proc_pid_mountinfo``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

SYSTEM = Path("/")


def cpu_quota(root: Path = SYSTEM) -> float | None:
    """Return how many CPUs' time this process's groups may take, None where nothing limits them.

    A group shares the quota of the one around it, so the least of all levels counts. ``root``: the
    folder that holds ``proc`` and ``sys``. Files that are missing or make no sense limit nothing.
    """
    found = [_quota_of(folder) for folder in group_folders("cpu", root)]
    return min((quota for quota in found if quota is not None), default=None)


def group_folders(controller: str, root: Path = SYSTEM) -> list[Path]:
    """Return the folders of the groups that a controller holds this process to, inner ones first.

    Of version 2 every group is among them, as there the controllers are files.
    """
    groups = _groups(root)
    found: list[Path] = []
    for kind, inner, point, options in _mounts(root):
        if kind == "cgroup2":
            group = groups.get("")
        elif controller in options:
            group = groups.get(controller)
        else:
            continue
        if group is not None:
            found += _upwards(root / point.lstrip("/"), inner, group)
    return list(dict.fromkeys(found))


def _groups(root: Path) -> dict[str, str]:
    """Return the path of the group by controller; that of version 2 has the empty name."""
    found: dict[str, str] = {}
    for line in _lines(root / "proc" / "self" / "cgroup"):
        _, _, rest = line.partition(":")
        controllers, separator, path = rest.partition(":")
        if separator:
            found |= dict.fromkeys(controllers.split(","), path)
    return found


def _mounts(root: Path) -> Iterator[tuple[str, str, str, set[str]]]:
    """Yield kind, root within the tree of groups, mount point and controllers of the mounts."""
    for line in _lines(root / "proc" / "self" / "mountinfo"):
        before, _, after = line.partition(" - ")
        fields, (kind, *more) = before.split(" "), after.split(" ")
        if kind in ("cgroup", "cgroup2") and len(fields) > 4:
            options = set(more[1].split(",")) if len(more) > 1 else set()
            yield kind, _unescaped(fields[3]), _unescaped(fields[4]), options


def _upwards(point: Path, inner: str, group: str) -> list[Path]:
    """Return the folders from a group up to the mount point, as far as they can be seen."""
    path = PurePosixPath(group)
    if inner != "/" and path.is_relative_to(inner):
        path = PurePosixPath("/") / path.relative_to(inner)
    parts = path.parts[1:]
    if ".." in parts or not point.joinpath(*parts).is_dir():
        parts = ()  # a group that is not shown here; what is mounted is all that is known of it
    return [point.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def _quota_of(folder: Path) -> float | None:
    """Return the quota of one group, in CPUs."""
    words = " ".join(_lines(folder / "cpu.max")).split()
    if not words:
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        words = [word for name in names for word in _lines(folder / name)]
    try:
        time, period = (float(word) for word in words)
    except ValueError:  # "max", or no such files
        return None
    if not (0 < time < math.inf and 0 < period < math.inf):
        return None  # version 1 writes -1 for none
    return time / period


def _lines(path: Path) -> list[str]:
    """Return the lines of a file, none if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _unescaped(path: str) -> str:
    """Return a path of mountinfo, in which spaces and their kin stand as octal numbers."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)
