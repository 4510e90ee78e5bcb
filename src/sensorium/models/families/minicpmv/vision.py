"""Views of any shape in a tower that was trained on square images.

Learnt positions are looked up by relative place (Dehghani et al., "Patch n' Pack", 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch

from sensorium.models.parts.clip import IN_CHANNELS
from sensorium.models.parts.siglip import SiglipTower

Size = tuple[int, int]
"""Rows and columns of a view, in patches."""


def view_features(tower: SiglipTower, patches: torch.Tensor, sizes: Sequence[Size]) -> torch.Tensor:
    """Return features (P, width) of the patches (P, 3 * patch * patch) uint8 of all views.

    Views follow one another. Attention stays within each view.
    """
    scale = tower.patches.scale
    rows = scale(patches.view(len(patches), IN_CHANNELS, -1)).flatten(1)
    side = tower.config.image_size // tower.config.patch_size
    ids = torch.cat([position_ids(size, side) for size in sizes])
    starts = list(accumulate((height * width for height, width in sizes), initial=0))
    return tower.run(tower.embed(rows, ids.to(rows.device)), starts)


@lru_cache(maxsize=256)
def position_ids(size: Size, side: int) -> torch.Tensor:
    """Return indexes (rows * columns,) int64 into the side x side position table for a view.

    The patch in row i of n has the table's row that the fraction i / n falls into. Both are float32
    and come of the same operations as in the reference: where n and ``side`` have a common divisor,
    rounding decides.
    """
    bounds = torch.arange(1 / side, 1.0, 1 / side)
    rows, columns = (
        torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / length), bounds, right=True)
        for length in size
    )
    return (rows[:, None] * side + columns).flatten()
