"""Layers of a model that adapters may change, by the names of their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from sensorium.distributed.shard import Cut
from sensorium.kernels.adapters import LowRank
from sensorium.layers.linear import Linear
from sensorium.models.interface import LoadableModel, Part
from sensorium.models.loading.coded import cut_out

_UNREACHED = "resampler.attn."
"""Weights that their own reference reads past a wrapper around the layer."""


@dataclass(frozen=True, slots=True)
class Target:
    """A weight of the checkpoint that is in ``layer``, from its row ``first`` on.

    ``part``: its name and shape, and what this process has of it, where several share the model.
    ``is_encoder``: it is one of a tower or projector. ``is_swapped``: the second half of the
    checkpoint's rows is in front.
    """

    layer: Linear
    first: int
    part: Part
    is_encoder: bool
    is_swapped: bool = False

    @property
    def num_inputs(self) -> int:
        """Inputs of the whole weight."""
        return self.part.shape[1]

    @property
    def num_outputs(self) -> int:
        """Outputs of the whole weight."""
        return self.part.shape[0]

    @property
    def own_outputs(self) -> int:
        """Outputs that the layer has."""
        return self.part.own_shape[0]

    def placed(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows (num_outputs, ...) of the checkpoint in the order of the layer."""
        return torch.cat(rows.chunk(2)[::-1]) if self.is_swapped else rows

    def own(self, whole: LowRank) -> LowRank:
        """Return what the layer takes of the part of an adapter for the whole weight.

        B is divided as the weight is by its outputs, A as it is by its inputs: the products with
        parts of A and the whole B are summed over the ranks, together with the layer's own results.
        """
        cut = self.part.cut
        if cut is None:
            return whole
        a, b = cut_out(whole.a, Cut(columns=cut.columns)), cut_out(whole.b, Cut(rows=cut.rows))
        return replace(whole, a=a, b=b)


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
                    found[part.name] = Target(layer, first, part, is_encoder, slot.is_swapped)
                first += part.own_shape[0]
    return found
