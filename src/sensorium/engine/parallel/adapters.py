"""LoRA adapters of a model that several ranks share: the first reads them, all take their parts.

The first rank sends each module whole, in the dtype of the model. Each rank takes what its part of
the layer needs. So an adapter is read and checked once, and is in all ranks or in none.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from sensorium.engine.parallel import messages
from sensorium.engine.parallel.group import RankGroup
from sensorium.engine.parallel.messages import AdapterPart, ClearLane, LaneSet, SetLane
from sensorium.errors import UnavailableError
from sensorium.kernels.adapters import LowRank, PackedPart, Run
from sensorium.layers.linear import Linear
from sensorium.models.interface import LoadableModel
from sensorium.models.lora.read import Adapter
from sensorium.runtime.lanes import Lanes

logger = logging.getLogger(__name__)

NOT_TAKEN = (
    "A process that runs a part of the model could not take the adapter; the log of the engine "
    "says why."
)


class GroupLanes:
    """Lanes of the other ranks, as the first one sees them; see ``runtime.adapters.OtherRanks``."""

    def __init__(self, group: RankGroup, *, have_encoders: bool) -> None:
        """Begin with empty lanes. have_encoders: all ranks have the encoders of media."""
        self._group, self._have_encoders = group, have_encoders

    def put(self, lane: int, adapter: Adapter) -> None:
        """Set the adapter of a lane in all other ranks.

        Raises UnavailableError where one could not take it; the others may have it then.
        """
        # Encoded first: where that fails, for want of memory, no rank has anything of it.
        parts = [
            messages.encode(_message(target.part.name, part))
            for target, part in adapter.whole
            if self._have_encoders or not target.is_encoder
        ]
        with self._group.together():
            for part in parts:
                self._group.send_encoded(part)
            self._group.send(SetLane(lane))
            answers = self._group.answers(LaneSet)
        if any(answer.failed for answer in answers):
            raise UnavailableError(NOT_TAKEN)

    def clear(self, lane: int) -> None:
        """Leave a lane empty in all other ranks."""
        with self._group.together():
            self._group.send(ClearLane(lane))


class RankLanes:
    """Lanes of a rank that another one leads."""

    def __init__(self, model: LoadableModel, num_lanes: int) -> None:
        self._lanes = Lanes(model, num_lanes)
        self._dtype = model.dtype
        self._parts: dict[Linear, list[PackedPart]] = {}
        self._has_failed = False

    @property
    def version(self) -> int:
        """Number of changes so far: what was captured for another one does not fit."""
        return self._lanes.version

    def using(
        self, runs: Sequence[tuple[int, int, int]], num_rows: int
    ) -> AbstractContextManager[None]:
        """Give the rows of a step their lanes within the block; see ``messages.Forward``."""
        return self._lanes.rows.using([Run(*run) for run in runs], num_rows)

    def everywhere(self, lane: int | None) -> AbstractContextManager[None]:
        """Give all rows, however many, one lane within the block; None for no adapter."""
        return self._lanes.rows.everywhere(lane)

    def handle(self, message: AdapterPart | SetLane | ClearLane) -> LaneSet | None:
        """Do what a message says, and return the answer, if it wants one."""
        if isinstance(message, ClearLane):
            self._lanes.clear(message.lane)
            return None
        try:
            if isinstance(message, AdapterPart):
                self.take(message)
                return None
            if not self._has_failed:
                self._lanes.put(message.lane, self._parts)
        except Exception:
            logger.exception("this rank could not take an adapter")
            self._has_failed = True
            if isinstance(message, AdapterPart):
                return None
        answer = LaneSet(self._has_failed)
        self._parts, self._has_failed = {}, False
        return answer

    def take(self, message: AdapterPart) -> None:
        """Lay out what this rank has of a module. Raises whatever keeps it from that."""
        if self._has_failed:
            return
        target = self._lanes.targets[message.name]
        rank, num_inputs, num_outputs = message.rank, target.num_inputs, target.num_outputs
        whole = LowRank(
            _tensor(message.a, self._dtype).view(rank, num_inputs),
            _tensor(message.b, self._dtype).view(num_outputs, rank),
            message.scale,
            target.first,
            _tensor(message.affine, torch.float32).view(2, -1) if message.affine else None,
        )
        self._parts.setdefault(target.layer, []).append(self._lanes.pack(target, whole))


def _message(name: str, part: LowRank) -> AdapterPart:
    affine = b"" if part.affine is None else _bytes(part.affine)
    return AdapterPart(name, part.a.shape[0], part.scale, _bytes(part.a), _bytes(part.b), affine)


def _bytes(x: torch.Tensor) -> bytes:
    return x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _tensor(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype)
