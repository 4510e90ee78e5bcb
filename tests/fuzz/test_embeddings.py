"""Embeddings of clients are read as dense finite tensors that fit the model, or refused.

Nothing in them is run.
"""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.errors import InvalidEmbeddingsError, RequestError
from sensorium.models import loader
from sensorium.models.registry import resolve
from sensorium.multimodal.items import Features
from sensorium.multimodal.parse.embeddings import decode_embeddings
from tests.fuzz import embeddings
from tests.fuzz.memory import Height
from tests.fuzz.messages import leak_in

MAX_BYTES = 1 << 22
MOST_GROWTH = 32 << 20
LOADED = loader.read_config("demo")
PROCESSOR: Any = resolve(LOADED.config).build_processor(LOADED)


def read(payload: Any) -> list[Features] | RequestError:
    """What a request's embeddings become, on the way that they take in the server."""
    height = Height()
    try:
        found = decode_embeddings(json.loads(json.dumps(payload)), max_bytes=MAX_BYTES)
        result = PROCESSOR.embeddings("image", found, "here")
    except RequestError as error:
        result = error
    assert height.grown() <= MOST_GROWTH
    return result


def check(result: list[Features] | RequestError) -> None:
    if isinstance(result, RequestError):
        assert result.code in ("invalid_embeddings", "media_too_large")
        assert not leak_in(result.message)
        return
    for features in result:
        embeds = features.arrays["embeds"]
        assert embeds.shape == (features.num_embeds, embeddings.HIDDEN)
        assert embeds.dtype == np.float32
        assert np.isfinite(embeds).all()


@pytest.mark.parametrize("name", sorted(embeddings.files()))
def test_files_as_they_are(name: str) -> None:
    data = embeddings.text(embeddings.files()[name])
    alone = {"image_embeds": data, "image_grid_thw": [embeddings.GRID]}
    result = read(data if name.startswith("both") else alone)
    check(result)
    fits = name.startswith(("good", "both"))
    assert isinstance(result, list if fits else InvalidEmbeddingsError)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
@given(st.integers(0, (1 << 32) - 1))
@settings(max_examples=800, deadline=None, derandomize=True)
def test_damaged_files(seed: int) -> None:
    check(read(embeddings.payload(random.Random(seed))))
