"""The order of windows in Qwen2.5-VL's vision tower."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sensorium.models.families.qwen2_5_vl.vision import window_order


def test_the_example_of_the_module() -> None:
    order, sizes = window_order([(1, 10, 12)], 2, 4)
    assert sizes == [16, 8, 4, 2]
    assert order.tolist()[:8] == [0, 1, 2, 3, 6, 7, 8, 9]
    assert order.tolist()[16:] == [4, 5, 10, 11, 16, 17, 22, 23, 24, 25, 26, 27, 28, 29]


grids = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4
)


@given(grids=grids, window=st.integers(1, 5))
def test_every_cell_is_in_one_window_of_its_frame(
    grids: list[tuple[int, int, int]], window: int
) -> None:
    order, sizes = window_order([(t, 2 * h, 2 * w) for t, h, w in grids], 2, window)
    assert sorted(order.tolist()) == list(range(sum(t * h * w for t, h, w in grids)))
    places = [
        (item, frame, row // window, column // window)
        for item, (t, h, w) in enumerate(grids)
        for frame in range(t)
        for row in range(h)
        for column in range(w)
    ]
    assert 0 < min(sizes) <= max(sizes) <= window**2
    for cells in np.split(order, np.cumsum(sizes)[:-1]):
        assert len({places[cell] for cell in cells}) == 1
    assert len(sizes) == len(set(places))
    frames = [places[cell][:2] for cell in order]
    assert frames == sorted(frames), "the rows of a frame stay together"
