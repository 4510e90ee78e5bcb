"""Memory of processes, as the kernel counts it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

NUM_SAMPLES = 120
"""Of a server's memory, in a run. With less than half of that nothing is compared: it has hardly
warmed up."""
_PROGRAMS = {
    "engine": "sensorium.engine.serving.worker",
    "grammars": "sensorium.engine.grammar.worker",
    "media": "sensorium.engine.prompts.media_worker",
}
WARM_UP = 2 / 3
"""Part of a run after which memory is first compared."""
MOST_GROWTH = 1.1
SLACK_BYTES = 64 << 20
"""What a heap of several threads may keep by chance when large requests meet."""
SLACK_FILES = 64


class Height:
    """How far this process grows from now on, at its height, though it shrink again before
    anybody looks.
    """

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _highest()

    def grown(self) -> int:
        """Bytes, 0 when it did not."""
        return _highest() - self._before


def _highest() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    raise RuntimeError("the kernel does not tell how much memory a process had at most")


def family(root: int) -> dict[str, list[psutil.Process]]:
    """The processes of a server by what they do: ``http``, ``engine``, ``grammars``, ``media``.

    Fork servers with their workers.
    """
    http = psutil.Process(root)
    found: dict[str, list[psutil.Process]] = {"http": [http], **{name: [] for name in _PROGRAMS}}
    for process in http.children(recursive=True):
        try:
            command = " ".join(process.cmdline())
        except psutil.Error:  # it has just ended
            continue
        for name, program in _PROGRAMS.items():
            if program in command:
                found[name].append(process)
    return found


def resident(processes: list[psutil.Process]) -> int:
    """Bytes of the processes' own pages together; what they share counts once for none of them."""
    total = 0
    for process in processes:
        try:
            memory = process.memory_info()
        except psutil.Error:
            continue
        total += memory.rss - memory.shared
    return total


def num_files(processes: list[psutil.Process]) -> int:
    """Open files of the processes together."""
    total = 0
    for process in processes:
        try:
            total += process.num_fds()
        except psutil.Error:
            continue
    return total


@dataclass(frozen=True, slots=True)
class Sample:
    """Bytes and open files of each part of a server, at some time."""

    seconds: float
    num_bytes: dict[str, int]
    num_files: dict[str, int]


def take_sample(root: int, seconds: float) -> Sample:
    """Measure the server whose HTTP process is ``root``."""
    parts = family(root)
    return Sample(
        seconds,
        {name: resident(processes) for name, processes in parts.items()},
        {name: num_files(processes) for name, processes in parts.items()},
    )


@dataclass(frozen=True, slots=True)
class Growth:
    """What a part of a server held after the warm-up, and at the end."""

    part: str
    unit: str
    before: int
    after: int
    too_much: bool

    def __str__(self) -> str:
        return f"{self.part}: {self.before} {self.unit} after the warm-up, {self.after} at the end"


def growth(samples: Sequence[Sample]) -> list[Growth]:
    """Compare medians of the last samples of the warm-up with those at the end.

    Nothing for too few samples.
    """
    if len(samples) < NUM_SAMPLES // 2:
        return []
    warm, width = round(len(samples) * WARM_UP), len(samples) // 10
    early, late = samples[warm - width : warm], samples[-width:]
    found = []
    for part in samples[0].num_bytes:
        before, after = (_middle([s.num_bytes[part] for s in some]) for some in (early, late))
        too_much = after > before * MOST_GROWTH + SLACK_BYTES
        found.append(Growth(part, "MiB", before >> 20, after >> 20, too_much))
        before, after = (_middle([s.num_files[part] for s in some]) for some in (early, late))
        found.append(Growth(part, "open files", before, after, after > before + SLACK_FILES))
    return found


def _middle(values: list[int]) -> int:
    return sorted(values)[len(values) // 2]
