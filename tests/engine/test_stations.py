"""Stations of sequences inside the engine; a server's are in tests/e2e/test_stations.py."""

from __future__ import annotations

import logging

import pytest

from sensorium.core.plan import EncodeJob, EncodeReport, NewSequence, StepPlan
from sensorium.core.request import EngineRequest
from sensorium.engine.stations import EngineStations
from sensorium.params import SamplingParams


@pytest.mark.parametrize("is_late", [False, True])
def test_encoding_is_a_station_where_its_time_is_known_at_once(
    is_late: bool, caplog: pytest.LogCaptureFixture
) -> None:
    request = EngineRequest("r", (1, 2, 3), SamplingParams(), 4)
    new, job = NewSequence(7, request, request.token_ids), EncodeJob(b"digest", 7, 0, 2)
    plan = StepPlan(1, new=(new,), encode=(job,))
    stations = EngineStations(traces=True)
    with caplog.at_level(logging.DEBUG, "sensorium.tracing"):
        stations.scheduled(plan)
        stations.committed(plan, EncodeReport(1, 0.5, 8, 0, is_late), [])
    assert ("encoded" in caplog.text) is not is_late
    assert "scheduled" in caplog.text
