"""Hidden states to vectors: cut, then normalised, in float32; what is not finite is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sensorium.core.plan import NewSequence, unusable
from sensorium.core.request import EngineRequest
from sensorium.params import PoolingParams, SamplingParams
from sensorium.runtime.pooler import pool
from sensorium.runtime.slots import Slot


def slot(seq_id: int, pooling: PoolingParams | None) -> Slot:
    max_tokens = 0 if pooling is not None else 1
    request = EngineRequest("r", (1, 2), SamplingParams(), max_tokens, pooling=pooling)
    return Slot.of(NewSequence(seq_id, request, request.token_ids))


def found(vector: bytes) -> np.ndarray:
    return np.frombuffer(vector, "<f4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cut_then_normalised(dtype: torch.dtype) -> None:
    hidden = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    slots = [
        slot(7, PoolingParams(normalize=True)),
        slot(3, PoolingParams(dimensions=5, normalize=True)),
        slot(9, PoolingParams(dimensions=16, normalize=False)),
    ]
    vectors, failed = pool(hidden, slots)
    rows = hidden.float().double().numpy()
    assert not failed
    np.testing.assert_allclose(found(vectors[7]), rows[0] / np.linalg.norm(rows[0]), atol=1e-6)
    cut = rows[1][:5]
    np.testing.assert_allclose(found(vectors[3]), cut / np.linalg.norm(cut), atol=1e-6)
    np.testing.assert_array_equal(found(vectors[9]), hidden[2].float().numpy())


def test_rows_that_are_not_finite_fail_alone() -> None:
    hidden = torch.ones(3, 4)
    hidden[0, 3], hidden[2, 0] = torch.nan, torch.inf
    params = PoolingParams(dimensions=2, normalize=True)
    vectors, failed = pool(hidden, [slot(i, params) for i in range(3)])
    assert set(vectors) == {1}
    why = unusable("this input", "its embedding's numbers are infinite or undefined", "float32")
    assert failed == {0: why, 2: why}


def test_a_vector_of_zeros_stays_one() -> None:
    vectors, _ = pool(torch.zeros(1, 4), [slot(0, PoolingParams(normalize=True))])
    np.testing.assert_array_equal(found(vectors[0]), np.zeros(4))


def test_a_generating_sequence_has_no_vector() -> None:
    with pytest.raises(ValueError, match="sequence 0 generates"):
        pool(torch.zeros(1, 4), [slot(0, None)])
