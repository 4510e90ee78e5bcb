"""Encoders that are loaded without their decoder make the same bits as the whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sensorium.config import engine_config
from sensorium.engine.encoding import ItemEncoder
from sensorium.engine.loading import same_on_threads
from sensorium.errors import ConfigError
from sensorium.models import loader
from sensorium.models.gguf import folder as folders
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
from tests.checkpoints.gguf import write_gguf
from tests.checkpoints.hf import make_hf
from tests.checkpoints.mmproj import write_mmproj
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
def own_threads() -> Iterator[int]:
    """Threads of this process, which get set by encoders, and have this number again later."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


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
def test_encoders_alone_make_the_same_bits(
    family: str, tmp_path: Path, read: list[str], own_threads: int
) -> None:
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
    config = engine_config(model=str(folder), dtype="float32", device="cpu")
    # With other threads than the engine's, unless these decide last bits.
    matter = not same_on_threads(whole.family, torch.float32)
    encoder = ItemEncoder(config, own_threads + 1, own_threads)
    assert torch.get_num_threads() == own_threads + (0 if matter else 1)
    assert ("threads" in encoder.numerics) == matter
    assert read
    assert of_decoder.isdisjoint(read)
    made = encoder.encode(features)
    assert made is not None
    assert (encoder.dtype, made.shape[0]) == ("float32", features.num_embeds)
    assert made.tobytes() == expected.contiguous().numpy().tobytes()
    assert 0 < encoder.weight_bytes < weight_bytes(whole.model)  # type: ignore[arg-type]


def test_encoders_of_a_gguf_file_are_those_of_the_vision_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "cache_root", lambda: tmp_path / "caches")
    source = make_qwen2_vl(tmp_path / "source")
    write_gguf(source, tmp_path / "model.gguf")
    write_mmproj(source, tmp_path / "mmproj.gguf")
    files = {"model": str(tmp_path / "model.gguf"), "mmproj": str(tmp_path / "mmproj.gguf")}
    whole = loader.load(**files, device="cpu", dtype="float32")
    assert whole.processor is not None
    features = whole.processor.process("image", PICTURE, {})
    with torch.inference_mode():
        [expected] = whole.model.encode([features])
    made = ItemEncoder(engine_config(**files, dtype="float32", device="cpu")).encode(features)
    assert made is not None
    assert made.tobytes() == expected.contiguous().numpy().tobytes()


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
    with pytest.raises(ConfigError, match="random weights"):
        check_encoders(engine_config(model=str(seen), load_format="dummy"))
    with pytest.raises(ConfigError, match="switched off by limit_mm_per_prompt"):
        check_encoders(engine_config(model=str(seen), limit_mm_per_prompt={"image": 0}))
