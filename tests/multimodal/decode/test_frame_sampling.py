"""Indices of frames equal those of the published processors, and within the limits of the
configuration.
"""

from __future__ import annotations

import functools
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.multimodal.decode.video import frame_sampling
from sensorium.multimodal.processor import FrameChoice, VideoFacts
from tests.multimodal.published import published

TOTALS = [*range(1, 130), 449, 450, 900, 1799, 1800, 17982, 18000]
RATES = [(25.0, 1.0), (25.0, 2.0), (30.0, 2.0), (29.97, 0.5), (10.0, 10.0), (24.0, 0.1)]
NOBODY = FrameChoice()


def facts(total: int, fps: float | None = None) -> VideoFacts:
    return VideoFacts(total, fps)


def metadata(total: int, fps: float | None = None) -> SimpleNamespace:
    return SimpleNamespace(total_num_frames=total, fps=fps)


def test_uniform_equals_the_base_class() -> None:
    from transformers.video_utils import default_sample_indices_fn

    for total in TOTALS:
        for num in (1, 2, 7, 8, 16, 31, 32, 64):
            if num <= total:
                expected = default_sample_indices_fn(metadata(total), num_frames=num)
                found = frame_sampling.uniform(facts(total), FrameChoice(num_frames=num))
                np.testing.assert_array_equal(found, expected)
        for rate, fps in RATES:
            expected = default_sample_indices_fn(metadata(total, rate), fps=fps)
            found = frame_sampling.uniform(facts(total, rate), FrameChoice(fps=fps))
            np.testing.assert_array_equal(found, expected)


def test_qwen2_vl_equals_the_published_one() -> None:
    """Theirs counts in single precision, which may add an index past the end: that is left out."""
    theirs = published("qwen2_vl", "sample_frames")
    processor = SimpleNamespace(
        num_frames=None, fps=None, temporal_patch_size=2, min_frames=4, max_frames=768
    )
    num_checked = 0
    for total in TOTALS:
        wishes = [(None, {"num_frames": num}) for num in (2, 3, 4, 5, 7, 8, 16, 31, 32, 64, 768)]
        wishes += [(rate, {"fps": fps}) for rate, fps in RATES]
        for rate, wish in wishes:
            try:
                expected = theirs(processor, metadata(total, rate), **wish).numpy()
            except (ValueError, ZeroDivisionError):
                continue  # more frames than there are, or a video shorter than a temporal patch
            found = frame_sampling.qwen2_vl(facts(total, rate), FrameChoice(**wish))
            np.testing.assert_array_equal(found, expected[expected < total], str((total, wish)))
            num_checked += 1
    assert num_checked > 1500


def test_qwen2_vl_where_the_published_one_fails() -> None:
    assert frame_sampling.qwen2_vl(facts(5), FrameChoice(num_frames=32)).tolist() == [0, 1, 2, 3, 4]
    assert frame_sampling.qwen2_vl(facts(100), FrameChoice(num_frames=1)).tolist() == [0]
    assert frame_sampling.qwen2_vl(facts(1, 25.0), FrameChoice(fps=2.0)).tolist() == [0]
    assert frame_sampling.qwen2_vl(facts(3, 25.0), FrameChoice(fps=2.0)).tolist() == [0, 1]


def test_qwen2_vl_bounds_what_a_rate_gives() -> None:
    rule = functools.partial(frame_sampling.qwen2_vl, min_frames=6, max_frames=10)
    assert len(rule(facts(1000, 10.0), FrameChoice(fps=5.0))) == 10
    assert len(rule(facts(1000, 1000.0), FrameChoice(fps=1.0))) == 6
    assert len(rule(facts(1000), FrameChoice(num_frames=40))) == 40


