"""Layers of a model that adapters may change, by the names of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sensorium.layers.linear import Linear
from sensorium.models.interface import LoadableModel

_UNREACHED = "resampler.attn."
"""Weights that their own reference reads past a wrapper around the layer."""


@dataclass(frozen=True, slots=True)
class Target:
    """A linear layer of the checkpoint: ``num_outputs`` rows, from ``first`` on, of ``layer``.

    ``is_encoder``: it is one of a tower or projector. ``is_swapped``: the second half of the
    checkpoint's rows is in front.
    """

    layer: Linear
    first: int
    num_outputs: int
    is_encoder: bool
    is_swapped: bool = False

    @property
    def num_inputs(self) -> int:
        """Inputs of the layer."""
        return self.layer.num_inputs

    def placed(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows (num_outputs, ...) of the checkpoint in the order of the layer."""
        return torch.cat(rows.chunk(2)[::-1]) if self.is_swapped else rows


def targets_of(model: LoadableModel) -> Mapping[str, Target]:
    """Return the layers by the names of their weights, in our spelling.

    These are linear layers whose rows are those of the checkpoint's weights one after the other, or
    the two halves of those of one. The head and the embedding are not among them.
    """
    found: dict[str, Target] = {}
    for slot in model.slots():
        if slot.role == "head" or len(slot.layers) != 1:
            continue
        [layer] = slot.layers
        # Other slots compute their weights from those of the checkpoint.
        is_plain = slot.packed is not None or slot.is_swapped
        if not is_plain or not isinstance(layer, Linear):
            continue
        first = 0
        for part in slot.parts:
            if len(part.shape) == 2:
                if not part.name.startswith(_UNREACHED):
                    is_encoder = slot.role != "decoder"
                    own = Target(layer, first, part.shape[0], is_encoder, slot.is_swapped)
                    found[part.name] = own
                first += part.shape[0]
    return found
