"""The media workers of every family make what its processor makes in this process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sensorium.config import engine_config
from sensorium.engine.prompts.media_workers import process_decoders
from sensorium.models import loader
from sensorium.models.registry import resolve
from sensorium.multimodal.decode.loaders import LOADERS, DecodeJob
from sensorium.multimodal.items import Features, MediaItem, Modality
from sensorium.multimodal.processor import PlacedItem
from sensorium.multimodal.shared_memory import SharedArraysFolder
from sensorium.multimodal.workers.pool import ThreadDecoders
from sensorium.multimodal.workers.threads import ThreadWorkers
from tests import checkpoints
from tests.checkpoints.hf import make_hf
from tests.multimodal.clips import make_clip, make_sound
from tests.multimodal.support import encoded, picture

pytestmark = pytest.mark.slow

FAMILIES: dict[str, tuple[Callable[..., Path], tuple[Modality, ...]]] = {
    "llava": (checkpoints.make_llava, ("image",)),
    "phi3_v": (checkpoints.make_phi3_v, ("image",)),
    "qwen2_vl": (checkpoints.make_qwen2_vl, ("image", "video")),
    "qwen2_5_vl": (checkpoints.make_qwen2_5_vl, ("image", "video")),
    "qwen3_vl": (checkpoints.make_qwen3_vl, ("image", "video")),
    "llava_onevision": (checkpoints.make_llava_onevision, ("image", "video")),
    "minicpmv": (checkpoints.make_minicpmv, ("image", "video")),
    "ultravox": (checkpoints.make_ultravox, ("audio",)),
    "idefics3": (partial(make_hf, "idefics3"), ("image",)),
    "voxtral": (partial(make_hf, "voxtral"), ("audio",)),
}
WRAPPED = {"idefics3", "voxtral"}
"""Families whose processor is that of Transformers."""
FILES: dict[Modality, Callable[[], bytes]] = {
    "image": lambda: encoded(picture(90, 130), "JPEG"),
    "video": lambda: make_clip(num_frames=8, size=(64, 96)),
    "audio": make_sound,
}


def plain(value: Any) -> Any:
    """Small values as they come through a socket: tuples are lists there."""
    if isinstance(value, dict):
        return {name: plain(member) for name, member in value.items()}
    return [plain(member) for member in value] if isinstance(value, tuple | list) else value


def is_safe_to_fork(process_id: int, native: bool) -> None:
    """Check that the process which forks the workers of a native family has one thread and does
    without torch. The libraries of others start a thread when they are imported, which then
    waits for work that never comes.
    """
    assert not native or len(os.listdir(f"/proc/{process_id}/task")) == 1
    assert ("libtorch" in Path(f"/proc/{process_id}/maps").read_text()) is not native


def same(there: Features, here: Features) -> None:
    assert (there.modality, there.num_embeds, there.precomputed) == (
        here.modality,
        here.num_embeds,
        here.precomputed,
    )
    assert plain(dict(there.meta)) == plain(dict(here.meta))
    assert set(there.arrays) == set(here.arrays)
    for name, array in here.arrays.items():
        np.testing.assert_array_equal(there.arrays[name], array)
        assert there.arrays[name].dtype == array.dtype
    assert there.num_bytes == here.num_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_a_worker_makes_what_the_processor_makes(family: str, tmp_path: Path) -> None:
    make, modalities = FAMILIES[family]
    folder = make(tmp_path / "model")
    config = engine_config(model=str(folder), num_media_workers=1)
    loaded = loader.read_config(str(folder))
    processor = resolve(loaded.config).build_processor(loaded)
    assert processor is not None
    segments, threads = SharedArraysFolder(), ThreadWorkers(1)
    decoders = process_decoders(config, segments)
    try:
        for modality in modalities:
            loading = LOADERS[modality].options.parse({}, "media_io_kwargs")
            job, file = DecodeJob(modality, loading, {}, 1), FILES[modality]()
            there = asyncio.run(decoders.prepare(job, file)).features
            here = asyncio.run(
                ThreadDecoders(threads, config.media, processor).prepare(job, file)
            ).features
            same(there, here)
            replacement = processor.replacement(there, 0)
            assert replacement == processor.replacement(here, 0)
            placed = [
                [PlacedItem(MediaItem(modality, b"", features), replacement.runs)]
                for features in (there, here)
            ]
            ids = replacement.token_ids
            positions = [processor.positions(ids, items) for items in placed]
            assert repr(positions[0]) == repr(positions[1])
        process_id = decoders.server.process_id
        assert process_id is not None
        is_safe_to_fork(process_id, native=family not in WRAPPED)
    finally:
        decoders.close()
        threads.close()