def test_qwen3_vl_equals_the_published_one() -> None:
    theirs = published("qwen3_vl", "sample_frames")
    processor = SimpleNamespace(fps=2, min_frames=4, max_frames=768)
    for total in TOTALS:
        for num in (2, 7, 16, 32):
            if num <= total:
                expected = theirs(processor, metadata(total), num_frames=num)
                found = frame_sampling.qwen3_vl(facts(total), FrameChoice(num_frames=num))
                np.testing.assert_array_equal(found, expected)
        for rate, fps in RATES:
            expected = theirs(processor, metadata(total, rate), fps=fps)
            found = frame_sampling.qwen3_vl(facts(total, rate), FrameChoice(fps=fps))
            np.testing.assert_array_equal(found, expected)
        default = functools.partial(frame_sampling.qwen3_vl, default=FrameChoice(fps=2))
        expected = theirs(processor, metadata(total, 30.0))
        np.testing.assert_array_equal(default(facts(total, 30.0), NOBODY), expected)


def test_minicpm_v_is_one_frame_a_second() -> None:
    for total in TOTALS:
        for rate in (8.0, 25.0, 29.97, 0.4):
            every = list(range(0, total, max(1, round(rate))))
            if len(every) > 64:
                gap = len(every) / 64
                every = [every[int(i * gap + gap / 2)] for i in range(64)]
            assert frame_sampling.minicpm_v(facts(total, rate), NOBODY).tolist() == every
    assert len(frame_sampling.minicpm_v(facts(100), NOBODY)) == 100
    assert len(frame_sampling.minicpm_v(facts(100), FrameChoice(num_frames=9))) == 9
    assert len(frame_sampling.minicpm_v(facts(1000, 10.0), FrameChoice(fps=2.0, num_frames=9))) == 9


RULES = [
    frame_sampling.uniform,
    frame_sampling.qwen2_vl,
    frame_sampling.qwen3_vl,
    frame_sampling.minicpm_v,
]


def wishes() -> st.SearchStrategy[FrameChoice]:
    number = st.none() | st.integers(1, 80) | st.just(frame_sampling.ALL_FRAMES)
    return st.builds(
        FrameChoice,
        num_frames=number,
        fps=st.none() | st.floats(0.01, 1000),
        at_most=st.none() | st.integers(1, 40),
        given=st.booleans(),
    )


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(RULES),
    st.integers(1, 3000),
    st.none() | st.floats(0.01, 1000),
    wishes(),
    wishes(),
)
def test_what_holds_for_every_rule(
    rule, total: int, fps: float | None, choice: FrameChoice, asked: FrameChoice
) -> None:
    found = rule(facts(total, fps), choice, asked=asked)
    assert found.dtype == np.int64
    assert len(found) >= 1
    assert found[0] >= 0
    assert found[-1] < total
    assert (np.diff(found) > 0).all()
    if choice.at_most is not None:
        assert len(found) <= choice.at_most
    wish = next((w for w in (choice, asked) if w.num_frames or w.fps), None)
    if wish is None and choice.given and choice.at_most is None:
        assert len(found) == total
    if wish is not None and wish.num_frames is not None:
        assert len(found) <= (
            wish.num_frames + 1 if rule is frame_sampling.qwen2_vl else wish.num_frames
        )


def test_who_decides() -> None:
    """The loading's options before the processor's, these before the checkpoint's, and 32 frames
    where nobody says.
    """
    rule = functools.partial(frame_sampling.uniform, asked=FrameChoice(num_frames=5))
    assert len(rule(facts(100, 10.0), FrameChoice(num_frames=7))) == 7
    assert len(rule(facts(100, 10.0), FrameChoice(fps=2.0))) == 20
    assert len(rule(facts(100, 10.0), NOBODY)) == 5
    assert len(frame_sampling.uniform(facts(100), NOBODY)) == 32
    assert len(frame_sampling.uniform(facts(100), FrameChoice(given=True))) == 100
    assert len(frame_sampling.uniform(facts(100, 10.0), FrameChoice(num_frames=7, fps=2.0))) == 7
    assert len(frame_sampling.uniform(facts(100, 10.0), FrameChoice(num_frames=30, fps=2.0))) == 20
    assert len(frame_sampling.uniform(facts(100), FrameChoice(fps=2.0))) == 100


@pytest.mark.parametrize("rule", RULES)
def test_rules_go_to_workers(rule) -> None:
    bound = functools.partial(rule, asked=FrameChoice(num_frames=5))
    again = pickle.loads(pickle.dumps(bound))
    np.testing.assert_array_equal(again(facts(50), NOBODY), bound(facts(50), NOBODY))
