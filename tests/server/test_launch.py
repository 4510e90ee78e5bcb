"""What is done once, before the first request is served."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from typing import Self

import pytest

from sensorium.config import ServerConfig
from sensorium.errors import ConfigError
from sensorium.server import launch
from sensorium.server.http import loop_lag
from tests.server.harness import running, until


@pytest.fixture
def restored() -> Iterator[None]:
    """Undo what holds for the whole process."""
    interval, num_frozen = sys.getswitchinterval(), gc.get_freeze_count()
    yield
    gc.unfreeze()
    if num_frozen:  # as tests/conftest.py has left it
        gc.freeze()
    sys.setswitchinterval(interval)


def test_what_stays_is_not_collected_again(restored: None) -> None:
    gc.unfreeze()
    num_objects = len(gc.get_objects())
    launch.reduce_pauses()
    assert gc.get_freeze_count() > num_objects / 2
    assert len(gc.get_objects()) < num_objects / 2
    assert sys.getswitchinterval() == pytest.approx(launch.SWITCH_SECONDS)


async def test_a_server_samples_its_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    running_now: list[loop_lag.LagSampler] = []

    class Sampler(loop_lag.LagSampler):
        def __init__(self, observe: Callable[[float], None]) -> None:
            super().__init__(observe, 0.001)

        def __enter__(self) -> Self:
            running_now.append(self)
            return super().__enter__()

        def __exit__(self, *error: object) -> None:
            super().__exit__(*error)
            running_now.remove(self)

    monkeypatch.setattr(launch, "LagSampler", Sampler)
    async with running() as server:
        metrics = server.app.state.context.metrics
        await until(lambda: _count(metrics.render()) >= 3)
        assert len(running_now) == 1
    assert not running_now


def _count(text: bytes) -> float:
    """How many samples there were."""
    lines = [line for line in text.decode().splitlines() if "event_loop_lag_seconds_count" in line]
    return float(lines[0].rpartition(" ")[2])


@pytest.mark.parametrize("name", ["messages", "tools", "_private"])
def test_variables_that_no_template_can_be_given_are_found_at_start(name: str) -> None:
    """Else every chat request would be refused, for a field that nobody sent."""
    with pytest.raises(ConfigError, match=f"default_chat_template_kwargs may not set '{name}'"):
        launch.check_config(ServerConfig(default_chat_template_kwargs={name: 1}))
    launch.check_config(ServerConfig(default_chat_template_kwargs={"enable_thinking": False}))
