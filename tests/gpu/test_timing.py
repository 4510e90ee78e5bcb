"""Time of encoding on an NVIDIA GPU is the GPU's, and nobody waits for it.

Skipped, with the reason, without one.
"""

from __future__ import annotations

import pytest
import torch

from sensorium.runtime.timing import DeviceTimer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no NVIDIA GPU"),
]

NUM_CYCLES = 100_000_000


def test_the_time_is_that_of_the_gpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    timer = DeviceTimer(device)
    with timer.measured():
        torch.cuda._sleep(NUM_CYCLES)
    assert timer.pop_seconds() == 0.0, "handed over, not done"
    torch.cuda.synchronize(device)
    assert timer.pop_seconds() > NUM_CYCLES / 10e9, "no GPU has ten billion cycles a second"
    assert timer.pop_seconds() == 0.0
