from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensorium.bench.summary import percentile, summarize

NUMBERS = st.lists(st.floats(0, 1e6), min_size=1, max_size=50)


@given(NUMBERS, st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], percent: float) -> None:
    expected = np.percentile(values, percent)
    assert percentile(sorted(values), percent) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_summary_of_known_values() -> None:
    summary = summarize([float(value) for value in range(100, -1, -1)])
    assert summary is not None
    assert (summary.mean, summary.minimum, summary.maximum) == (50.0, 0.0, 100.0)
    assert (summary.p50, summary.p90, summary.p95, summary.p99) == (50.0, 90.0, 95.0, 99.0)


def test_nothing_has_no_summary() -> None:
    assert summarize([]) is None


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], -1), ([1.0], 101)])
def test_wrong_percentiles(values: list[float], percent: float) -> None:
    with pytest.raises(ValueError):
        percentile(values, percent)
