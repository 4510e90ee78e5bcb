"""Encoders that are loaded without their decoder make the same bits as the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sensorium.config import engine_config
from sensorium.engine.encoding import ItemEncoder
from sensorium.errors import ConfigError
from sensorium.models import loader
from sensorium.models.loading import weights
from sensorium.models.loading.fill import weight_bytes
from sensorium.multimodal.items import Audio
from sensorium.ray.encoders.check import check_encoders
from tests.checkpoints import (
    make_llava,
    make_llava_onevision,
    make_minicpmv,
    make_phi3_v,
    make_qwen2_5_vl,
    make_qwen2_vl,
    make_qwen3_vl,
    make_text,
    make_ultravox,
)
from tests.checkpoints.hf import make_hf
from tests.models.harness import modality_of, picture

RNG = np.random.default_rng(3)
PICTURE = picture(84, 112, seed=1)
SOUND = Audio(RNG.normal(0, 0.1, 9000).astype(np.float32), 16000)
FAMILIES: dict[str, tuple[Callable[..., Path], Any]] = {
    "llava": (make_llava, PICTURE),
    "llava_onevision": (make_llava_onevision, PICTURE),
    "minicpmv": (make_minicpmv, PICTURE),
    "phi3_v": (make_phi3_v, PICTURE),
    "qwen2_vl": (make_qwen2_vl, PICTURE),
    "qwen2_5_vl": (make_qwen2_5_vl, PICTURE),
    "qwen3_vl": (make_qwen3_vl, PICTURE),
    "ultravox": (make_ultravox, SOUND),
}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of weights that were read."""
    names: list[str] = []
    plain = weights.SafetensorsFiles.read

    def read(self: weights.SafetensorsFiles, part: Any) -> Any:
        names.append(part.name)
        return plain(self, part)

    monkeypatch.setattr(weights.SafetensorsFiles, "read", read)
    return names


@pytest.mark.parametrize("family", FAMILIES)
def test_encoders_alone_make_the_same_bits(family: str, tmp_path: Path, read: list[str]) -> None:
    build, data = FAMILIES[family]
    folder = build(tmp_path)
    whole = loader.load(str(folder), device="cpu", dtype="float32")
    assert whole.processor is not None
    of_decoder = {
        part.name
        for slot in whole.model.slots()  # type: ignore[attr-defined]
        if slot.role != "encoder"
        for part in slot.parts
    }
    features = whole.processor.process(modality_of(data), data, {})
    with torch.inference_mode():
        [expected] = whole.model.encode([features])
    read.clear()
    encoder = ItemEncoder(engine_config(model=str(folder), dtype="float32", device="cpu"))
    assert read
    assert of_decoder.isdisjoint(read)
    made = encoder.encode(features)
    assert made is not None
    assert (made.dtype, made.bits.shape[0]) == ("float32", features.num_embeds)
    assert made.bits.tobytes() == expected.contiguous().numpy().tobytes()
    assert 0 < encoder.weight_bytes < weight_bytes(whole.model)  # type: ignore[arg-type]


def test_an_item_that_cannot_be_encoded_harms_no_other(tmp_path: Path) -> None:
    folder = make_llava(tmp_path)
    config = engine_config(model=str(folder), dtype="float32", device="cpu")
    encoder = ItemEncoder(config)
    processor = loader.load(str(folder), device="cpu").processor
    assert processor is not None
    good = processor.process("image", PICTURE, {})
    bad = processor.process("image", PICTURE, {})
    bad.arrays["pixels"] = bad.arrays["pixels"][:, :5]  # type: ignore[index]
    assert encoder.encode(bad) is None
    assert encoder.encode(good) is not None


def test_models_whose_media_cannot_be_encoded_apart(tmp_path: Path) -> None:
    text = make_text("qwen2", tmp_path / "text")
    with pytest.raises(ConfigError, match="takes no media"):
        check_encoders(engine_config(model=str(text)))
    fused = make_hf("gemma3", tmp_path / "fused")
    with pytest.raises(ConfigError, match="through the code of transformers"):
        check_encoders(engine_config(model=str(fused)))
    with pytest.raises(ConfigError, match="through the code of transformers"):
        loader.load(str(fused), device="cpu", encoders_only=True)
    seen = make_llava(tmp_path / "seen")
    check_encoders(engine_config(model=str(seen)))
    with pytest.raises(ConfigError, match="switched off by limit_mm_per_prompt"):
        check_encoders(engine_config(model=str(seen), limit_mm_per_prompt={"image": 0}))
