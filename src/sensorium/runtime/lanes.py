"""Lanes for adapters in the layers of a model, or of one rank's part of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sensorium.kernels import ops
from sensorium.kernels.adapters import AdaptedProduct, LowRank, PackedPart, RowAdapters
from sensorium.layers.linear import Linear
from sensorium.models.interface import LoadableModel
from sensorium.models.lora.targets import Target, targets_of


class Lanes:
    """``num_lanes`` places for adapters in every layer that adapters may change.

    Not thread-safe, but for ``pack``.
    """

    def __init__(self, model: LoadableModel, num_lanes: int) -> None:
        """Prepare the layers of a model that is loaded."""
        self.rows = RowAdapters()
        self.targets = targets_of(model)
        self.version = 0
        """Number of changes so far: what was captured for another one does not fit."""
        self._products: dict[Linear, AdaptedProduct] = {}
        for target in self.targets.values():
            layer = target.layer
            if layer not in self._products:
                sizes = (layer.num_inputs, layer.num_outputs, num_lanes)
                product = ops.adapted_product(*sizes, model.dtype, model.device)
                self._products[layer] = product
                layer.adapt(product, self.rows)

    def pack(self, target: Target, whole: LowRank) -> PackedPart:
        """Lay out what a layer takes of the part of an adapter for a whole weight."""
        return self._products[target.layer].pack(target.own(whole))

    def packed_bytes(self, target: Target, rank: int, is_affine: bool) -> int:
        """Return the bytes of what ``pack`` returns for an adapter of this rank."""
        return self._products[target.layer].packed_bytes(rank, target.own_outputs, is_affine)

    def put(self, lane: int, parts: Mapping[Linear, Sequence[PackedPart]]) -> None:
        """Set the adapter of a lane, of parts that are packed; whatever fails leaves it empty."""
        self.version += 1
        try:
            for layer, product in self._products.items():
                product.set(lane, parts.get(layer, ()))
        except BaseException:
            self.clear(lane)
            raise

    def clear(self, lane: int) -> None:
        """Leave a lane empty."""
        self.version += 1
        for product in self._products.values():
            product.set(lane, ())
