"""Encoding of media in batches: features of admitted requests in, encoder outputs out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from sensorium.core.plan import NOTHING_ENCODED, EncodeJob, EncodeReport
from sensorium.errors import EngineDeadError
from sensorium.models.interface import Model
from sensorium.multimodal.items import EMBEDS_DTYPE, Features
from sensorium.runtime.adapters import NO_LANE, AdapterSet
from sensorium.runtime.slots import Slot
from sensorium.runtime.soundness import INFINITE, finite_parts
from sensorium.runtime.timing import DeviceTimer

logger = logging.getLogger(__name__)


class FeatureStore:
    """Features of admitted requests by request id, until the request has ended.

    They outlive a preemption, after which an item may have to be encoded again. Only the engine
    writes to it.
    """

    def __init__(self) -> None:
        self._features: dict[str, tuple[Features, ...]] = {}

    def put(self, request_id: str, features: tuple[Features, ...]) -> None:
        """Keep the features of a request, one per item in order."""
        if features:
            self._features[request_id] = features

    def discard(self, request_id: str) -> None:
        """Drop the features of a request that has ended."""
        self._features.pop(request_id, None)

    def clear(self) -> None:
        """Drop all features."""
        self._features.clear()

    def get(self, request_id: str, item_index: int) -> Features:
        """Return the features of one item of a request."""
        return self._features[request_id][item_index]

    def __len__(self) -> int:
        return len(self._features)


class EncoderCache:
    """Encoder outputs (num_embeds, H) on the device, by the digest of the item.

    The plans of the scheduler decide what is kept. ``adapters``: those that may change encoders.
    """

    def __init__(
        self, model: Model, store: FeatureStore, adapters: AdapterSet | None = None
    ) -> None:
        self._model = model
        self._adapters = adapters
        self._store = store
        self._embeddings: dict[bytes, torch.Tensor] = {}
        self._timer = DeviceTimer(model.device)
        self._num_items = self._num_bytes = self._num_failed = 0
        self._unusable: dict[bytes, tuple[str, str]] = {}

    def __len__(self) -> int:
        return len(self._embeddings)

    def get(self, digest: bytes) -> torch.Tensor | None:
        """Return the encoder output with this digest, None where it is not kept."""
        return self._embeddings.get(digest)

    def evict(self, digests: Sequence[bytes]) -> None:
        """Drop the encoder outputs with these digests."""
        for digest in digests:
            self._embeddings.pop(digest, None)

    def clear(self) -> None:
        """Drop all encoder outputs."""
        self._embeddings.clear()

    def encode(self, jobs: Sequence[EncodeJob], slots: dict[int, Slot]) -> tuple[bytes, ...]:
        """Encode the items of a plan, a batch per modality and adapter.

        Return the digests of those that failed.

        When a batch fails, its items are tried one by one, so that a bad item harms no other.
        """
        groups: dict[tuple[str, int], list[tuple[bytes, Features]]] = {}
        failed: list[bytes] = []
        for job in jobs:
            try:
                request = slots[job.seq_id].request
                features = self._store.get(request.request_id, job.item_index)
                if features.precomputed:
                    failed += self._keep_given(job.digest, features)
                else:
                    kind = features.modality, self._lane(request.adapter)
                    groups.setdefault(kind, []).append((job.digest, features))
            except Exception:
                logger.exception("features of an item could not be opened")
                failed.append(job.digest)
        for (_, lane), group in groups.items():
            with self._adapted(lane):
                failed += self._encode_group(group)
        self._log_unusable(jobs, slots)
        self._num_failed += len(failed)
        return tuple(failed)

    def _lane(self, adapter: bytes) -> int:
        return NO_LANE if self._adapters is None else self._adapters.encoder_lane(adapter)

    def _adapted(self, lane: int) -> AbstractContextManager[None]:
        """Let all rows have the adapter of a lane within the block."""
        if self._adapters is None or lane == NO_LANE:
            return nullcontext()
        return self._adapters.rows.everywhere(lane)

    def pop_unusable(self) -> dict[bytes, tuple[str, str]]:
        """Return flaw and dtype of items with unusable outputs, since the last call."""
        found, self._unusable = self._unusable, {}
        return found

    def pop_report(self) -> EncodeReport:
        """Return the cost of encoding since the last call."""
        if not (self._num_items or self._num_failed or self._timer.is_late):
            return NOTHING_ENCODED
        report = EncodeReport(
            self._num_items,
            self._timer.pop_seconds(),
            self._num_bytes,
            self._num_failed,
            self._timer.is_late,
        )
        self._num_items = self._num_bytes = self._num_failed = 0
        return report

    def _encode_group(self, group: list[tuple[bytes, Features]]) -> list[bytes]:
        num_bytes = 0
        failed: list[bytes] = []
        try:
            with self._timer.measured():
                embeddings = self._model.encode([features for _, features in group])
                finite = finite_parts(embeddings)
                for (digest, features), embeds, sound in zip(
                    group, embeddings, finite, strict=True
                ):
                    if embeds.shape[0] != features.num_embeds:
                        raise RuntimeError(
                            f"the encoder made {embeds.shape[0]} embeddings of "
                            f"{features.num_embeds}"
                        )
                    if sound:
                        num_bytes += self._keep(digest, embeds)
                    else:
                        failed.append(digest)
                        self._spoilt(digest, "its embeddings")
        except EngineDeadError:
            raise  # of several ranks one has gone
        except Exception:
            logger.exception("encoding %d item(s) failed", len(group))
            if len(group) == 1:
                return [group[0][0]]
            return [digest for item in group for digest in self._encode_group([item])]
        self._num_items += len(group) - len(failed)
        self._num_bytes += num_bytes
        return failed

    def _keep_given(self, digest: bytes, features: Features) -> list[bytes]:
        """Keep precomputed embeddings.

        Return the digest if they are not finite in the model's dtype.
        """
        self._keep(digest, _given(features))
        if finite_parts([self._embeddings[digest]])[0]:
            return []
        del self._embeddings[digest]
        self._spoilt(digest, "the embeddings given as input")
        return [digest]

    def _spoilt(self, digest: bytes, what: str) -> None:
        dtype = str(self._model.dtype).removeprefix("torch.")
        self._unusable[digest] = (f"{what} {INFINITE}", dtype)

    def _log_unusable(self, jobs: Sequence[EncodeJob], slots: dict[int, Slot]) -> None:
        for job in jobs:
            if job.digest in self._unusable:
                request = slots[job.seq_id].request
                flaw, dtype = self._unusable[job.digest]
                logger.error(
                    "request %s, item %d (%s): %s in %s",
                    request.request_id,
                    job.item_index,
                    request.items[job.item_index].modality,
                    flaw,
                    dtype,
                )

    def _keep(self, digest: bytes, embeds: torch.Tensor) -> int:
        """Keep the encoder output of an item, and return its size in bytes."""
        kept = embeds.to(device=self._model.device, dtype=self._model.dtype)
        self._embeddings[digest] = kept
        return kept.nbytes

    def merge(self, embeds: torch.Tensor, first_row: int, start: int, end: int, slot: Slot) -> None:
        """Write encoder outputs over the rows of ``embeds`` (T, H) with the items' positions.

        The span of ``slot`` from position ``start`` to ``end`` begins at ``first_row``.
        """
        for item in slot.request.items:
            if item.end <= start:
                continue
            if item.start >= end:
                break
            source, offset = self._embeddings[item.digest], 0
            for run_start, length in item.runs:
                low, high = max(run_start, start), min(run_start + length, end)
                if low < high:
                    at = offset + low - run_start
                    row = first_row + low - start
                    embeds[row : row + high - low] = source[at : at + high - low]
                offset += length


def _given(features: Features) -> torch.Tensor:
    """Return precomputed embeddings, (num_embeds, hidden)."""
    given = torch.from_numpy(features.arrays["embeds"])
    name = features.meta.get(EMBEDS_DTYPE)
    return given if name is None else given.view(getattr(torch, name))
