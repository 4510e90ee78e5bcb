"""Decoding and preprocessing of pictures with one and with two worker processes, for each family of models.

    python preprocess.py
    python preprocess.py --families qwen2_vl llava --image-size 2048x2048 --num-images 32 --workers 1 2 4

Each family's processor has the sizes that its published checkpoint has. JPEGs that were not seen before go through the
media pipeline, as those of requests do: digest, worker process, segment of shared memory, cache. The numbers of workers
take turns within a run, and every round's figure is kept. Written as JSON: images per second, and what the last number
of workers gives beside the first. The exit status is 1 when that is below ``--least-ratio`` for a family.
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests import checkpoints

from sensorium.bench.machine import describe_machine
from sensorium.config import MediaConfig, engine_config
from sensorium.engine.prompts.media_workers import process_decoders
from sensorium.models import loader
from sensorium.models.registry import resolve
from sensorium.multimodal.cache.features import FeatureCache
from sensorium.multimodal.items import MediaRef
from sensorium.multimodal.pipeline import MediaPipeline
from sensorium.multimodal.shared_memory import SegmentFolder

RESULTS = Path(__file__).parent / "results"
AT_ONCE = 8
"""Items that wait at a time; more than there are workers."""
LEAST_RATIO = 1.6

Values = Mapping[str, Mapping[str, Any]]
_QWEN_PIXELS = {"min_pixels": 3136, "max_pixels": 12_845_056}
_TILES = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
FAMILIES: dict[str, tuple[Callable[[Path], Path], Values]] = {
    "llava": (
        checkpoints.make_llava,
        {
            "config.json": {"vision_config": {"image_size": 336, "patch_size": 14}},
            "preprocessor_config.json": {
                "size": {"shortest_edge": 336},
                "crop_size": {"height": 336, "width": 336},
            },
        },
    ),
    "phi3_v": (
        checkpoints.make_phi3_v,
        {
            "config.json": {
                "img_processor": {"num_img_tokens": 144, "vision_config": {"image_size": 336}}
            },
            "preprocessor_config.json": {"num_crops": 4, "num_img_tokens": 144},
        },
    ),
    "qwen2_vl": (checkpoints.make_qwen2_vl, {"preprocessor_config.json": _QWEN_PIXELS}),
    "qwen2_5_vl": (checkpoints.make_qwen2_5_vl, {"preprocessor_config.json": _QWEN_PIXELS}),
    "qwen3_vl": (
        checkpoints.make_qwen3_vl,
        {
            "preprocessor_config.json": {
                "size": {"shortest_edge": 65_536, "longest_edge": 16_777_216}
            }
        },
    ),
    "llava_onevision": (
        checkpoints.make_llava_onevision,
        {
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
    ),
    "minicpmv": (
        checkpoints.make_minicpmv,
        {
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
    ),
}
"""A small checkpoint of each family, and the published values of what its processor reads."""


def checkpoint(family: str, folder: Path) -> Path:
    """A folder from which the family's processor can be built as published."""
    make, values = FAMILIES[family]
    model = make(folder / family)
    for name, over in values.items():
        path = model / name
        merged = _merged(json.loads(path.read_text()), over)
        path.write_text(json.dumps(merged))
    return model


def jpegs(num: int, size: tuple[int, int], seed: int = 0) -> list[bytes]:
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
        folder = SegmentFolder()
        decoders = process_decoders(config, folder)
        self.pipeline = MediaPipeline(
            media, processor, FeatureCache(1 << 30), decoders=decoders, segments=folder
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


async def measure(
    model: Path, files: Sequence[bytes], num_workers: Sequence[int], rounds: int
) -> dict[str, Any]:
    """Images per second by number of workers; the first round, which starts the processes, is left out."""
    setups = {num: Workers(model, num) for num in num_workers}
    rates: dict[int, list[float]] = {num: [] for num in num_workers}
    try:
        for number in range(rounds + 1):
            for num, setup in setups.items():
                rate = await setup.load(files[: 4 * num] if number == 0 else files)
                if number:
                    rates[num].append(rate)
    finally:
        for setup in setups.values():
            setup.pipeline.close()
    medians = {num: statistics.median(values) for num, values in rates.items()}
    first, last = num_workers[0], num_workers[-1]
    return {
        "images_per_second": {str(num): value for num, value in medians.items()},
        "rounds": {str(num): values for num, values in rates.items()},
        "ratio": medians[last] / medians[first],
    }


def measure_families(
    families: Sequence[str],
    size: tuple[int, int],
    num_images: int,
    num_workers: Sequence[int],
    rounds: int,
) -> dict[str, Any]:
    """``measure`` for each family."""
    files = jpegs(num_images, size)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for family in families:
            model = checkpoint(family, Path(folder))
            found[family] = asyncio.run(measure(model, files, num_workers, rounds))
            rates = ", ".join(
                f"{num}: {rate:.1f}/s" for num, rate in found[family]["images_per_second"].items()
            )
            print(f"{family:16} {rates}   ratio {found[family]['ratio']:.2f}", flush=True)
    return found


def _merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        old = merged.get(name)
        inner = isinstance(value, Mapping) and isinstance(old, dict)
        merged[name] = _merged(old, value) if inner else value
    return merged


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--image-size", default="1024x1024", metavar="WIDTHxHEIGHT")
    parser.add_argument("--num-images", type=int, default=48)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--least-ratio", type=float, default=LEAST_RATIO)
    parser.add_argument("--output", type=Path)
    return parser.parse_args(arguments)


def main() -> int:
    """Measure, print, write."""
    options = parse_arguments()
    width, _, height = options.image_size.partition("x")
    size = int(width), int(height)
    families = measure_families(
        options.families, size, options.num_images, options.workers, options.rounds
    )
    day = datetime.date.today().isoformat()
    path = options.output or RESULTS / f"media-preprocess-{day}.json"
    result = {
        "benchmark": "media_preprocess",
        "machine": describe_machine(),
        "image_size": options.image_size,
        "num_images": options.num_images,
        "workers": options.workers,
        "families": families,
    }
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(path)
    return int(any(family["ratio"] < options.least_ratio for family in families.values()))


if __name__ == "__main__":
    sys.exit(main())
