"""Growth is seen where there is some, and not where there is none."""

from __future__ import annotations

import subprocess
import sys

import psutil

from tests.fuzz.memory import NUM_SAMPLES, Sample, family, growth, num_files, resident

MIB = 1 << 20


def samples(bytes_each: int, files_each: int = 0, num: int = NUM_SAMPLES) -> list[Sample]:
    """A part that warms up to 500 MiB and grows by so much from each sample to the next."""
    return [
        Sample(
            i, {"engine": min(i * 50, 500) * MIB + i * bytes_each}, {"engine": 9 + i * files_each}
        )
        for i in range(num)
    ]


def test_growth() -> None:
    flat = growth(samples(0))
    assert [(g.part, g.unit, g.before, g.after) for g in flat] == [
        ("engine", "MiB", 500, 500),
        ("engine", "open files", 9, 9),
    ]
    assert not any(g.too_much for g in flat)
    assert [g.too_much for g in growth(samples(4 * MIB))] == [True, False]
    assert [g.too_much for g in growth(samples(0, 2))] == [False, True]
    assert growth(samples(4 * MIB, num=NUM_SAMPLES // 2 - 1)) == []


HEIGHT = """
import numpy as np
from tests.fuzz.memory import Height

height = Height()
np.ones(256 << 20, np.uint8).sum()
print(height.grown(), Height().grown())
"""


def test_height_sees_what_is_freed_again() -> None:
    """In a process of its own: threads of earlier tests may free as much here at the same moment."""
    done = subprocess.run(
        [sys.executable, "-c", HEIGHT], capture_output=True, text=True, check=True, timeout=300
    )
    grown, afterwards = map(int, done.stdout.split())
    assert grown > 128 * MIB
    assert afterwards < 128 * MIB


def test_this_process() -> None:
    own = psutil.Process()
    parts = family(own.pid)
    assert parts["http"] == [own]
    assert resident(parts["http"]) > 10 * MIB
    with open("/dev/null") as first, open("/dev/null") as second:
        assert num_files(parts["http"]) >= 2, (first, second)
