"""Handles to shared features cross the wire and open."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest

from sensorium.core.request import EngineRequest
from sensorium.engine import wire
from sensorium.engine.shared import SharedFeatures
from sensorium.multimodal.items import Features
from sensorium.multimodal.shared_memory import SharedArraysFolder
from sensorium.params import SamplingParams

ARRAYS = {
    "pixels": np.arange(100, dtype=np.uint8).reshape(1, 100),
    "scale": np.array([0.5], np.float32),
}


@pytest.fixture
def folder() -> Iterator[SharedArraysFolder]:
    folder = SharedArraysFolder()
    yield folder
    folder.close()


def crossed(features: Features) -> SharedFeatures:
    """The handle, as the engine gets it."""
    request = EngineRequest("a", (1,), SamplingParams(), 1)
    message = wire.Submit(request, (SharedFeatures.of(features),))
    received = wire.decode_to_engine(wire.encode(message))
    assert isinstance(received, wire.Submit)
    return received.features[0]


def test_features_cross_the_wire_and_come_out_equal(folder: SharedArraysFolder) -> None:
    features = Features("image", folder.write(ARRAYS), 4, {"grid": (1, 2, 2)}, precomputed=True)
    opened = crossed(features).open()
    assert (opened.modality, opened.num_embeds, opened.precomputed) == ("image", 4, True)
    assert list(opened.meta["grid"]) == [1, 2, 2]
    assert set(opened.arrays) == set(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(opened.arrays[name], array)


def test_what_is_gone_cannot_be_opened(folder: SharedArraysFolder) -> None:
    features = Features("image", folder.write(ARRAYS), 4)
    handle = crossed(features)
    del features
    gc.collect()
    with pytest.raises(FileNotFoundError):
        handle.open()


def test_only_features_in_a_segment_have_a_handle() -> None:
    with pytest.raises(TypeError, match="shared memory"):
        SharedFeatures.of(Features("image", ARRAYS, 4))
