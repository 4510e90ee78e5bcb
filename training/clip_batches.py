"""From videos to arrays, in the layouts of ``training.batches``."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
from PIL import Image

from training.batches import (
    NOISY_WAYS,
    Encoder,
    draw_noises,
    layout,
    patch_labels,
    stack,
)
from training.clips import CLIP_GRIDS, NUM_FRAMES, Clip, draw_clip
from training.pictures import CELL


def choose_clip_size(rng: Random, grid: tuple[int, int]) -> tuple[int, int]:
    """A size (width, height) of frames that are resized to ``grid``."""
    scale = rng.uniform(1.0, 2.2) if rng.random() < 0.7 else 1.0
    return round(grid[1] * CELL * scale), round(grid[0] * CELL * scale)


def clip_labels(clip: Clip, grid: tuple[int, int]) -> Any:
    """Labels of each patch of each pair of frames: [T, 4, P], as ``patch_labels``.

    A thing that moves is where it is in the first frame of the pair.
    """
    size = clip.frames[0].size
    return np.stack([patch_labels(regions, size, grid) for regions in clip.regions[::2]])


def make_clips(
    encode: Encoder, seed: int, size: int, way: str | None = None, noisy: float = 0.0
) -> dict[str, Any]:
    """A batch of ``size`` videos of one grid and one number of frames, as arrays.

    A batch has noise of front ends with the probability ``noisy``.

    Returns:
        As ``make_batch``, but pixels [B, F, height, width, 3] uint8 and patches [B, T, 4, P],
        with T pairs of frames; image tokens are counted through all pairs.
    """
    rng = Random(seed)
    grid = rng.choices(list(CLIP_GRIDS), list(CLIP_GRIDS.values()))[0]
    frames = rng.choices(list(NUM_FRAMES), list(NUM_FRAMES.values()))[0]
    noises = draw_noises(seed, size, noisy)
    sequences, pixels, patches = [], [], []
    for i in range(size):
        clip = draw_clip(seed * 1000 + i, size=choose_clip_size(rng, grid), frames=frames)
        here = way
        if way is None and noises[i] is not None:
            here = rng.choices(tuple(NOISY_WAYS), tuple(NOISY_WAYS.values()))[0]
        sequences.append(layout(rng, encode, grid, clip.turns, here, frames // 2, noises[i]))
        small = (grid[1] * CELL, grid[0] * CELL)
        resized = [frame.resize(small, Image.Resampling.BICUBIC) for frame in clip.frames]
        pixels.append(np.stack([np.asarray(frame, np.uint8) for frame in resized]))
        patches.append(clip_labels(clip, grid))
    arrays = {"pixels": np.stack(pixels), "patches": np.stack(patches)}
    arrays["noisy"] = np.array(noises[0] is not None)
    return arrays | stack(encode, sequences)
