"""Decoding and preprocessing of images with one and with two worker processes, for each family
of models.

Each family's processor has the sizes that its published checkpoint has. JPEGs that were not seen
before go through the media pipeline, as those of requests do: digest, worker process, shared
memory, cache. The numbers of workers take turns, and every round's figure is kept.
"""

from __future__ import annotations

import asyncio
import io
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.harness import Found, Row, Size, flag
from sensorium.config import MediaConfig, engine_config
from sensorium.engine.prompts.media_workers import process_decoders
from sensorium.models import loader
from sensorium.models.registry import resolve
from sensorium.multimodal.cache.features import FeatureCache
from sensorium.multimodal.items import MediaRef
from sensorium.multimodal.pipeline import MediaPipeline
from sensorium.multimodal.shared_memory import SharedArraysFolder

AT_ONCE = 8
"""Items that wait at a time; more than there are workers."""

Values = Mapping[str, Mapping[str, Any]]
_QWEN_PIXELS = {"min_pixels": 3136, "max_pixels": 12_845_056}
_TILES = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
FAMILIES: dict[str, Values] = {
    "llava": {
        "config.json": {"vision_config": {"image_size": 336, "patch_size": 14}},
        "preprocessor_config.json": {
            "size": {"shortest_edge": 336},
            "crop_size": {"height": 336, "width": 336},
        },
    },
    "phi3_v": {
        "config.json": {
            "img_processor": {"num_img_tokens": 144, "vision_config": {"image_size": 336}}
        },
        "preprocessor_config.json": {"num_crops": 4, "num_img_tokens": 144},
    },
    "qwen2_vl": {"preprocessor_config.json": _QWEN_PIXELS},
    "qwen2_5_vl": {"preprocessor_config.json": _QWEN_PIXELS},
    "qwen3_vl": {
        "preprocessor_config.json": {"size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}}
    },
    "llava_onevision": {
        "config.json": {
            "vision_config": {"image_size": 384, "patch_size": 14},
            "image_grid_pinpoints": _TILES,
        },
        "preprocessor_config.json": {
            "size": {"height": 384, "width": 384},
            "image_grid_pinpoints": _TILES,
        },
        "processor_config.json": {"num_image_tokens": 729},
    },
    "minicpmv": {
        "config.json": {
            "query_num": 64,
            "image_size": 448,
            "vision_config": {"image_size": 980},
            "slice_config": {"max_slice_nums": 9, "patch_size": 14, "scale_resolution": 448},
        },
        "preprocessor_config.json": {
            "max_slice_nums": 9,
            "scale_resolution": 448,
            "image_feature_size": 64,
        },
    },
}
"""What the processor of each published checkpoint has other than that of our small one."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Which families with how many images and workers, and the target."""

    families: tuple[str, ...] = flag(tuple(FAMILIES), choices=FAMILIES, quick=("qwen2_vl",))
    image_size: Size = flag(Size(1024, 1024))
    num_images: int = flag(48, quick=8)
    workers: tuple[int, ...] = flag((1, 2), "numbers of processes")
    rounds: int = flag(3, quick=1)
    least_ratio: float = flag(1.6, "of the last number of workers to the first")


def measure(settings: Settings, folder: Path) -> Found:
    """Measure each family."""
    files = jpegs(settings.num_images, settings.image_size)
    found: dict[str, Any] = {}
    rows = []
    with tempfile.TemporaryDirectory() as models:
        for family in settings.families:
            model = checkpoint(family, Path(models))
            figures = asyncio.run(rates(model, files, settings.workers, settings.rounds))
            found[family] = figures
            for num, rate in figures["images_per_second"].items():
                rows.append(Row(f"{family}, workers: {num}", rate, "images/s"))
            rows.append(Row(f"{family}, ratio", figures["ratio"], least=settings.least_ratio))
    return Found(found, rows)


def checkpoint(family: str, folder: Path) -> Path:
    """Write a small checkpoint from which the family's processor can be built as published."""
    from tests import checkpoints  # imports torch

    make = getattr(checkpoints, f"make_{family}")
    model: Path = make(folder / family)
    for name, over in FAMILIES[family].items():
        path = model / name
        path.write_text(json.dumps(_merged(json.loads(path.read_text()), over)))
    return model


def jpegs(num: int, size: Size, seed: int = 0) -> list[bytes]:
    """Pictures of coarse and fine noise, each another one."""
    rng = np.random.default_rng(seed)
    width, height = size
    made = []
    for _ in range(num):
        coarse = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), np.uint8)
        image = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))
        fine = rng.integers(-12, 13, (height, width, 1), np.int16)
        pixels = np.clip(image.astype(np.int16) + fine, 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=85)
        made.append(file.getvalue())
    return made


class Workers:
    """The media pipeline of a model with so many worker processes."""

    def __init__(self, model: Path, num_workers: int) -> None:
        media = MediaConfig(num_media_workers=num_workers)
        config = engine_config(model=str(model), num_media_workers=num_workers)
        loaded = loader.read_config(str(model))
        processor = resolve(loaded.config).build_processor(loaded)
        if processor is None:
            raise SystemExit(f"{model.name} takes no media")
        folder = SharedArraysFolder()
        decoders = process_decoders(config, folder)
        self.pipeline = MediaPipeline(
            media, processor, FeatureCache(1 << 30), decoders=decoders, shared_folder=folder
        )
        self._number = 0

    async def load(self, files: Sequence[bytes]) -> float:
        """Images per second, at most ``AT_ONCE`` of them at a time."""
        places = asyncio.Semaphore(AT_ONCE)

        async def one(data: bytes) -> None:
            self._number += 1
            # A comment after the end of the picture makes it another file.
            changed = data + self._number.to_bytes(4, "little")
            async with places:
                await self.pipeline.load([MediaRef("image", "bytes", changed)])

        started = time.perf_counter()
        await asyncio.gather(*(one(data) for data in files))
        return len(files) / (time.perf_counter() - started)


async def rates(
    model: Path, files: Sequence[bytes], num_workers: Sequence[int], rounds: int
) -> dict[str, Any]:
    """Images per second by number of workers.

    The first round, which starts the processes, is left out.
    """
    setups = {num: Workers(model, num) for num in num_workers}
    found: dict[int, list[float]] = {num: [] for num in num_workers}
    try:
        for number in range(rounds + 1):
            for num, setup in setups.items():
                rate = await setup.load(files[: 4 * num] if number == 0 else files)
                if number:
                    found[num].append(rate)
    finally:
        for setup in setups.values():
            setup.pipeline.close()
    medians = {num: statistics.median(values) for num, values in found.items()}
    first, last = num_workers[0], num_workers[-1]
    return {
        "images_per_second": {str(num): value for num, value in medians.items()},
        "rounds": {str(num): values for num, values in found.items()},
        "ratio": medians[last] / medians[first],
    }


def _merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        old = merged.get(name)
        inner = isinstance(value, Mapping) and isinstance(old, dict)
        merged[name] = _merged(old, value) if inner else value
    return merged
