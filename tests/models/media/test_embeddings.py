"""Precomputed embeddings: what is taken, and that everything else is refused with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sensorium.errors import InvalidEmbeddingsError
from sensorium.models import loader
from sensorium.models.registry import resolve
from tests.checkpoints import make_llava, make_qwen2_vl

PARAM = "multi_modal_data.image"
NUM, HIDDEN = 16, 64


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return processor_of(make_llava(tmp_path_factory.mktemp("llava")))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return processor_of(make_qwen2_vl(tmp_path_factory.mktemp("qwen")))


def processor_of(folder: Path) -> Any:
    loaded = loader.read_config(str(folder))
    return resolve(loaded.config).build_processor(loaded)


def values(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_llava_takes_tensors_lists_and_arrays(llava: Any, dtype: torch.dtype) -> None:
    batch = values(2, NUM, HIDDEN, dtype=dtype)
    forms = [batch, list(batch), [batch[:1], batch[1]]]
    if dtype != torch.bfloat16:
        forms += [batch.numpy(), list(batch.numpy())]
    for form in forms:
        found = llava.embeddings("image", form, PARAM)
        assert [f.num_embeds for f in found] == [NUM, NUM]
        assert all(f.precomputed and f.modality == "image" for f in found)
        for features, expected in zip(found, batch, strict=True):
            embeds = features.arrays["embeds"]
            assert embeds.dtype == np.float32
            assert embeds.flags.c_contiguous
            np.testing.assert_array_equal(embeds, expected.float().numpy())


def test_llava_takes_one_bare_item(llava: Any) -> None:
    (features,) = llava.embeddings("image", values(NUM, HIDDEN).t().contiguous().t(), PARAM)
    assert features.arrays["embeds"].shape == (NUM, HIDDEN)
    assert features.arrays["embeds"].flags.c_contiguous


def spoiled(value: float) -> torch.Tensor:
    tensor = values(1, NUM, HIDDEN)
    tensor[0, 3, 5] = value
    return tensor


WRONG_FOR_LLAVA: dict[str, tuple[Any, str, str]] = {
    "hidden size": (values(1, NUM, 63), r"hidden size 64 .* \(16, 63\)", f"{PARAM}[0]"),
    "count": (values(2, 15, HIDDEN), r"16 embeddings .* \(15, 64\)", f"{PARAM}[0]"),
    "second item": ([values(NUM, HIDDEN), values(17, HIDDEN)], r"\(17, 64\)", f"{PARAM}[1]"),
    "one dimension": (values(HIDDEN), "3 dimensions", PARAM),
    "four dimensions": (values(1, 1, NUM, HIDDEN), "3 dimensions", PARAM),
    "no items": (values(0, NUM, HIDDEN), "at least one item", PARAM),
    "list of vectors": ([values(HIDDEN)], "2 dimensions", f"{PARAM}[0]"),
    "empty list": ([], "an empty list", PARAM),
    "integers": (torch.ones(1, NUM, HIDDEN, dtype=torch.int64), "int64", PARAM),
    "booleans": (np.ones((1, NUM, HIDDEN), bool), "bool", PARAM),
    "complex": (values(1, NUM, HIDDEN).to(torch.complex64), "complex64", PARAM),
    "strings": ("abc", "got str", PARAM),
    "mapping": ({"image_embeds": values(1, NUM, HIDDEN), "more": 1}, "alone, got one", PARAM),
    "list of lists": ([[[0.5] * HIDDEN] * NUM], "got list", f"{PARAM}[0]"),
    "NaN": (spoiled(float("nan")), "1 of 1024 values are NaN", PARAM),
    "infinite": (spoiled(float("-inf")), "NaN or infinite", PARAM),
    "past float32": (spoiled(1.0).double() * 1e300, "finite in float32", PARAM),
    "sparse": (values(1, NUM, HIDDEN).to_sparse(), "sparse_coo", PARAM),
    "sparse rows": (lambda: [values(NUM, HIDDEN).to_sparse_csr()], "sparse_csr", f"{PARAM}[0]"),
    "quantized": (
        lambda: torch.quantize_per_tensor(values(1, NUM, HIDDEN), 0.1, 0, torch.qint8),
        "quantized",
        PARAM,
    ),
    "meta": (torch.empty(1, NUM, HIDDEN, device="meta"), "meta", PARAM),
    "nested": (lambda: torch.nested.nested_tensor([values(NUM, HIDDEN)]), "nested", PARAM),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch: these kinds of tensors are not mature
@pytest.mark.parametrize("name", sorted(WRONG_FOR_LLAVA))
def test_llava_refuses(llava: Any, name: str) -> None:
    source, pattern, place = WRONG_FOR_LLAVA[name]
    source = source() if callable(source) else source
    with pytest.raises(InvalidEmbeddingsError, match=pattern) as caught:
        llava.embeddings("image", source, PARAM)
    assert caught.value.param == place
    assert caught.value.code == "invalid_embeddings"


def test_qwen_splits_by_grid(qwen: Any) -> None:
    embeds = values(10, HIDDEN)
    for grids in (torch.tensor([[1, 4, 4], [1, 2, 12]]), [[1, 4, 4], [1, 2, 12]]):
        source = {"image_embeds": embeds, "image_grid_thw": grids}
        first, second = qwen.embeddings("image", source, PARAM)
        assert (first.meta["grid"], second.meta["grid"]) == ((1, 4, 4), (1, 2, 12))
        assert (first.num_embeds, second.num_embeds) == (4, 6)
        np.testing.assert_array_equal(second.arrays["embeds"], embeds[4:].numpy())
        assert second.arrays["embeds"].flags.c_contiguous


def test_qwen_takes_one_grid(qwen: Any) -> None:
    source = {"image_embeds": values(4, HIDDEN), "image_grid_thw": np.array([1, 4, 4])}
    assert [f.num_embeds for f in qwen.embeddings("image", source, PARAM)] == [4]


def grid(embeds: Any, grids: Any) -> dict[str, Any]:
    return {"image_embeds": embeds, "image_grid_thw": grids}


WRONG_FOR_QWEN: dict[str, tuple[Any, str]] = {
    "no mapping": (values(1, 4, HIDDEN), "mapping with 'image_embeds'"),
    "no grid": ({"image_embeds": values(4, HIDDEN)}, "image_grid_thw"),
    "another key": ({**grid(values(4, HIDDEN), [[1, 4, 4]]), "more": 1}, "'more'"),
    "dimensions": (grid(values(1, 1, 4, HIDDEN), [[1, 4, 4]]), "3 dimensions"),
    "count of items": (
        grid(values(2, 4, HIDDEN), [[1, 4, 4]]),
        "There is 1 grid for .* of 2 items",
    ),
    "count of one": (grid(values(2, 4, HIDDEN), [[1, 4, 4], [1, 2, 4]]), "2 embeddings, .* are 4"),
    "hidden size": (grid(values(4, 65), [[1, 4, 4]]), r"hidden size 64 .* \(4, 65\)"),
    "count": (grid(values(5, HIDDEN), [[1, 4, 4]]), "together 4, but there are 5"),
    "huge grid": (grid(values(4, HIDDEN), [[1 << 30, 1 << 30, 1 << 30]]), "there are 4"),
    "odd grid": (grid(values(4, HIDDEN), [[1, 4, 3]]), r"multiples of 2; got \(1, 4, 3\)"),
    "zero grid": (grid(values(4, HIDDEN), [[0, 4, 4]]), "positive"),
    "negative grid": (grid(values(4, HIDDEN), [[-1, -4, 4]]), "positive"),
    "float grid": (grid(values(4, HIDDEN), [[1.0, 4.0, 4.0]]), "integers of shape"),
    "ragged grid": (grid(values(4, HIDDEN), [[1, 4], [1]]), "integers of shape"),
    "shape of grid": (grid(values(4, HIDDEN), [[1, 4]]), "integers of shape"),
    "no grids": (grid(values(4, HIDDEN), np.zeros((0, 3), int)), "integers of shape"),
    "NaN": (grid(values(4, HIDDEN) * float("nan"), [[1, 4, 4]]), "NaN"),
}


@pytest.mark.parametrize("name", sorted(WRONG_FOR_QWEN))
def test_qwen_refuses(qwen: Any, name: str) -> None:
    source, pattern = WRONG_FOR_QWEN[name]
    with pytest.raises(InvalidEmbeddingsError, match=pattern) as caught:
        qwen.embeddings("image", source, PARAM)
    assert caught.value.param.startswith(PARAM)
