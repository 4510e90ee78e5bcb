"""What is done once, before the first request is served."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator

import pytest

from sensorium.server import launch, looplag
from tests.server.harness import running, until


@pytest.fixture
def restored() -> Iterator[None]:
    """Undo what holds for the whole process."""
    interval = sys.getswitchinterval()
    yield
    gc.unfreeze()
    sys.setswitchinterval(interval)


def test_what_stays_is_not_collected_again(restored: None) -> None:
    gc.unfreeze()
    num_objects = len(gc.get_objects())
    launch._settle()
    assert gc.get_freeze_count() > num_objects / 2
    assert len(gc.get_objects()) < num_objects / 2
    assert sys.getswitchinterval() == pytest.approx(launch._SWITCH_SECONDS)


async def test_a_server_samples_its_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    samplers: list[looplag.LagSampler] = []

    def sampler(observe: Callable[[float], None]) -> looplag.LagSampler:
        samplers.append(looplag.LagSampler(observe, 0.001))
        return samplers[-1]

    monkeypatch.setattr(launch, "LagSampler", sampler)
    async with running() as server:
        metrics = server.app.state.context.metrics
        await until(lambda: _count(metrics.render()) >= 3)
        assert not samplers[0]._timer.cancelled()
    assert samplers[0]._timer.cancelled()


def _count(text: bytes) -> float:
    """How many samples there were."""
    lines = [line for line in text.decode().splitlines() if "event_loop_lag_seconds_count" in line]
    return float(lines[0].rpartition(" ")[2])
